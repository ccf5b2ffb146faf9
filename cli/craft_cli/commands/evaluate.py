"""``craft-fast evaluate``: compare with the base model."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 8: compare base and tuned on held-out prompts.",
    "Both draw with the same seeds. A win rate below evaluate.min_win_rate is exit code 7.",
    examples=(
        "craft-fast evaluate --name sea",
        "craft-fast evaluate --name sea --set evaluate.prompts=200",
    ),
)
evaluate = stage_command("evaluate")
