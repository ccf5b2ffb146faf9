"""``craft-fast compare``: runs side by side, on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from craft_cli import options as opt
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import duration, table
from craft_fast.errors import UsageError, closest
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.report.compare_figures import Comparison, Judge

HELP = opt.help_text(
    "Hold runs against one another, on the same prompts and noise.",
    "RUN is a run's name or its folder; each needs a finished evaluation. What is compared is what all of them drew "
    "from the same noise: runs of different seeds are evaluated anew with one seed first (craft-fast evaluate --name B "
    "--set evaluate.seed=0). Rewards count where their scores came about in the same way. The page shows verdict, "
    "judges, pictures, settings that differ, and cost; nothing in the runs is changed.",
    examples=(
        "craft-fast compare demo other",
        "craft-fast compare demo other runs/third --prompts 32 --output compare.html",
        "craft-fast compare demo other --json",
    ),
)
CompareRuns = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN RUN...", help="Names or folders of runs; the first is what the others are held against.",
        autocompletion=opt.complete_runs, show_default=False,
    ),
]  # fmt: skip
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")]
Shown = Annotated[
    int, typer.Option("--prompts", metavar="N", min=0, help="Prompts shown; where the runs differ most, 6 more.")
]


def compare(
    names: CompareRuns,
    output: Output = Path("compare.html"),
    prompts: Shown = 16,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read the runs' evaluations, compare, write the page."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    roots = [find_run(name, runs) for name in names]
    labels = _labels(names, roots)
    quiet_third_party()
    from craft_fast.report import compare_page
    from craft_fast.report.compare_figures import compare as work_out
    from craft_fast.report.compare_figures import comparison_json
    from craft_fast.report.compare_inputs import match, picture_difference, read_evaluation

    compare_page.check_target(output, roots)
    with progress(mode) as sink:
        evaluated = [read_evaluation(root, label) for root, label in zip(roots, labels, strict=True)]
        shared = match(evaluated, picture_difference)
        for line in shared.left_out:
            sink.warn(f"left out: {line}")
        found = work_out(evaluated, shared)
        for name, why in found.left_out:
            sink.warn(f"{name} is not compared: {why}")
        compare_page.write_page(found, output, prompts=prompts)
    print_result(mode, _lines(found, output), {"page": str(output), **comparison_json(found)}, event="result")


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run that is given by name or by folder.

    Raises:
        UsageError: there is none; names the closest one.
    """
    for folder in (runs / name, Path(name)):
        if (folder / "manifest.sqlite").is_file():
            return folder
    known = opt.run_names(runs)
    guess = closest(Path(name).name, known)
    there = f"there are: {', '.join(known[:10])}" if known else f"{runs} holds none; --runs names another folder"
    raise UsageError("There is no such run", where=name, hint=f"{guess}{there}")


def _labels(names: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """What each run is called: its folder's name, or what was typed where two have the same.

    Raises:
        UsageError: fewer than two runs, or one of them twice.
    """
    if len(roots) < 2:
        raise UsageError("At least two runs are compared", where=" ".join(names), hint="craft-fast compare demo other")
    folders = [root.resolve() for root in roots]
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise UsageError("A run is not compared with itself", where=name, hint="craft-fast compare demo other")
    short = [folder.name for folder in folders]
    return [one if short.count(one) == 1 else str(folder) for one, folder in zip(short, folders, strict=True)]


def _lines(found: Comparison, output: Path) -> list[str]:
    labels = [run.label for run in found.runs]
    figures: list[str] = []
    # One table for two runs; with more of them, a table of differences for each would not fit a screen's width.
    tables: list[int | None] = [None] if len(labels) > 2 else []
    for other in [*tables, *range(1, len(labels))]:
        means = labels if other is None else [] if len(labels) > 2 else labels
        versus = [] if other is None else [f"{labels[other]} - {labels[0]}", "95 % interval", "wins"]
        head = [*(["base", *means] if means else []), *versus]
        cells = []
        for title, held_out in (("held out in all", True), ("trained on", False)):
            chosen = [judge for judge in found.judges if all(judge.held_out) is held_out]
            rows = [[f"  {judge.name}", *_means(judge, bool(means)), *_versus(judge, other)] for judge in chosen]
            cells += [[title, *head], *rows] if rows else []
        figures += [*table(cells, right=range(1, len(head) + 1)), ""]
    cost = [["", "time", "images", "accepted"]]
    for label, one in zip(labels, found.costs, strict=True):
        counted = ["?" if value is None else str(value) for value in (one.images, one.accepted)]
        cost.append([label, duration(one.seconds), *counted])
    settings = f"{len(found.settings)} settings differ"
    shown = ", ".join(key for key, _ in found.settings[:6])
    more = ", ..." if len(found.settings) > 6 else ""
    return [
        *figures,
        f"over {len(found.shared.prompts)} shared prompts, equal noise", "",
        *table(cost, right=range(1, 4)), "",
        f"{settings}: {shown}{more}" if found.settings else "all settings are equal", "",
        *(claim.sentence for claim in found.claims),
        f"page: {output}",
    ]  # fmt: skip


def _means(judge: Judge, wanted: bool) -> list[str]:
    return [f"{mean:.4f}" for mean in (judge.base_mean, *(row.tuned_mean for row in judge.runs))] if wanted else []


def _versus(judge: Judge, other: int | None) -> list[str]:
    if other is None:
        return []
    row = judge.pairs[0, other]
    interval = f"[{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
    return [f"{row.tuned_mean - row.base_mean:+.4f}", interval, f"{row.win_rate:.0%}"]
