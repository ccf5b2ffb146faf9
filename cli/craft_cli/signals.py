"""Ctrl-C and SIGTERM: the first asks the run to stop after the current step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from craft_fast.errors import ExitCode

_CODES = {signal.SIGINT: ExitCode.SIGINT, signal.SIGTERM: ExitCode.SIGTERM}
_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """The ``should_stop`` of the pipeline: true once a signal has arrived.

    Args:
        heard: called with a line for the user on the first signal, inside the handler.
    """

    def __init__(self, heard: Callable[[str], None]) -> None:
        self._heard = heard
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> ExitCode:
        """130 after SIGINT, 143 after SIGTERM."""
        return _CODES[self.signal] if self.signal is not None else ExitCode.SIGINT

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        arrived = signal.Signals(signum)
        if self.signal is not None:
            # No Python cleanup: every write is atomic, so there is nothing to undo and nothing to wait for.
            with suppress(OSError):
                os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"\nstopped at once; what was done is saved\n")
            os._exit(int(_CODES[arrived]))
        self.signal = arrived
        again = "Ctrl-C again stops" if arrived == signal.SIGINT else "a second signal stops"
        self._heard(f"{arrived.name}: stopping after this step and saving; {again} at once")

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM while the context lasts; the old handlers come back after it."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self.handle) for number in _CODES}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
