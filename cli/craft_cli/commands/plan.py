"""``craft-fast plan``: what a run will need, before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from craft_cli import options as opt
from craft_cli.request import Request, resolve
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import duration, table
from craft_fast.errors import ResourceError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.plan import Plan, StagePlan

HELP = opt.help_text(
    "Say what a run will need: memory, time and disk of each stage.",
    "Memory follows from the settings and the model's size; time from measuring this device for some seconds. Nothing "
    "is loaded, written or fetched. Where the run does not fit, the settings that would are shown, cheapest first, and "
    "the exit code is 5.",
    examples=(
        "craft-fast plan",
        "craft-fast plan prompts.txt --preset sdxl --vram 8",
        "craft-fast plan --name sea --set train.rank=64 --no-probe",
        "craft-fast plan --preset sdxl --json",
    ),
)
NoProbe = Annotated[bool, typer.Option("--no-probe", help="Measure nothing: no times, an answer at once.")]


def plan(
    prompts: opt.Prompts = None,
    texts: opt.Texts = None,
    images: opt.Images = None,
    name: opt.Name = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    max_images: opt.MaxImages = None,
    vram: opt.Vram = None,
    offline: opt.Offline = None,
    no_probe: NoProbe = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Plan the run that the same options of ``run`` would start."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    quiet_third_party()
    request = Request(
        name, runs, config, preset, overrides or (), prompts, (), max_images, vram_gib=vram, offline=offline,
        images=images,
    )  # fmt: skip
    with progress(mode) as sink:
        resolved = resolve(request)
        settings = resolved.settings
        for note in resolved.notes:
            sink.info(note)
        from craft_fast.plan import plan as work_out
        from craft_fast.plan import plan_data

        found = work_out(
            request.root, settings, probing=not no_probe, progress=sink, prompt_count=len(texts) if texts else None
        )

    def command(options: Sequence[str]) -> str:
        return command_line(request, texts or (), options)

    print_result(mode, plan_lines(found, command(found.options)), plan_data(found, command), event="result")
    _refuse(found, command(found.options))


def command_line(request: Request, texts: Sequence[str], more: Sequence[str] = ()) -> str:
    """The ``craft-fast run`` that was planned, with more options."""
    words = ["craft-fast", "run"]
    if request.prompts is not None:
        words.append(request.prompts)
    for text in texts:
        words += ["-p", text]
    for option, value in (
        ("--images", request.images),
        ("--name", request.name),
        ("--config", request.config),
        ("--preset", request.preset),
    ):
        if value is not None:
            words += [option, str(value)]
    for setting in request.overrides:
        words += ["--set", setting]
    if request.max_images is not None:
        words += ["--max-images", str(request.max_images)]
    if request.vram_gib is not None:
        words += ["--vram", f"{request.vram_gib:g}"]
    if request.offline is not None:
        words.append("--offline" if request.offline else "--online")
    if request.runs != opt.DEFAULT_RUNS:
        words += ["--runs", str(request.runs)]
    return " ".join([shlex.join(words), *more])


def _refuse(found: Plan, command: str) -> None:
    if not found.fits:
        worst = max((stage for stage in found.stages if not stage.fits), key=lambda stage: stage.peak_gib or 0.0)
        raise ResourceError(
            "This run does not fit into the memory" if found.can_fit else "Nothing here makes this run fit",
            where=f"stage {worst.name}: {worst.what}",
            why=f"it needs {worst.peak_gib or 0.0:.1f} GiB, {found.budget_gib:.1f} GiB can be used",
            hint=command if found.can_fit else "a smaller image or model, or a GPU with more memory",
        )
    if not found.disk_fits:
        raise ResourceError(
            "This run does not fit on the disk",
            why=f"it will write about {found.disk_gib:.1f} GiB, {found.disk_free_gib:.1f} GiB are free",
            hint="--runs with a folder on a larger disk, or --max-images for fewer candidates",
        )


def plan_lines(found: Plan, command: str) -> list[str]:
    """The plan for a person: a table of stages, what it comes to, what to change."""
    rows = [["stage", "state", "peak", "time", "disk", "what decides its memory"], *map(_row, found.stages)]
    lines = [_device(found), "", *table(rows, right=(2, 3, 4)), "", *_totals(found)]
    if not found.fits:
        lines += ["", *_changes(found)]
    lines += [f"note: {note}" for note in found.notes]
    return [*lines, f"run it: {command}"] if found.fits or found.can_fit else lines


def _device(found: Plan) -> str:
    cap = f", capped at {found.cap_gib:g} GiB" if found.cap_gib is not None else ""
    usable = f", of which tensors can use {found.budget_gib:.1f} GiB"
    text = f"{found.device}, {found.total_gib:.1f} GiB{cap}{usable}"
    if found.probe is None:
        return text
    rates = f"{found.probe.matrix_tflops:.2g} TFLOP/s, {found.probe.copy_gbps:.0f} GB/s"
    return f"{text}; measured {rates} in {found.probe.seconds:.0f} s"


def _row(stage: StagePlan) -> list[str]:
    peak = "?" if stage.peak_gib is None else f"{stage.peak_gib:.2f} GiB"
    state = "unfinished" if stage.state == "running" else stage.state
    time = "done" if stage.state == "done" else "?" if stage.seconds is None else duration(stage.seconds)
    what = stage.what if stage.fits else f"DOES NOT FIT: {stage.what}"
    return [stage.name, state, peak, time, _size(stage.disk_gib), what]


def _size(gib: float) -> str:
    if gib == 0:
        return ""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"


def _totals(found: Plan) -> list[str]:
    made = found.made
    own = f" ({made.own} of them own pictures)" if made.own else ""
    lines = [
        f"{made.images} images of {made.groups} prompts{own}, {made.accepted} samples, {made.pairs} pairs compared"
    ]
    if found.probe is not None:
        least = "" if found.timed else "at least "
        lines.append(f"time: {least}{duration(found.seconds)}")
    room = "" if found.disk_fits else ", which is NOT ENOUGH"
    lines.append(f"disk: {_size(found.disk_gib) or 'nothing'}, {found.disk_free_gib:.0f} GiB free{room}")
    return lines


def _changes(found: Plan) -> list[str]:
    if not found.changes:
        return ["no setting makes it fit"]
    head = "settings that fit, cheapest first:" if found.can_fit else "all that helps, and it is not enough:"
    rows = [["", "peak then", "cost"]]
    rows += [[" ".join(change.options()), f"{change.peak_gib:.2f} GiB", change.time] for change in found.changes]
    return [head, *table(rows, right=(1,))]
