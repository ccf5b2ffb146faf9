"""A run as tables for a screen: cells only, whoever prints them aligns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craft_bench.gates import Reached
from craft_bench.registry import MODES
from craft_bench.rows import Row
from craft_bench.verify import Verdict

NO_SPEED_UP = "tests red: no speed-up shown"
NOTHING = "-"


def op_table(rows: Sequence[Row], verdict: Verdict) -> list[list[str]]:
    """One op's rows, a line for each case and mode, a column for each form: its median and its share of the copy.

    Args:
        rows: rows of one op.
        verdict: whether the op may show speed-ups.
    """
    impls = list(dict.fromkeys(row["impl"] for row in rows if row["p50_ms"] is not None))
    ours = _ours(rows)
    rivals = list(dict.fromkeys(rival for row in rows for rival in row["versus"] or ()))
    header = ["case", "dtype", "mode", *(f"{impl} ms (of copy)" for impl in impls), "floor ms", "host us"]
    red = not verdict.green
    header += ["speed-up"] if red else [f"vs {rival}" for rival in rivals]
    lines = [header]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        failed = {row["impl"] for row in mine if row["failed"]}
        for mode in MODES:
            timed = {row["impl"]: row for row in mine if row["mode"] == mode}
            if not timed and not (mode == MODES[-1] and len(failed) == len(mine)):
                continue
            cells = [_time_cell(timed.get(impl), failed=impl in failed) for impl in impls]
            first: Row = next(iter(timed.values()), {})
            own: Row = timed.get(ours or "", {})
            line = [case, dtype, mode if timed else NOTHING, *cells, _number(first.get("floor_ms"))]
            line.append(_number(own.get("host_us"), 0))
            if red:
                line.append(NO_SPEED_UP)
            else:
                versus: dict[str, float] = own.get("versus") or {}
                line += [f"{versus[rival]:.2f}x" if rival in versus else NOTHING for rival in rivals]
            lines.append(line)
    return lines


def failures(rows: Sequence[Row]) -> list[str]:
    """What could not be measured and why; the same reason of many cases is one line."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["failed"]:
            reasons.setdefault((row["impl"], row["failed"]), []).append(f"{row['case']} {row['dtype']}")
    return [
        f"{impl}: {why}" + (f" ({where[0]}" + (f" and {len(where) - 1} more)" if len(where) > 1 else ")"))
        for (impl, why), where in reasons.items()
    ]


def gate_table(gates: Sequence[Reached]) -> list[list[str]]:
    """The figures: what is asked, what was measured at the worst of the cases, and whether that is enough."""
    lines = [["op", "figure", "asked", "measured", "verdict", "worst at"]]
    for reached in gates:
        gate, (done, of) = reached.gate, reached.cases
        where = reached.where + (f" ({done} of {of} cases measured)" if reached.where and done < of else "")
        if len(reached.below) > 1:
            where += f"; missed in {len(reached.below)} of {done}"
        measured = NOTHING if reached.measured is None else _figure(reached.measured, gate.metric)
        lines.append([gate.op, gate.text, _figure(gate.least, gate.metric), measured, reached.verdict, where])
    return lines


def _figure(value: float, metric: str) -> str:
    if metric == "versus":
        return f"{value:.2f} x"
    return f"{100 * value:.0f} %"


def _ours(rows: Sequence[Row]) -> str | None:
    """The form that speed-ups are told of, the first of ours; None where it was not measured."""
    return next((row["impl"] for row in rows if row["versus"] is not None), None)


def _time_cell(row: Row | None, *, failed: bool) -> str:
    if row is None:
        return "failed" if failed else NOTHING
    return f"{_number(row['p50_ms'])} ({100 * row['copy_fraction']:.0f} %)"


def _number(value: Any, digits: int | None = None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.{digits}f}" if digits is not None else f"{value:#.4g}".rstrip(".")
