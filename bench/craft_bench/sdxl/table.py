"""A run as tables for a screen: cells only, whoever prints them aligns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craft_bench.rows import Row
from craft_bench.sdxl.gates import Reached

NOTHING = "-"


def step_table(rows: Sequence[Row]) -> list[list[str]]:
    """Training steps, a line each."""
    lines = [
        [
            "step", "ms p20", "p50", "p80", "images/s", "GiB", "reserved", "planned", "MFU", "HFU", "vs reference",
            "loss apart",
        ]
    ]  # fmt: skip
    for row in rows:
        if row["name"] != "step":
            continue
        label = f"{row['impl']} {row['case']}"
        if row["failed"]:
            lines.append([label, "failed", *[NOTHING] * (len(lines[0]) - 2)])
            continue
        planned = row.get("planned") or {}
        told = f"{number(planned.get('memory_gib'))} GiB {number(planned.get('step_ms'))} ms"
        versus = (row["versus"] or {}).get("reference")
        lines.append(
            [
                label,
                *(number(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms", "images_per_s", "peak_gib")),
                number(row.get("peak_reserved_gib")),
                told if planned else NOTHING,
                share(row.get("mfu")),
                share(row.get("hfu")),
                NOTHING if versus is None else f"{versus:.2f}x",
                share(row.get("loss_difference"), 3),
            ]
        )
    return lines if len(lines) > 1 else []


def image_table(rows: Sequence[Row]) -> list[list[str]]:
    """Image generation, a line each."""
    lines = [["images", "s/image", "denoising", "decoding", "GiB", "reserved", "MFU"]]
    for row in rows:
        if row["name"] == "generate":
            cells = [number(row.get(key)) for key in ("s_per_image", "denoise_s", "decode_s", "peak_gib")]
            failed = ["failed"] + [NOTHING] * 5
            done = [*cells, number(row.get("peak_reserved_gib")), share(row.get("mfu"))]
            lines.append([row["case"], *(failed if row["failed"] else done)])
    return lines if len(lines) > 1 else []


def stage_table(rows: Sequence[Row]) -> list[list[str]]:
    """The headline, a line a stage."""
    lines = [["whole run", "s", "how", "from"]]
    for row in rows:
        if row["name"] == "stage":
            done = [number(row.get("seconds")), row.get("how") or NOTHING, row.get("basis") or NOTHING]
            lines.append([row["case"], *([NOTHING, "failed", NOTHING] if row["failed"] else done)])
    return lines if len(lines) > 1 else []


def failures(rows: Sequence[Row]) -> list[str]:
    """What could not be measured and why; the same reason of many cases is one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["failed"]:
            reasons.setdefault(row["failed"], []).append(f"{row['impl']} {row['name']} {row['case']}")
    return [f"failed, {why}: {'; '.join(where)}" for why, where in reasons.items()]


def loss_table(rows: Sequence[Row], most: int = 20) -> list[list[str]]:
    """The first losses of the reference and of ours beside them, a line a batch: the first case of each method."""
    most = min(most, max((len(row.get("losses") or ()) for row in rows), default=0))
    lines = [["losses", *(str(step + 1) for step in range(most))]]
    shown = set()
    for row in rows:
        if row["name"] == "step" and row.get("losses"):
            key = (row["impl"], row["size"], row["method"])
            if key not in shown:
                shown.add(key)
                cells = [f"{loss:.4f}" for loss in row["losses"][:most]]
                cells += [NOTHING] * (most - len(cells))
                lines.append([f"{row['impl']} B={row['size']} {row['method']}", *cells])
    return lines if len(lines) > 1 else []


def gate_table(gates: Sequence[Reached]) -> list[list[str]]:
    """The figures: what is asked, what was measured at the worst of the cases, and whether that is enough."""
    lines = [["figure", "asked", "measured", "verdict", "best public", "worst at"]]
    for reached in gates:
        gate = reached.gate
        word = "at most " if gate.sense == "most" else "at least "
        where = reached.where + (f"; missed in {len(reached.missed)} of {reached.cases}" if reached.missed else "")
        measured = NOTHING if reached.measured is None else _unit(reached.measured, gate.unit)
        asked = word + _unit(gate.bound, gate.unit)
        lines.append([gate.text, asked, measured, reached.verdict, gate.best_public or NOTHING, where])
    return lines


def _unit(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f} {unit}"


def number(value: Any) -> str:
    """Four digits, or nothing."""
    return NOTHING if value is None else f"{value:#.4g}".rstrip(".")


def share(value: Any, digits: int = 1) -> str:
    """A share in percent, or nothing."""
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"
