"""Counting that every sink shares: how far, how fast, how long still, how much memory."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from craft_cli.ui.text import duration, figures

Clock = Callable[[], float]
_WINDOW = 64  # advances that a rate is averaged over
_SHORTEST_S = 0.2  # a single advance sooner than this says nothing of the rate


@dataclass
class Meter:
    """One task: ``done`` of ``total`` units, the latest metrics, and the time it took so far."""

    label: str
    total: int | None
    unit: str
    clock: Clock = time.monotonic
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    started: float = field(init=False)
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def __post_init__(self) -> None:
        self.started = self.clock()

    def advance(self, n: int, metrics: dict[str, float]) -> None:
        """Count ``n`` more units and keep the latest value of each metric."""
        self.done += n
        self.marks.append((self.clock(), self.done))
        self.metrics.update(metrics)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task began."""
        return self.clock() - self.started

    @property
    def rate(self) -> float | None:
        """Units a second over the latest advances, or None where it cannot be known yet.

        Measured between advances: what a resumed task begins with was not made in this moment.
        """
        if len(self.marks) > 1:
            (since, first), (until, last) = self.marks[0], self.marks[-1]
            return (last - first) / (until - since) if last > first and until > since else None
        elapsed = self.elapsed_s
        return self.done / elapsed if self.done and elapsed >= _SHORTEST_S else None

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end, or None where it cannot be known yet."""
        rate = self.rate
        return max(0.0, (self.total - self.done) / rate) if rate and self.total is not None else None

    def line(self, stage: str = "") -> str:
        """``h: 96/480 images, 6.1 images/s, loss 0.12, 1:03 left``; a label that only repeats is left out."""
        count = f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"
        # A sink works out the rate itself, so the task's own figure of it would only repeat it.
        named = f"{self.unit}_per_s"
        parts = [f"{self.label}: {count}" if self.label not in ("", self.unit, stage) else count]
        if self.rate is not None:
            parts.append(f"{self.rate:.3g} {self.unit}/s")
        parts += filter(None, [figures({k: v for k, v in self.metrics.items() if k != named})])
        if self.left_s is not None and self.done < (self.total or 0):
            parts.append(f"{duration(self.left_s)} left")
        return ", ".join(parts)


class MeterTask:
    """A context that hands ``advance`` to a sink; the ``Task`` of ``craft_fast.progress``."""

    def __init__(self, meter: Meter, changed: Callable[[Meter], None], ended: Callable[[Meter], None]) -> None:
        self._meter, self._changed, self._ended = meter, changed, ended

    def __enter__(self) -> MeterTask:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended(self._meter)

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Report ``n`` more units done, with current figures."""
        self._meter.advance(n, metrics)
        self._changed(self._meter)


def memory_gib() -> tuple[float, float] | None:
    """Memory now and at its peak, in GiB: of the GPU once it is in use, else of this process; None if unknown."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and getattr(torch, "cuda", None) is not None and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return None
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        now = peak
    return now / 2**30, max(now, peak) / 2**30


def memory_text() -> str:
    """``1.2 GiB, peak 1.4``, or nothing where memory cannot be read."""
    memory = memory_gib()
    return f"{memory[0]:.1f} GiB, peak {memory[1]:.1f}" if memory else ""
