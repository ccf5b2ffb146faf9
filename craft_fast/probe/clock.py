"""Timing work on a device, which may run ahead of the program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# A sample lasts about so long, or so many runs; the median of at most so many samples counts.
_SAMPLE_S, _MOST_RUNS, _MOST_SAMPLES = 0.005, 50, 20


class Clock:
    """Times work on a device until a deadline."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], Any], *, slice_s: float, warmup: int = 1) -> float:
        """Median seconds of ``run``, for about ``slice_s``; several a sample where one is too short to time."""
        for _ in range(warmup):
            run()
        self.wait()
        taken: list[float] = []
        runs, end = 1, time.perf_counter() + slice_s
        while not taken or (len(taken) < _MOST_SAMPLES and time.perf_counter() < end):
            before = time.perf_counter()
            for _ in range(runs):
                run()
            self.wait()
            taken.append((time.perf_counter() - before) / runs)
            runs = max(1, min(_MOST_RUNS, int(_SAMPLE_S / max(taken[-1], 1e-9))))
        return sorted(taken)[(len(taken) - 1) // 2]
