"""The figures that the ops are to reach on one H100-class GPU, as data, and what a run says of each.

Every figure is a ratio within one run. Where a figure covers many sizes, the worst of them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from craft_bench.registry import Case, Mode
from craft_bench.rows import Row

Metric = Literal["copy_fraction", "versus", "saved"]


@dataclass(frozen=True, slots=True)
class Gate:
    """One figure.

    Args:
        op: the op.
        text: what is asked, in words.
        metric: ``copy_fraction``; ``versus``, how many times faster than ``rival``; ``saved``, the share of what
            ``rival`` keeps between forward and backward that ours does not keep.
        least: bound from below.
        mode: mode of the rows that count.
        rival: the other form, for ``versus`` and ``saved``.
        dtype: dtype of the rows that count; None for all.
        smallest: rows of fewer elements do not count.
        named: words of which a case's name must hold one; none for all.
    """

    op: str
    text: str
    metric: Metric
    least: float
    mode: Mode = "both"
    rival: str | None = None
    dtype: str | None = None
    smallest: int = 0
    named: tuple[str, ...] = ()

    def covers(self, case: Case) -> bool:
        """Whether a case's rows count."""
        return (
            case.op == self.op
            and self.mode in case.traffic
            and self.dtype in (None, case.dtype)
            and case.size >= self.smallest
            and self.rival in (None, *case.rivals)
            and (not self.named or any(word in case.name for word in self.named))
        )


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run says of a gate.

    Args:
        gate: the figure.
        measured: the worst value; None if none was measured.
        where: the case and dtype of the worst value.
        below: every case that misses the bound.
        cases: how many cases were measured, and of how many.
    """

    gate: Gate
    measured: float | None
    where: str
    below: tuple[str, ...]
    cases: tuple[int, int]

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept in all cases measured; None if none was."""
        return None if self.measured is None else self.measured >= self.gate.least

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or ``not measured``."""
        return {True: "met", False: "not met", None: "not measured"}[self.met]


LARGE = 2**27
GATES: tuple[Gate, ...] = (
    Gate(
        "weighted_noise_loss", "80 % of copy bandwidth at 2^27 elements and more", "copy_fraction", 0.8, smallest=LARGE
    ),
    Gate(
        "weighted_noise_loss", "5x eager, forward and backward, at B=8", "versus", 5.0, rival="eager", named=("B=8 ",)
    ),
    Gate("weighted_noise_loss", "never slower than torch.compile, 1 to 4096 samples", "versus", 1.0, rival="compile"),
    Gate("noise_and_target", "2x eager with torch.randn", "versus", 2.0, mode="forward", rival="randn"),
    Gate(
        "noise_and_target", "80 % of copy bandwidth at 2^27 elements and more", "copy_fraction", 0.8, mode="forward",
        smallest=LARGE,
    ),
    Gate("lora_linear", "1.3x PEFT, forward and backward", "versus", 1.3, rival="peft"),
    # In one dtype both keep x, x A^T and the factors, byte for byte the same (tests/kernels/test_lora_linear_costs.py).
    Gate(
        "lora_linear", "less saved memory than PEFT, with float32 adapters", "saved", 0.01, rival="peft",
        named=("float32 adapters",),
    ),
    Gate("nf4_dequantize", "1.3x bitsandbytes nested", "versus", 1.3, mode="forward", rival="bitsandbytes"),
    Gate(
        "nf4_dequantize", "80 % of copy bandwidth at 2^26 elements and more", "copy_fraction", 0.8, mode="forward",
        smallest=2**26,
    ),
    Gate(
        "adamw8bit", "5x bitsandbytes, r = 16 and 64", "versus", 5.0, mode="forward", rival="bitsandbytes",
        named=("1120 tensors",),
    ),
)  # fmt: skip


def covered(case: Case) -> bool:
    """Whether any figure needs a case; those are measured first."""
    return any(gate.covers(case) for gate in GATES)


def judge(cases: Sequence[Case], rows: Iterable[Row]) -> list[Reached]:
    """What the rows of a run say of the figures of the ops that were run.

    Args:
        cases: every case of those ops, measured or not.
        rows: the rows of the run; none of a CPU, of which the figures do not speak.
    """
    table = {(row["name"], row["case"], row["dtype"], row["mode"], row["impl"]): row for row in rows}
    ops = {case.op for case in cases}
    return [_judge(gate, [case for case in cases if gate.covers(case)], table) for gate in GATES if gate.op in ops]


def _judge(gate: Gate, cases: Sequence[Case], table: dict[tuple[Any, ...], Row]) -> Reached:
    found: list[tuple[float, str]] = []
    for case in cases:

        def row_of(impl: str | None, case: Case = case) -> Row | None:
            return table.get((case.op, case.name, case.dtype, gate.mode, impl or ""))

        value = _METRICS[gate.metric](row_of(case.ours[0]), row_of(gate.rival), gate.rival)
        if value is not None:
            found.append((value, f"{case.name} {case.dtype}"))
    worst, where = min(found, default=(None, ""))
    below = tuple(name for value, name in found if value < gate.least)
    return Reached(gate, worst, where, below, (len(found), len(cases)))


def _copy_fraction(ours: Row | None, _: Row | None, __: str | None) -> float | None:
    # Like a speed-up, a share of the bandwidth is no praise for a wrong result: ``versus`` is there once verified.
    return _number(ours, "copy_fraction") if ours is not None and ours["versus"] is not None else None


def _versus(ours: Row | None, _: Row | None, rival: str | None) -> float | None:
    ratio: float | None = ((ours or {}).get("versus") or {}).get(rival)
    return ratio


def _saved(ours: Row | None, theirs: Row | None, _: str | None) -> float | None:
    mine, other = _number(ours, "saved_gib"), _number(theirs, "saved_gib")
    if mine is None or not other or ours is None or ours["versus"] is None:
        return None
    return 1 - mine / other


def _number(row: Row | None, field: str) -> float | None:
    value: Any = (row or {}).get(field)
    return None if value is None else float(value)


_METRICS: dict[Metric, Callable[[Row | None, Row | None, str | None], float | None]] = {
    "copy_fraction": _copy_fraction,
    "versus": _versus,
    "saved": _saved,
}
