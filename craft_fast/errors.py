"""Errors that a user meets: what, where, why, and the next command to type."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; listed in ``craft-fast --help`` and tested."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 3
    ENVIRONMENT = 4
    RESOURCE = 5
    INTEGRITY = 6
    QUALITY = 7
    SIGINT = 130
    SIGTERM = 143


def closest(word: str, known: Iterable[str]) -> str:
    """``did you mean kohya? `` with the one of ``known`` that looks most like ``word``; empty where none does."""
    import difflib  # 4 ms, and only who mistypes waits for them

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


class CraftError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what went wrong, one sentence.
        where: the file, setting or record it happened at.
        why: the cause, with the value found and what is allowed.
        hint: the next command to type, or the setting to change.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        lines += [
            f"  {label}: {text}"
            for label, text in (("where", self.where), ("why", self.why), ("hint", self.hint))
            if text
        ]
        return "\n".join(lines)


class UsageError(CraftError):
    """A command line that cannot be carried out as typed."""

    exit_code = ExitCode.USAGE


class ConfigError(CraftError):
    """Settings, or a prompt file, that do not hold what they must."""

    exit_code = ExitCode.CONFIG


class EnvironmentProblem(CraftError):
    """A package, driver, model file or server that is needed and not there."""

    exit_code = ExitCode.ENVIRONMENT


class ResourceError(CraftError):
    """Out of memory or out of disk."""

    exit_code = ExitCode.RESOURCE


class IntegrityError(CraftError):
    """A file that is corrupt, hostile, or not what its record says."""

    exit_code = ExitCode.INTEGRITY


class QualityGateError(CraftError):
    """The run finished but did not meet the quality the user asked for."""

    exit_code = ExitCode.QUALITY


class Interrupted(CraftError):
    """A signal asked the run to stop; everything done so far is saved."""

    def __init__(self, what: str, *, exit_code: ExitCode = ExitCode.SIGINT, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.exit_code = exit_code
