"""``craft-fast doctor``: does this machine have what a run needs?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from craft_cli import options as opt
from craft_cli.request import Request, resolve
from craft_cli.ui.output import choose_mode, print_result
from craft_cli.ui.text import clean, write_line
from craft_fast.errors import EnvironmentProblem
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.doctor import Found

HELP = opt.help_text(
    "Check that this machine has what a run needs.",
    "Driver, GPU, Triton, packages, memory, disk and the models' files, each tried for real in seconds, for the preset "
    "or the run that is named. Nothing is downloaded or changed. A check that fails is exit code 4; a warning is not.",
    examples=(
        "craft-fast doctor",
        "craft-fast doctor --preset sdxl-8gb",
        "craft-fast doctor --name sea --json",
    ),
)
_NAME_WIDTH = 20


def doctor(
    name: opt.Name = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    vram_gib: opt.Vram = None,
    offline: opt.Offline = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Print each finding as it is known."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    request = Request(name, runs, config, preset, overrides or (), vram_gib=vram_gib, offline=offline)
    settings = resolve(request).settings
    from craft_fast.doctor import examine

    found: list[Found] = []
    for one in examine(settings, runs):
        found.append(one)
        if mode == "human":
            for line in finding_lines(one):
                write_line(sys.stdout, clean(line))
    failed = [one for one in found if one.result == "fail"]
    warned = [one for one in found if one.result == "warn"]
    checks = [{"check": one.check, "result": one.result, "found": one.found, "fix": one.fix} for one in found]
    tally = f"{len(found)} checks: {len(failed)} failed, {len(warned)} to know of"
    data = {"ok": not failed, "run": request.run_name, "failed": len(failed), "warned": len(warned), "checks": checks}
    print_result(mode, [tally], data, event="result")
    if failed:
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise EnvironmentProblem(
            "This machine lacks something that the run needs",
            where=failed[0].check,
            why=failed[0].found + more,
            hint=failed[0].fix,
        )


def finding_lines(one: Found) -> list[str]:
    """One finding for a person: what was looked at, how it is, what to type."""
    mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[one.result]
    lines = [f"{mark}  {one.check.ljust(_NAME_WIDTH)}  {one.found}"]
    if one.fix:
        lines.append(f"{' ' * (_NAME_WIDTH + 8)}fix: {one.fix}")
    return lines
