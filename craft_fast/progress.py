"""What long work says while it runs. The CLI draws it; the library only reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A counted piece of work inside a stage."""

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Report ``n`` more units done, with current figures (``loss=0.12, images_per_s=6.1``)."""


class Progress(Protocol):
    """A sink for progress: rich bars, plain lines, JSON lines, or nothing."""

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """A stage begins (or is skipped, told by ``note``); ``index`` counts from 1."""

    def task(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """A context in which ``advance`` is called; ``total`` may be unknown."""

    def info(self, message: str) -> None:
        """A line worth reading."""

    def warn(self, message: str) -> None:
        """Something the user should know of or act on."""


class _SilentTask:
    def advance(self, n: int = 1, **metrics: float) -> None:
        return None


class Silent:
    """Progress that says nothing; the default of library calls."""

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """Say nothing."""
        return None

    @contextmanager
    def task(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        """Count nothing."""
        yield _SilentTask()

    def info(self, message: str) -> None:
        """Say nothing."""
        return None

    def warn(self, message: str) -> None:
        """Say nothing."""
        return None
