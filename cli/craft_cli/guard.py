"""Every exception becomes a message a person can act on, and the right exit code."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from craft_cli.ui.output import print_error
from craft_fast.errors import CraftError, EnvironmentProblem, ExitCode, Interrupted, ResourceError

P = ParamSpec("P")
R = TypeVar("R")

_MEMORY_HINT = (
    "smaller batches: --set generate.batch_size=8 --set train.micro_batch_size=4; "
    "less to keep: --set train.gradient_checkpointing=all, a lower train.rank. The same command continues"
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def guard(command: Callable[P, R]) -> Callable[P, R]:
    """Run ``command``; print any error as what, where, why, hint and exit with its code.

    A traceback is printed only with ``CRAFT_DEBUG=1``.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            _tell(Interrupted("Stopped by Ctrl-C", hint="what was done is saved; the same command continues"), error)
            raise typer.Exit(int(ExitCode.SIGINT)) from None
        except Exception as error:
            told = translate(error)
            _tell(told, error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(int(told.exit_code)) from None

    return guarded


def _tell(told: CraftError, error: BaseException, *, as_json: bool = False) -> None:
    if os.environ.get("CRAFT_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    print_error(told, as_json=as_json)


def translate(error: Exception) -> CraftError:
    """The error to show for ``error``; one that nobody foresaw is exit code 1 with how to see more."""
    if isinstance(error, CraftError):
        return error
    reason = _first_line(error)
    if _is_out_of_memory(error):
        return ResourceError("Out of memory", why=reason, hint=_MEMORY_HINT)
    if _is_disk_full(error):
        where = str(getattr(error, "filename", None) or "")
        return ResourceError(
            "No space left on the disk",
            where=where,
            why=reason,
            hint="free some space; what was done is saved and the same command continues",
        )
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentProblem(f"A package is missing: {error.name}", why=reason, hint=f"pip install {error.name}")
    if isinstance(error, OSError) and error.filename is not None:
        return EnvironmentProblem(
            "A file cannot be used",
            where=str(error.filename),
            why=error.strerror or reason,
            hint="check the path and its permissions",
        )
    return CraftError(
        f"Unexpected {type(error).__name__}: {reason}",
        hint="CRAFT_DEBUG=1 before the same command shows the traceback; please report it",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or _is_a(error, "torch", "OutOfMemoryError"):
        return True
    # The CPU allocator of torch has no exception of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return _is_a(error, "sqlite3", "Error") and "disk is full" in str(error)


def _is_a(error: Exception, module: str, kind: str) -> bool:
    """Whether ``error`` is of a class of a module; one that was never imported cannot have raised it."""
    found: Any = getattr(sys.modules.get(module), kind, None)
    return isinstance(found, type) and isinstance(error, found)
