"""``craft-fast status``: what is done, what is stale, what to type next."""

from __future__ import annotations

from craft_cli import options as opt
from craft_cli.request import Request
from craft_cli.ui.output import choose_mode, print_result
from craft_cli.ui.summary import status_data, status_lines

HELP = opt.help_text(
    "Show which stages are done, stale or new, and what is next.",
    examples=(
        "craft-fast status",
        "craft-fast status --name sea --json",
    ),
)


def status(
    name: opt.Name = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read the run's manifest; nothing is changed, a running run is not disturbed."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    request = Request(name, runs)
    root = request.existing_root()
    from craft_fast.pipeline import status as pipeline_status

    stages = pipeline_status(root)
    command = request.command("run")
    print_result(mode, status_lines(stages, command), status_data(stages, command), event="result")
