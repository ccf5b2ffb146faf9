"""``craft-fast report``: write the report."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 9: write the run's report, HTML and JSON.",
    "The page is one file that needs no network, made from the run's records.",
    examples=(
        "craft-fast report --name sea",
        "craft-fast report --name sea --set 'report.title=Sea, second try'",
    ),
)
report = stage_command("report", gpu=False)
