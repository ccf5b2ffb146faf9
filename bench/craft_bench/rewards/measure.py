"""Time and memory of a scoring call, as the one who calls it sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from craft_bench.measure import synchronize
from craft_bench.rows import Row
from craft_bench.sdxl import measure as stepping
from craft_bench.sdxl.measure import percentiles
from craft_bench.sdxl.problem import peaks


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        warm: calls before, not timed: they choose kernels and fill caches.
        fewest, most: timed calls.
        seconds: no new timed call after this, once there are ``fewest``.
        rate: of the matrix rate, ``craft_bench.sdxl.measure``.
    """

    warm: int = 2
    fewest: int = 5
    most: int = 50
    seconds: float = 2.0
    rate: stepping.Effort = stepping.FULL


FULL, QUICK = Effort(), Effort(warm=1, fewest=2, most=4, seconds=0.3, rate=stepping.QUICK)


def timed(
    call: Callable[[int], object], device: torch.device, effort: Effort, *, check: Callable[[], None] = lambda: None
) -> Row:
    """Run and time a call.

    Args:
        call: given the number of the call, so that it need not do the same again.
        device: waited for before and after each call.
        effort: how often.
        check: asked between calls; may raise to end it.

    Returns:
        ``p20_ms, p50_ms, p80_ms, timed, peak_gib, peak_reserved_gib``; the peaks are those of all calls, and None on
        a CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(effort.warm):
        check()
        call(number)
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < effort.most and (len(found) < effort.fewest or time.perf_counter() - began < effort.seconds):
        check()
        synchronize(device)
        started = time.perf_counter()
        call(effort.warm + len(found))
        synchronize(device)
        found.append((time.perf_counter() - started) * 1e3)
    p20, p50, p80 = percentiles(found)
    allocated, reserved = peaks(device)
    return {
        "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "timed": len(found), "peak_gib": allocated,
        "peak_reserved_gib": reserved,
    }  # fmt: skip
