"""``craft-fast train``: train the adapter."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 6: train the adapter on the accepted samples.",
    "Continues from the newest checkpoint that verifies.",
    examples=(
        "craft-fast train --name sea",
        "craft-fast train --name sea --set train.rank=32",
    ),
)
train = stage_command("train")
