"""``craft-fast generate``: make candidate images."""

from __future__ import annotations

from craft_cli import options as opt
from craft_cli.execute import execute
from craft_cli.request import Request

HELP = opt.help_text(
    "Stage 2: make candidate images of every variant.",
    "Images that are there already are kept, so a larger budget only adds to them.",
    examples=(
        "craft-fast generate --name sea",
        "craft-fast generate --name sea --max-images 400",
        "craft-fast generate --name sea --vram 8",
    ),
)


def generate(
    name: opt.Name = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    max_images: opt.MaxImages = None,
    max_minutes: opt.MaxMinutes = None,
    vram_gib: opt.Vram = None,
    offline: opt.Offline = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run the second stage within its budget."""
    request = Request(
        name, runs, config, preset, overrides or (),
        max_images=max_images, max_minutes=max_minutes, vram_gib=vram_gib, offline=offline,
    )  # fmt: skip
    request.existing_root()
    execute(request, as_json=as_json, quiet=quiet, only="generate")
