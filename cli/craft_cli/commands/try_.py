"""``craft-fast try``: what a LoRA does, in one picture grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.commands import lora_files
from craft_cli.request import Request, resolve
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import Interrupted, UsageError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_cli.ui.sinks import Sink
    from craft_fast.config import Settings
    from craft_fast.trial import Trial

HELP = opt.help_text(
    "Draw a LoRA at several strengths: one picture grid.",
    "LORA is a .safetensors file in any of the usual formats, or the name of a run. Strength 0 is the base model, 1 "
    "the LoRA as trained; a prompt has the same noise at all of them, that of an evaluation with the same seed. "
    "Settings are the run's where LORA is one or lies in one, else the preset's. Says how far the LoRA moved the "
    "pictures.",
    examples=(
        "craft-fast try demo --prompt 'a red circle'",
        "craft-fast try sea.safetensors -p 'a ship at sea' --preset sdxl-8gb --seed 1 --seed 2",
        "craft-fast try demo -p 'a blue star' --strength 0 --strength 1 --set generate.guidance_scale=3 -o grid.png",
    ),
)
Lora = Annotated[
    str,
    typer.Argument(
        metavar="LORA", autocompletion=opt.complete_runs, show_default=False,
        help="A LoRA's .safetensors file, or the name of a run.",
    ),
]  # fmt: skip
TryPrompts = Annotated[
    list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="What to draw; give it many times.")
]
Strengths = Annotated[
    list[float] | None,
    typer.Option(
        "--strength", "-w", metavar="W", show_default=False,
        help="Of the LoRA; give it many times. Default: 0, 0.5, 1 and 1.5.",
    ),
]  # fmt: skip
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        "--seed", metavar="N", min=0, max=2**31 - 1, show_default=False,
        help="Of the noise; give it many times. Default: that of the run's evaluation.",
    ),
]  # fmt: skip
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The grid, a PNG.")]
Each = Annotated[
    Path | None,
    typer.Option(
        "--each", metavar="DIR", help="Write each picture by itself, too, into this folder.", show_default=False
    ),
]


def try_(
    lora: Lora,
    prompts: TryPrompts,
    strengths: Strengths = None,
    seeds: Seeds = None,
    output: Output = Path("grid.png"),
    each: Each = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    vram_gib: opt.Vram = None,
    offline: opt.Offline = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Draw, write the grid, and say how far the pictures moved."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    if each is not None and each.exists() and not each.is_dir():
        raise UsageError("A folder is wanted, this is a file", where=f"--each {each}")
    chosen = _choose(lora, runs)
    quiet_third_party()
    asked = Request("try", runs, config, preset, overrides or (), vram_gib=vram_gib, offline=offline)
    settings = _settings(asked, chosen)
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            try:
                data, lines = _draw(
                    chosen.path, settings, prompts, strengths, seeds, output, each, sink=sink, should_stop=stop
                )
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    print_result(mode, lines, data, event="result")


def _choose(given: str, runs: Path) -> lora_files.Chosen:
    """The LoRA that is meant; a run's folder stands for its name.

    Raises:
        UsageError: the run trained the whole UNet, which has no strength.
    """
    folder = Path(given).expanduser()
    if (folder / "manifest.sqlite").is_file():
        runs, given = folder.absolute().parent, folder.absolute().name
    if "/" not in given and any((runs / given / "lora").glob("*-unet")):
        raise UsageError(
            "This run trained the whole UNet, which has no strength",
            where=str(runs / given),
            hint=f"its pictures before and after are in the report: craft-fast report --name {given}",
        )
    return lora_files.choose(given, runs)


def _settings(request: Request, chosen: lora_files.Chosen) -> Settings:
    """As asked for; else those of the run that the LoRA is of; else the default preset's, whatever runs there are."""
    if request.config or request.preset:
        return resolve(request).settings
    if chosen.run is not None and (chosen.run / "config.yaml").is_file():
        run = chosen.run.absolute()
        return resolve(replace(request, config=run / "config.yaml")).settings
    return resolve(replace(request, preset=opt.DEFAULT_PRESET)).settings


