"""``craft-fast verify``: check every file of a run against its records."""

from __future__ import annotations

from craft_cli import options as opt
from craft_cli.request import Request
from craft_cli.ui.output import choose_mode, print_result
from craft_cli.ui.summary import check_data, check_lines
from craft_fast.errors import IntegrityError
from craft_fast.quiet import quiet_third_party

HELP = opt.help_text(
    "Check every file of a run against its records.",
    "Nothing is changed. Exit code 6 if any check fails.",
    examples=(
        "craft-fast verify",
        "craft-fast verify --name sea --json",
    ),
)


def verify(
    name: opt.Name = None,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Hash the run's files and compare."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    request = Request(name, runs)
    root = request.existing_root()
    quiet_third_party()
    from craft_fast.verify import verify_run

    checks = verify_run(root)
    print_result(mode, check_lines(checks), check_data(checks), event="result")
    bad = [check for check in checks if not check.ok]
    if bad:
        raise IntegrityError(
            "The run is not what its records say",
            where=str(root),
            why=f"{bad[0].what}: {bad[0].detail}" + (f", and {len(bad) - 1} more" if len(bad) > 1 else ""),
            hint=f"{request.command('run')} makes what is damaged again",
        )
