"""Progress drawn with rich: one row a stage, the current one with a bar and its figures.

Imported only when stderr is a terminal, so that ``--help`` and pipes never pay for rich.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from craft_cli.ui.meter import Clock, Meter, MeterTask, memory_text
from craft_cli.ui.text import clean, duration, marks


@dataclass
class _Stage:
    """One row: a stage may come back many times (blocks of candidates), so its time and counts add up."""

    name: str
    index: int
    total: int
    note: str = ""
    spent_s: float = 0.0
    entered: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    stopped: bool = False

    def leave(self, now: float) -> None:
        if self.entered is not None:
            self.spent_s += now - self.entered
            self.entered = None


class Bars:
    """A live picture of the run: stages done, the current one's bar, memory, time left.

    Args:
        stream: the terminal, normally stderr.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self._marks = marks(stream)
        self._console = Console(file=stream, highlight=False, emoji=False, markup=False)
        self._spinner = Spinner(self._marks.spinner)
        self._stages: dict[str, _Stage] = {}
        self._current: _Stage | None = None
        self._meters: list[Meter] = []
        self._stop = ""
        self._live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=8, transient=False)

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        """A stage begins, comes back, or is skipped (told by ``note``)."""
        now = self._clock()
        # Nothing is drawn before the first stage, so an error in the settings stands alone on the screen.
        if not self._live.is_started:
            self._live.start()
        if self._current is not None:
            self._current.leave(now)
        self._current = self._stages.setdefault(name, _Stage(name, index, total))
        self._current.note = clean(note)
        self._current.entered = now

    def task(self, label: str, total: int | None, unit: str) -> MeterTask:
        """A counted piece of work; its bar shows while it runs."""
        meter = Meter(clean(label), total, unit, self._clock)
        self._meters.append(meter)
        return MeterTask(meter, lambda _meter: None, self._ended)

    def _ended(self, meter: Meter) -> None:
        self._meters.remove(meter)
        if self._current is not None:
            counts = self._current.counts
            counts[meter.unit] = counts.get(meter.unit, 0) + meter.done

    def info(self, message: str) -> None:
        """A line above the picture."""
        self._console.print(Text(clean(message)))

    def warn(self, message: str) -> None:
        """A yellow line above the picture."""
        self._console.print(Text(f"warning: {clean(message)}", style="yellow"))

    def stopping(self, message: str) -> None:
        """Shown by the drawing thread at once, whatever the run is busy with."""
        self._stop = message

    def close(self, *, finished: bool = True) -> None:
        """Leave the last picture on the screen and give the cursor back."""
        if self._current is not None:
            self._current.leave(self._clock())
            self._current.stopped = not finished
            self._current = None
        self._meters.clear()
        self._stop = ""
        self._live.stop()

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = []
        for stage in list(self._stages.values()):
            parts.append(self._row(stage))
            if stage is self._current:
                parts += [self._bar(meter) for meter in list(self._meters)]
        if self._current is not None:
            memory = memory_text()
            spent = f"elapsed {duration(self._clock() - self._start)}"
            parts.append(Text(f"  {spent}" + (f"   memory {memory}" if memory else ""), style="dim"))
        if self._stop:
            parts.append(Text(self._stop, style="yellow"))
        return Group(*parts)

    def _row(self, stage: _Stage) -> RenderableType:
        current = stage is self._current
        seconds = stage.spent_s + (self._clock() - stage.entered if stage.entered is not None else 0.0)
        done = ", ".join(f"{n} {unit}" for unit, n in stage.counts.items())
        tail = "  ".join(part for part in (stage.note, "" if current else done, duration(seconds)) if part)
        row = Table.grid(padding=(0, 1))
        ended = Text(self._marks.stopped, "red") if stage.stopped else Text(self._marks.done, "green")
        mark: RenderableType = self._spinner if current else ended
        title = Text(f"{stage.index}/{stage.total} {stage.name:<9}", style="bold" if current else "")
        row.add_row(mark, title, Text(tail, style="dim", overflow="ellipsis", no_wrap=True))
        return row

    def _bar(self, meter: Meter) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        row.add_column(width=24)
        row.add_column(overflow="ellipsis", no_wrap=True)
        total = None if meter.total is None else float(max(meter.total, 1))
        # Rich animates a bar without a total by wall-clock; the figures beside it say what is known.
        row.add_row(
            ProgressBar(total=total, completed=meter.done, width=24, pulse=total is None),
            Text(meter.line(self._current.name if self._current else "")),
        )
        return row
