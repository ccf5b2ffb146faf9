"""A run as tables for a screen: cells only, whoever prints them aligns them."""

from __future__ import annotations

from collections.abc import Sequence

from craft_bench.rewards.cases import PACKAGE, PLAIN
from craft_bench.rows import Row
from craft_bench.sdxl.table import NOTHING, number, share

_HEAD = [
    "reward", "who", "case", "ms p50", "p80", "images/s", "matrix rate", "GiB", "planned", "vs package",
    "vs transformers",
]  # fmt: skip


def speed_table(rows: Sequence[Row]) -> list[list[str]]:
    """What was timed, a line each."""
    lines = [_HEAD]
    for row in rows:
        if row.get("mode") not in ("score", "network"):
            continue
        who = [row["name"], f"{row['impl']} {row['dtype']}", row["case"]]
        if row["failed"]:
            lines.append([*who, "failed", *[NOTHING] * (len(_HEAD) - 4)])
            continue
        versus = row["versus"] or {}
        lines.append(
            [
                *who,
                *(number(row[key]) for key in ("p50_ms", "p80_ms", "images_per_s")),
                share(row.get("matrix_fraction")),
                number(row["peak_gib"]),
                number((row.get("planned") or {}).get("memory_gib")),
                *(f"{versus[rival]:.2f}x" if rival in versus else NOTHING for rival in (PACKAGE, PLAIN)),
            ]
        )
    return lines if len(lines) > 1 else []


def deviation_table(rows: Sequence[Row]) -> list[list[str]]:
    """How far each form's scores are from ours in float32, beside how far pictures are from one another."""
    lines = [["reward", "who", "pictures", "largest deviation", "mean", "spread of scores", "allowed"]]
    for row in rows:
        if row.get("mode") == "compare":
            found = row["deviation"]
            figures = [f"{found[key]:.2e}" for key in ("largest", "mean", "spread", "allowed")]
            lines.append([row["name"], f"{row['impl']} {row['dtype']}", str(found["pictures"]), *figures])
    return lines if len(lines) > 1 else []


def failures(rows: Sequence[Row]) -> list[str]:
    """What could not be measured and why; the same reason of many cases is one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["failed"]:
            reasons.setdefault(row["failed"], []).append(f"{row['name']} {row['impl']} {row['dtype']} {row['case']}")
    return [f"failed, {why}: {'; '.join(where)}" for why, where in reasons.items()]
