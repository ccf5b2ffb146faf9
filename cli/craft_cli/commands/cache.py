"""``craft-fast cache``: encode the samples' texts."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 5: encode each accepted sample's text once.",
    "Latents are checked against their digests; a damaged entry is made again.",
    examples=(
        "craft-fast cache --name sea",
        "craft-fast cache --name sea --json",
    ),
)
cache = stage_command("cache")
