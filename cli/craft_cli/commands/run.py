"""``craft-fast run``: prompts in, an aligned LoRA and a report out."""

from __future__ import annotations

from craft_cli import options as opt
from craft_cli.execute import execute
from craft_cli.request import Request

HELP = opt.help_text(
    "Do all of it: prompts in, an aligned LoRA and a report out.",
    "Stages: expand, generate, score, filter, cache, train, export, evaluate, report. What is done already is kept: "
    "after any interruption the same command continues.",
    examples=(
        "craft-fast run",
        "craft-fast run prompts.txt --name sea --set train.rank=32",
        "craft-fast run -p 'a red circle' -p 'a blue square' --name two",
        "craft-fast run prompts.csv --preset sdxl-8gb --max-images 400",
        "craft-fast run prompts.csv --preset sdxl --vram 8 --offline",
        "craft-fast run --images pictures --name own",
    ),
)


def run(
    prompts: opt.Prompts = None,
    texts: opt.Texts = None,
    images: opt.Images = None,
    name: opt.Name = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    max_images: opt.MaxImages = None,
    max_minutes: opt.MaxMinutes = None,
    until: opt.Until = None,
    vram_gib: opt.Vram = None,
    offline: opt.Offline = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run every stage, up to ``until`` if given."""
    request = Request(
        name,
        runs,
        config,
        preset,
        overrides or (),
        prompts,
        texts or (),
        max_images,
        max_minutes,
        vram_gib,
        offline,
        images,
    )
    execute(request, as_json=as_json, quiet=quiet, until=until)
