"""Where progress goes when it is not drawn: plain lines, JSON lines, nothing."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from craft_cli.ui.meter import Clock, Meter, MeterTask, memory_gib, memory_text
from craft_cli.ui.text import clean, write_line
from craft_fast.progress import Progress, Silent

_START = time.monotonic()  # of the process, nearly: all events of one command count from here


class Sink(Progress, Protocol):
    """Progress that can be told of a stop and be closed."""

    def stopping(self, message: str) -> None:
        """A signal arrived; safe to call from a signal handler."""

    def close(self, *, finished: bool = True) -> None:
        """No more progress; ``finished`` is false after an error. The terminal is left as it was."""


class Quiet(Silent):
    """Progress that says nothing; errors are still printed."""

    def stopping(self, message: str) -> None:
        """Nothing to say."""

    def close(self, *, finished: bool = True) -> None:
        """Nothing to close."""


class Plain:
    """Lines for logs and pipes: each stage once, a task's figures at most every ``every_s`` seconds.

    Args:
        stream: where lines go, normally stderr.
        every_s: shortest time between two progress lines.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, *, every_s: float = 5.0, clock: Clock = time.monotonic) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._stage, self._where = "", ""
        self._told: set[str] = set()
        self._told_of = (0, -1)
        self._last = clock()

    def _say(self, text: str) -> None:
        write_line(self._stream, clean(text))

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """Announce a stage; one that comes back (blocks of candidates) is announced once."""
        self._stage, self._where = name, f"[{index}/{total}] {name}"
        line = f"{self._where}: {note}" if note else self._where
        if line not in self._told:
            self._told.add(line)
            self._say(line)

    def task(self, label: str, total: int | None, unit: str) -> MeterTask:
        """A counted piece of work."""
        return MeterTask(Meter(label, total, unit, self._clock), self._changed, self._ended)

    def _changed(self, meter: Meter) -> None:
        if self._clock() - self._last >= self._every_s:
            self._tell(meter)

    def _ended(self, meter: Meter) -> None:
        # A long task deserves its closing figures; a hundred short ones would only be noise.
        if meter.elapsed_s >= self._every_s and self._told_of != (id(meter), meter.done):
            self._tell(meter)

    def _tell(self, meter: Meter) -> None:
        self._last = self._clock()
        self._told_of = (id(meter), meter.done)
        memory = memory_text()
        self._say(f"{self._where}: {meter.line(self._stage)}" + (f", memory {memory}" if memory else ""))

    def info(self, message: str) -> None:
        """A line worth reading."""
        self._say(message)

    def warn(self, message: str) -> None:
        """Something to know of or act on."""
        self._say(f"warning: {message}")

    def stopping(self, message: str) -> None:
        """Say that the stop was heard."""
        # Python's buffered streams refuse re-entry from a signal handler; the file descriptor does not.
        import os

        try:
            os.write(self._stream.fileno(), f"{message}\n".encode("ascii", "replace"))
        except (OSError, ValueError):
            self._told.add(message)

    def close(self, *, finished: bool = True) -> None:
        """Nothing to close."""


class JsonLines:
    """One JSON object a line on stdout: strict JSON, so a value that is not finite becomes null.

    Args:
        stream: where lines go, normally stdout.
        clock: seconds, monotonic; events carry the time since the command began.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock, self._start = clock, _START if clock is time.monotonic else clock()
        self._stage = ""
        self._stop: str | None = None

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event."""
        stop, self._stop = self._stop, None
        if stop is not None:
            self.emit("stopping", message=stop)
        row = {"event": event, "time_s": round(self._clock() - self._start, 3), **fields}
        write_line(self._stream, json.dumps(_strict(row), allow_nan=False, default=str))

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """A stage begins or is skipped."""
        self._stage = name
        self.emit("stage", stage=name, index=index, total=total, note=note)

    def task(self, label: str, total: int | None, unit: str) -> MeterTask:
        """A counted piece of work; every advance is an event."""
        return MeterTask(Meter(label, total, unit, self._clock), self._changed, lambda _meter: None)

    def _changed(self, meter: Meter) -> None:
        now, peak = memory_gib() or (None, None)
        self.emit(
            "progress",
            stage=self._stage,
            label=meter.label,
            done=meter.done,
            total=meter.total,
            unit=meter.unit,
            per_s=meter.rate,
            left_s=meter.left_s,
            memory_gib=now,
            peak_gib=peak,
            metrics=meter.metrics,
        )

    def info(self, message: str) -> None:
        """A line worth reading."""
        self.emit("info", message=message)

    def warn(self, message: str) -> None:
        """Something to know of or act on."""
        self.emit("warning", message=message)

    def stopping(self, message: str) -> None:
        """Noted now, written with the next event: a signal handler must not write into the middle of a line."""
        self._stop = message

    def close(self, *, finished: bool = True) -> None:
        """Nothing to close."""


def _strict(value: Any) -> Any:
    """``value`` with numbers that JSON does not know replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value
