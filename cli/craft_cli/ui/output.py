"""The three ways to talk: to a person, to a script (``--json``), to nobody (``--quiet``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from craft_cli.ui.sinks import JsonLines, Plain, Quiet, Sink
from craft_cli.ui.text import clean, write_line
from craft_fast.errors import CraftError, UsageError

Mode = Literal["human", "json", "quiet"]


def choose_mode(*, as_json: bool, quiet: bool) -> Mode:
    """The mode that the two flags ask for.

    Raises:
        UsageError: both were given.
    """
    if as_json and quiet:
        raise UsageError("--json and --quiet exclude each other", hint="leave one of them out")
    return "json" if as_json else "quiet" if quiet else "human"


@contextmanager
def progress(mode: Mode) -> Iterator[Sink]:
    """A sink that is closed at the end, and knows whether that was an error."""
    sink = make_sink(mode)
    try:
        yield sink
    except BaseException:
        sink.close(finished=False)
        raise
    sink.close()


def make_sink(mode: Mode) -> Sink:
    """The sink for ``mode``: bars on a terminal that can draw, plain lines elsewhere."""
    if mode == "quiet":
        return Quiet()
    if mode == "json":
        return JsonLines(sys.stdout)
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from craft_cli.ui.bars import Bars

        return Bars(sys.stderr)
    return Plain(sys.stderr)


def print_result(mode: Mode, lines: list[str], data: dict[str, Any], *, event: str) -> None:
    """A command's result on stdout: ``lines`` for a person, one JSON object for a script."""
    if mode == "json":
        JsonLines(sys.stdout).emit(event, **data)
    elif mode == "human":
        for line in lines:
            write_line(sys.stdout, clean(line))


def print_error(error: CraftError, *, as_json: bool = False) -> None:
    """What, where, why and hint on stderr; for a script also one JSON object on stdout."""
    if as_json:
        code = int(error.exit_code)
        parts = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
        JsonLines(sys.stdout).emit("error", exit_code=code, **parts)
    write_line(sys.stderr, f"Error: {clean(str(error))}")
