"""``craft-fast score``: score the candidates."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 3: score every candidate with every reward.",
    "Rewards judge against the base prompt unless score.prompt=expanded.",
    examples=(
        "craft-fast score --name sea",
        "craft-fast score --name sea --set score.batch_size=16",
    ),
)
score = stage_command("score")
