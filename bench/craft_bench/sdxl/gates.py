"""The figures that the engine is to reach on one H100-class GPU, as data, and what a run says of each.

Where a figure covers many rows, the worst of them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from craft_bench.rows import Row
from craft_bench.sdxl.cases import OURS

Found = Iterable[tuple[float, str]]
Metric = Callable[[Sequence[Row]], Found]


@dataclass(frozen=True, slots=True)
class Gate:
    """One figure.

    Args:
        text: what is asked, in words.
        metric: name of what is measured, of ``METRICS``.
        bound: the figure.
        sense: whether it is asked to be ``most`` or ``least`` the bound.
        unit: of the bound, for a screen.
        best_public: the best that others publish, and who; empty where nobody does.
        where: fields of the rows that count, and their values; a tuple means any of these.
    """

    text: str
    metric: str
    bound: float
    sense: Literal["most", "least"]
    unit: str
    best_public: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)

    def keeps(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value <= self.bound if self.sense == "most" else value >= self.bound

    def counts(self, row: Row) -> bool:
        """Whether a row is one of those that this figure is about; a row that failed holds no value."""
        if row.get("failed") or row.get("device") in (None, "cpu") or row.get("problem") != "full":
            return False
        return all(_is(row.get(name), value) for name, value in self.where.items())


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run says of a figure.

    Args:
        gate: the figure.
        measured: the worst value; None if none was measured.
        where: the case of the worst value.
        missed: every case that misses the bound.
        cases: how many cases were measured.
    """

    gate: Gate
    measured: float | None
    where: str
    missed: tuple[str, ...]
    cases: int

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept in all cases measured; None if none was."""
        return None if self.measured is None else not self.missed

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or ``not measured``."""
        return {True: "met", False: "not met", None: "not measured"}[self.met]


_STEP: dict[str, Any] = {"name": "step", "impl": OURS, "cap_gib": None, "compile": False, "nf4_convs": False}
# Ours as it is delivered, and as the engine chooses on the card at hand.
_DEFAULT: dict[str, Any] = {**_STEP, "recompute": "auto", "graph": True, "lora": "auto", "optimizer": "auto"}
_SMALLEST: dict[str, Any] = {**_DEFAULT, "recompute": "all", "batch": 1}

GATES: tuple[Gate, ...] = (
    Gate("peak, NF4 QLoRA r=16, batch 1", "peak_gib", 4.0, "most", "GiB", "4.4 GB claimed (fp8)",
         {**_SMALLEST, "method": "qlora"}),
    Gate("peak, bf16 LoRA, all recomputed, batch 1", "peak_gib", 6.3, "most", "GiB", "6.5 GiB",
         {**_SMALLEST, "method": "lora"}),
    Gate("peak, full fine-tune, batch 1", "peak_gib", 16.0, "most", "GiB", "about 10 GB claimed (Adafactor)",
         {**_SMALLEST, "method": "full"}),
    Gate("NF4 step over bf16 step, same settings", "nf4_over_bf16", 1.4, "most", "x", "2.6-2.9x (int8, fp8)",
         {**_STEP, "method": ("lora", "qlora"), "lora": "auto", "optimizer": "auto"}),
    Gate("step, batch 1, against the reference loop", "versus_reference", 3.0, "least", "x", "",
         {**_DEFAULT, "method": "lora", "batch": 1}),
    Gate("step, batch 4, against the reference loop", "versus_reference", 1.8, "least", "x", "",
         {**_DEFAULT, "method": "lora", "batch": 4}),
    Gate("model-FLOP utilisation, batch 4 and more", "mfu", 0.40, "least", "%", "15-35 %",
         {**_DEFAULT, "method": "lora", "batch": (4, 8)}),
    Gate("30-step image with guidance, batch 4", "s_per_image", 1.0, "most", "s", "about 2.0 (A100 2.4)",
         {"name": "generate", "impl": OURS, "batch": 4, "graph": True, "vae_dtype": "float32"}),
    Gate("plan against measured: memory", "plan_memory_error", 0.05, "most", "%", "none has it", {"impl": OURS}),
    Gate("plan against measured: time", "plan_time_error", 0.15, "most", "%", "none has it", {"impl": OURS}),
    Gate("training of a 100-sample run, 1,000 passes", "seconds", 60.0, "most", "s", "the paper: 4 GPU-hours",
         {"name": "stage", "case": "train"}),
)  # fmt: skip


def judge(
    rows: Sequence[Row], gates: Sequence[Gate] | None = None, metrics: Mapping[str, Metric] | None = None
) -> list[Reached]:
    """What a run's rows say of all figures: of this module's, unless others and their metrics are given."""
    known = METRICS if metrics is None else metrics
    return [
        _judge(gate, [row for row in rows if gate.counts(row)], known) for gate in (GATES if gates is None else gates)
    ]


def _judge(gate: Gate, rows: Sequence[Row], metrics: Mapping[str, Metric]) -> Reached:
    found = list(metrics[gate.metric](rows))
    missed = tuple(where for value, where in found if not gate.keeps(value))
    if not found:
        return Reached(gate, None, "", (), 0)
    worst, where = max(found) if gate.sense == "most" else min(found)
    return Reached(gate, worst, where, missed, len(found))


def _is(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple) else bool(value == wanted)


def field_of(name: str, *inside: str) -> Metric:
    """A metric that is a field of the rows, or one inside of it."""

    def read(rows: Sequence[Row]) -> Found:
        for row in rows:
            value = row.get(name)
            for key in inside:
                value = (value or {}).get(key)
            if value is not None:
                yield float(value), str(row["case"])

    return read


def _size(metric: Metric) -> Metric:
    return lambda rows: ((abs(value), where) for value, where in metric(rows))


def _nf4_over_bf16(rows: Sequence[Row]) -> Found:
    """Pairs that differ in the base's weights alone; what memory leaves room for must be the same as well."""

    def settings(row: Row) -> tuple[Any, ...]:
        return row["batch"], row["recompute"], row["graph"], tuple(row["kept_units"])

    bf16 = {settings(row): row["p50_ms"] for row in rows if row["method"] == "lora"}
    for row in rows:
        if row["method"] == "qlora" and settings(row) in bf16:
            yield row["p50_ms"] / bf16[settings(row)], str(row["case"])


METRICS: dict[str, Metric] = {
    "peak_gib": field_of("peak_gib"),
    "nf4_over_bf16": _nf4_over_bf16,
    "versus_reference": field_of("versus", "reference"),
    "mfu": field_of("mfu"),
    "s_per_image": field_of("s_per_image"),
    "plan_memory_error": _size(field_of("planned", "memory_error")),
    "plan_time_error": _size(field_of("planned", "time_error")),
    "seconds": field_of("seconds"),
}
