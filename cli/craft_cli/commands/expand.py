"""``craft-fast expand``: read the prompts and write variants of each."""

from __future__ import annotations

from craft_cli import options as opt
from craft_cli.execute import execute
from craft_cli.request import Request

HELP = opt.help_text(
    "Stage 1: read the prompts and write variants of each.",
    "The first stage of a new run; the next one is craft-fast generate.",
    examples=(
        "craft-fast expand prompts.txt --name sea",
        "craft-fast expand prompts.jsonl --name sea --set expand.variants=5",
    ),
)


def expand(
    prompts: opt.Prompts = None,
    texts: opt.Texts = None,
    images: opt.Images = None,
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
    """Run the first stage, which may begin a run."""
    request = Request(
        name,
        runs,
        config,
        preset,
        overrides or (),
        prompts,
        texts or (),
        vram_gib=vram_gib,
        offline=offline,
        images=images,
    )
    execute(request, as_json=as_json, quiet=quiet, only="expand")
