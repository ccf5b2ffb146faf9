"""Results as a person reads them and as a script does: of a run, of its stages, of its checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_cli.ui.text import duration, figures, table

if TYPE_CHECKING:
    from craft_fast.pipeline import RunSummary, StageStatus
    from craft_fast.records import EvalRow
    from craft_fast.verify import Check

# Which part of a run's summary belongs to which stage; a stage command shows its own part alone.
_PARTS = ("filter", "evaluate", "export", "report")


def summary_lines(summary: RunSummary, only: str | None = None) -> list[str]:
    """The end of ``run``, or of one stage command.

    Args:
        summary: what the pipeline left behind.
        only: the one stage that was asked for; None for all.
    """
    parts = {only} if only else set(_PARTS)
    lines: list[str] = []
    if "filter" in parts and any(row.name == "filter" for row in summary.stages):
        lines += _samples(summary)
    if "evaluate" in parts and summary.evaluation:
        lines += evaluation_lines(summary.evaluation)
    paths = []
    if "export" in parts and summary.lora is not None:
        paths.append(("LoRA", str(summary.lora)))
    if "report" in parts and summary.report is not None:
        paths.append(("report", str(summary.report)))
    rows = [row for row in summary.stages if only in (None, row.name)]
    if only is not None and only not in _PARTS:
        paths += [(only, counts(row.info)) for row in rows]
    paths.append(("time", duration(sum(row.seconds for row in rows))))
    return [*lines, *table(paths)]


def summary_data(summary: RunSummary) -> dict[str, Any]:
    """The same for a script: plain values, paths as text."""
    data = asdict(summary)
    data["seconds"] = sum(row.seconds for row in summary.stages)
    return {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}


def _samples(summary: RunSummary) -> list[str]:
    share = f" ({summary.accepted / summary.images:.0%})" if summary.images else ""
    wanted = f", {summary.wanted} wanted" if summary.accepted < summary.wanted else ""
    lines = [f"{summary.accepted} samples accepted of {summary.images} images{share}{wanted}"]
    if summary.acceptance:
        lines.append(f"variants that pass: {', '.join(_rates(summary))}")
    return lines


def _rates(summary: RunSummary) -> Iterator[str]:
    """Acceptance by reward; of a lazy one, over the variants that it was asked about."""
    info = next((row.info for row in summary.stages if row.name == "filter"), {})
    tried, asked = info.get("tried", 0), info.get("asked", {})
    for name, rate in summary.acceptance.items():
        number = asked.get(name, tried)
        yield f"{name} {rate:.0%}" + (f" of {number} asked" if number < tried else "")


def evaluation_lines(rows: Sequence[EvalRow]) -> list[str]:
    """Base against tuned: held-out rewards, which nothing was trained on, apart from the training rewards."""
    head = ["", "base", "tuned", "difference", "95 % interval", "win rate"]
    cells: list[list[str]] = []
    for title, held_out in (("held-out rewards", True), ("training rewards", False)):
        chosen = [row for row in rows if row.held_out is held_out]
        if chosen:
            cells += [[title, *head[1:]], *(_evaluation_row(row) for row in chosen)]
    lines = table(cells, right=range(1, len(head)))
    counts_of = sorted({row.n for row in rows})
    return ["", *lines, f"over {' to '.join(map(str, counts_of))} held-out prompts, equal seeds", ""]


def _evaluation_row(row: EvalRow) -> list[str]:
    return [
        f"  {row.metric}",
        f"{row.base_mean:.4f}",
        f"{row.tuned_mean:.4f}",
        _signed(row.tuned_mean - row.base_mean),
        f"[{_signed(row.ci_low)}, {_signed(row.ci_high)}]",
        f"{row.win_rate:.1%}",
    ]


def _signed(value: float) -> str:
    """Four decimals with their sign; what rounds to zero has none."""
    text = f"{value:+.4f}"
    return " 0.0000" if float(text) == 0 else text


def counts(info: Mapping[str, Any]) -> str:
    """The plain numbers among a stage's figures, without those that are zero."""
    numbers = {k: v for k, v in info.items() if isinstance(v, int | float) and not isinstance(v, bool) and v}
    return figures({k: v for k, v in numbers.items() if k != "size"})


def status_lines(stages: Iterable[StageStatus], command: str) -> list[str]:
    """A table of stages with what each cost, and the command to type next."""
    rows = list(stages)
    cells = [["stage", "state", "time", "peak", "figures"]]
    for row in rows:
        seen = row.state != "new"
        peak = f"{row.peak_gib:.2f} GiB" if row.peak_gib is not None else ""
        # The manifest cannot tell a stage at work from one that was interrupted.
        state = "unfinished" if row.state == "running" else row.state
        cells.append([row.name, state, duration(row.seconds) if seen else "", peak, counts(row.info)])
    left = [row.name for row in rows if row.state != "done"]
    total = duration(sum(row.seconds for row in rows))
    end = f"next: {command}" if left else "all done; nothing to type"
    return [*table(cells, right=(2, 3)), f"{len(rows) - len(left)} of {len(rows)} stages done, {total} so far", end]


def status_data(stages: Iterable[StageStatus], command: str) -> dict[str, Any]:
    """The same for a script; ``next`` is null when all is done."""
    rows = [asdict(row) for row in stages]
    return {"stages": rows, "next": command if any(row["state"] != "done" for row in rows) else None}


def check_lines(checks: Sequence[Check]) -> list[str]:
    """A table of checks, the failed ones marked and counted."""
    bad = sum(not check.ok for check in checks)
    rows = [["ok" if check.ok else "FAILED", check.what, check.detail] for check in checks]
    return [*table(rows), f"{bad} of {len(checks)} checks failed" if bad else f"all {len(checks)} checks passed"]


def check_data(checks: Sequence[Check]) -> dict[str, Any]:
    """The same for a script."""
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}
