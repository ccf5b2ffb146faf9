"""``craft-fast filter``: keep what beats the base prompt."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 4: keep what beats its base prompt on every reward.",
    "Says how many passed, by reward, and what to loosen when they are too few.",
    examples=(
        "craft-fast filter --name sea",
        "craft-fast filter --name sea --set 'filter.rewards=[h, p]'",
    ),
)
filter = stage_command("filter", gpu=False)
