"""``craft-fast rewards install``: an environment of its own for each of the authors' packages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_fast.errors import Interrupted

HELP = opt.help_text(
    "Install an authors' package as a reference.",
    "hpsv2 and image-reward need older libraries than this toolkit, so each gets an environment of its own in the "
    "user's cache ($XDG_CACHE_HOME, or $CRAFT_FAST_PACKAGES), with pinned versions: about 6 GiB of disk with torch's "
    "CUDA libraries. backend: package and craft-fast rewards verify use it. pip's own settings (PIP_INDEX_URL, ...) "
    "are obeyed. What was not finished counts as not there and is made anew.",
    examples=(
        "craft-fast rewards install hpsv2",
        "craft-fast rewards install image-reward --torch 2.14.1",
        "craft-fast rewards install hpsv2 --dry-run",
    ),
)


def _complete(incomplete: str) -> list[str]:
    from craft_fast.rewards.packages.table import PACKAGES

    return [name for name in PACKAGES if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="PACKAGE", autocompletion=_complete, help="hpsv2 or image-reward.")]
Python = Annotated[
    Path | None,
    typer.Option("--python", metavar="PATH", help="Interpreter to make the environment from. Default: this one."),
]
Torch = Annotated[
    str | None,
    typer.Option(
        "--torch", metavar="VERSION", help="Its torch; torchvision goes with it. Default: the one in use here."
    ),
]
FindLinks = Annotated[
    str | None, typer.Option("--find-links", metavar="DIR", help="Folder or page with more wheels, as for pip.")
]
System = Annotated[
    bool,
    typer.Option("--system-site-packages", help="Take torch and torchvision from the interpreter's own packages."),
]
Force = Annotated[bool, typer.Option("--force", help="Make it anew although it is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the commands that would run.")]


def install(
    package: Name,
    python: Python = None,
    torch: Torch = None,
    find_links: FindLinks = None,
    system_site_packages: System = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make the environment and say where it is."""
    from craft_fast.rewards.packages import environments
    from craft_fast.rewards.packages.install import install as make
    from craft_fast.rewards.packages.install import make_plan

    mode = choose_mode(as_json=as_json, quiet=quiet)
    plan = make_plan(
        package, python=python, torch=torch, find_links=find_links, system_site_packages=system_site_packages
    )
    commands = [shlex.join(command) for command in plan.commands]
    data: dict[str, Any] = {"package": package, "folder": str(plan.folder), "requirements": list(plan.requirements)}
    if dry_run:
        there = environments.read(plan.folder) is not None
        lines = [*commands, *(["it is there already: only --force makes it anew"] if there else [])]
        print_result(mode, lines, {**data, "commands": commands, "installed": there}, event="plan")
        return
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            try:
                made = make(plan, force=force, progress=sink, should_stop=stop)
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    others = [str(one.folder) for one in environments.all_of(package) if one.folder != made.folder]
    lines = [f"{made.label}: {made.folder} ({made.bytes / 1024**3:.1f} GiB, made in {made.seconds:.0f} s)"]
    lines += [f"an older one is there too, and is used no more: rm -r {shlex.quote(other)}" for other in others]
    lines.append("next: craft-fast rewards verify")
    data.update(versions=made.versions, bytes=made.bytes, seconds=made.seconds, others=others)
    print_result(mode, lines, data, event="result")
