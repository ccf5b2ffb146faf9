"""Text that is safe and readable on any terminal: no control characters, no encoding errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

# Direction overrides can make a line read as something it is not; the rest of Unicode is left alone.
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F}
_CONTROLS = ({*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}) | _BIDI
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS}
_UNITS = (("_per_s", "/s"), ("_gib", " GiB"), ("_ms", " ms"), ("_s", " s"), ("_px", " px"))


@dataclass(frozen=True, slots=True)
class Marks:
    """The few symbols used on screen, in Unicode or in plain ASCII; ``spinner`` is a name of rich's."""

    done: str
    stopped: str
    spinner: str


UNICODE = Marks("✓", "✗", "dots")
ASCII = Marks("+", "x", "line")


def clean(text: str) -> str:
    """Make control characters and direction overrides visible, so that a prompt cannot drive the terminal."""
    return text.translate(_ESCAPES)


def marks(stream: TextIO) -> Marks:
    """Unicode marks where ``stream`` can encode them, ASCII ones elsewhere."""
    try:
        "✓✗━⠋".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def write_line(stream: TextIO, text: str) -> None:
    """Write ``text`` and a newline; what the encoding lacks is escaped. A reader that went away is no error."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    safe = text.encode(encoding, "backslashreplace").decode(encoding)
    # A dashboard or a pager that closes its end must not stop hours of work.
    with suppress(BrokenPipeError, ValueError):
        stream.write(safe + "\n")
        stream.flush()


def say(text: str) -> None:
    """One line for a person, on stderr."""
    write_line(sys.stderr, clean(text))


def duration(seconds: float) -> str:
    """``0.4 s``, ``0:17``, ``12:05`` or ``3:04:05``."""
    if 0 <= seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figure(name: str, value: float) -> str:
    """A metric with its unit: ``figure("peak_gib", 1.25) == "peak 1.25 GiB"``."""
    unit = ""
    for suffix, text in _UNITS:
        if name.endswith(suffix):
            name, unit = name.removesuffix(suffix), text
            break
    number = f"{value:.0f}" if value == int(value or 0) and abs(value) < 1e6 else f"{value:.4g}"
    return f"{name.replace('_', ' ')} {number}{unit}"


def figures(metrics: Mapping[str, float]) -> str:
    """All of a task's current metrics on one line; values that are not finite are shown as they are."""
    parts = [figure(k, v) if abs(v) < float("inf") else f"{k} {v}" for k, v in metrics.items()]
    return ", ".join(parts)


def table(rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as aligned lines, two spaces between columns; columns in ``right`` are right-aligned."""
    lines = [[clean(cell) for cell in row] for row in rows]
    if not lines:
        return []
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    align: list[Callable[[str, int], str]] = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    return ["  ".join(align[i](cell, widths[i]) for i, cell in enumerate(row)).rstrip() for row in lines]