def _draw(
    lora: Path, settings: Settings, texts: list[str], strengths: list[float] | None, seeds: list[int] | None,
    output: Path, each: Path | None, *, sink: Sink, should_stop: StopRequest,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    from craft_fast import trial
    from craft_fast.trial import sheet

    chosen = trial.check_strengths(strengths or trial.STRENGTHS)
    prompts = trial.clean_prompts(texts)
    own = settings.seed if settings.evaluate.seed is None else settings.evaluate.seed
    given = list(dict.fromkeys(seeds or [own]))
    size = settings.generate
    layout = sheet.lay_out(prompts, given, chosen, height_px=size.height_px, width_px=size.width_px)
    sheet.check_target(output)
    trial.fitting_adapter(lora, settings.model)
    from craft_fast.store.digest import sha256_file

    digest = sha256_file(lora)
    found, model_digest = _pictures(lora, settings, prompts, given, chosen, sink, should_stop)
    facts = {
        "lora": lora.name, "lora_sha256": digest, "model": model_digest,
        "generate": settings.generate.model_dump(mode="json", exclude={"noise", "max_images", "max_minutes"}),
    }  # fmt: skip
    written = sheet.write_sheet(found, layout, output, facts)
    names = sheet.write_each(found, each) if each is not None else []
    return _told(found, lora, digest, output, written.sha256, each, names, sink)


def _pictures(
    lora: Path, settings: Settings, prompts: list[str], seeds: list[int], strengths: list[float], sink: Sink,
    should_stop: StopRequest,
) -> tuple[Trial, str]:  # fmt: skip
    """Open the model as a run would, draw, close it."""
    from craft_fast.budget import apply_cap, resolve_auto
    from craft_fast.sdxl.load import pick_device
    from craft_fast.trial import draw_trial
    from craft_fast.workbench import Workbench

    sink.stage("draw", 1, 1)
    for note in apply_cap(pick_device(settings.model.device), settings.engine):
        sink.warn(note)
    settings, notes = resolve_auto(settings)
    for note in notes:
        if not note.startswith("train."):
            sink.info(note)
    bench = Workbench(settings)
    try:
        model = bench.model()
        found = draw_trial(
            model, lora, prompts, seeds=seeds, strengths=strengths, settings=settings.generate,
            concessions=bench.concessions(), progress=sink, should_stop=should_stop,
        )  # fmt: skip
        return found, model.digest
    finally:
        bench.close()


def _told(
    found: Trial, lora: Path, digest: str, output: Path, sha256: str, each: Path | None, names: list[str], sink: Sink
) -> tuple[dict[str, Any], list[str]]:
    moved = {strength: found.moved(strength) for strength in found.strengths}
    still = [strength for strength, far in moved.items() if strength != 0 and far == 0.0]
    for prompt in found.truncated:
        sink.warn(f"the end of this prompt is not seen, it has too many tokens: {prompt[:60]}")
    if still and all(far == 0.0 for far in moved.values()):
        sink.warn(f"the LoRA changes nothing: no picture moved at any strength; see craft-fast lora check {lora}")
    elif 1.0 in still:
        sink.warn(f"the LoRA changes nothing at strength 1; see craft-fast lora check {lora}")
    rows = [["strength", "moved by"]]
    for strength, far in moved.items():
        told = "base model" if strength == 0 else "?" if far is None else f"{far:.2f} of 255"
        rows.append([f"{strength:g}", told])
    lines = [
        *table(rows, right=(0,)), "",
        "mean change of a colour value against strength 0"
        if 0.0 in found.strengths else "--strength 0 as well says how far the LoRA moves the pictures",
        f"grid: {output}",
    ]  # fmt: skip
    if each is not None:
        lines.append(f"pictures: {len(names)} in {each}")
    pictures = [
        {"prompt": one.prompt, "seed": one.seed, "strength": one.strength, "sha256": one.sha256, "moved": one.moved}
        | ({"file": names[i]} if names else {})
        for i, one in enumerate(found.pictures)
    ]
    data = {
        "path": str(output), "sha256": sha256, "lora": str(lora), "lora_sha256": digest,
        "prompts": list(found.prompts), "seeds": list(found.seeds), "strengths": list(found.strengths),
        "moved": [{"strength": strength, "levels": far} for strength, far in moved.items()],
        "changes_nothing": bool(still) and all(far == 0.0 for far in moved.values()),
        "each": None if each is None else str(each), "pictures": pictures,
    }  # fmt: skip
    return data, lines
