"""Time and memory of a training step, and the rate of the card's matrix units.

A step's time is what a training loop sees: from one read of the loss to the next, the work of the CPU included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_bench import measure as timing
from craft_bench.sdxl.problem import peaks

MATMUL_DRIFT = 0.05


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        losses: steps whose losses are kept and not timed; they warm up and record graphs as well.
        fewest, most: timed steps.
        seconds: no new timed step after this, once there are ``fewest``.
        matmul: for the matrix rate.
        probe_s: deadline of plan's probe; None: its own.
    """

    losses: int = 20
    fewest: int = 6
    most: int = 40
    seconds: float = 8.0
    matmul: timing.Effort = timing.FULL
    probe_s: float | None = None


FULL, QUICK = Effort(), Effort(losses=4, fewest=2, most=4, seconds=0.5, matmul=timing.QUICK, probe_s=2.0)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What was measured of a step.

    Attributes:
        losses: of the first steps.
        p20_ms, p50_ms, p80_ms: percentiles of a step's time.
        first_ms: of the first step, with all that is done once.
        timed: how many steps were timed.
        peak_gib, peak_reserved_gib: over all steps, recording included; None on a CPU.
    """

    losses: list[float]
    p20_ms: float
    p50_ms: float
    p80_ms: float
    first_ms: float
    timed: int
    peak_gib: float | None
    peak_reserved_gib: float | None


def steps(
    call: Callable[[int], float],
    device: torch.device,
    effort: Effort,
    *,
    timed: Callable[[int], float] | None = None,
    check: Callable[[], None] = lambda: None,
) -> StepFigures:
    """Run and time steps.

    Args:
        call: does the step of that number and gives its loss, which waits for the device.
        device: where.
        effort: how many.
        timed: done instead of ``call`` in the timed steps.
        check: called between steps; may raise to end it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, spent = [], []
    for step in range(effort.losses):
        check()
        began = time.perf_counter()
        losses.append(call(step))
        spent.append(time.perf_counter() - began)
    first_ms = spent[0] * 1e3
    found = _timed(timed or call, effort, check)
    allocated, reserved = peaks(device)
    p20, p50, p80 = percentiles(found)
    return StepFigures(losses, p20, p50, p80, first_ms, len(found), allocated, reserved)


def _timed(call: Callable[[int], float], effort: Effort, check: Callable[[], None]) -> list[float]:
    """Milliseconds of each step."""
    found: list[float] = []
    began = last = time.perf_counter()
    while len(found) < effort.most and (len(found) < effort.fewest or last - began < effort.seconds):
        check()
        last = time.perf_counter()
        call(effort.losses + len(found))
        now = time.perf_counter()
        found.append((now - last) * 1e3)
        last = now
    return found


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, between neighbours in proportion."""
    found = torch.quantile(torch.tensor(list(values), dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    p20, p50, p80 = found.tolist()
    return p20, p50, p80


def matmul_tflops(device: torch.device, dtype: torch.dtype, side: int, effort: Effort) -> float:
    """Rate of a product of two square matrices, in TFLOP/s: what utilisation is a share of."""
    a, b = (torch.randn((side, side), device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call() -> Any:
        return torch.mm(a, b, out=out)

    call()
    p50_ms = timing.quantiles(call, device, effort.matmul).p50_ms
    return 2 * side**3 / (p50_ms * 1e-3) / 1e12


def largest_relative_difference(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest of ``|mine - theirs| / |theirs|``.

    Raises:
        ValueError: there are not equally many.
    """
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
