"""A plain progress bar for the build; the library may not import the command line's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from craft_fast.progress import Task


class _Bar:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.started = self.said = time.monotonic()

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Count and, at most every two seconds, say so."""
        self.done += n
        now = time.monotonic()
        if now - self.said < 2 and self.done != self.total:
            return
        self.said = now
        share = self.done / self.total if self.total else 0.0
        figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        left = (now - self.started) * (1 - share) / share if share else 0.0
        bar = "#" * int(24 * share)
        print(
            f"{self.label:28} [{bar:24}] {self.done}/{self.total} {self.unit}  {left:.0f} s left  {figures}",
            file=sys.stderr,
            flush=True,
        )


class Console:
    """Progress as lines on standard error, at most one every two seconds."""

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """A stage begins."""
        print(f"[{index}/{total}] {name} {note}", file=sys.stderr, flush=True)

    @contextmanager
    def task(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        """A counted piece of work."""
        yield _Bar(label, total, unit)

    def info(self, message: str) -> None:
        """A line worth reading."""
        print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Something to act on."""
        print(f"warning: {message}", file=sys.stderr, flush=True)
