"""Every exception becomes a message and the right exit code; a traceback only on demand."""

from __future__ import annotations

import errno
import json
import sqlite3

import pytest
import torch
import typer

from craft_cli.guard import guard, translate
from craft_fast.errors import (
    ConfigError,
    CraftError,
    EnvironmentProblem,
    ExitCode,
    IntegrityError,
    Interrupted,
    QualityGateError,
    ResourceError,
    UsageError,
)


def _code(error: BaseException, **kwargs: bool) -> int:
    @guard
    def command(as_json: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command(**kwargs)
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CraftError("x"), 1),
        (UsageError("x"), 2),
        (ConfigError("x"), 3),
        (EnvironmentProblem("x"), 4),
        (ModuleNotFoundError("No module named 'foo'", name="foo"), 4),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 4),
        (ResourceError("x"), 5),
        (MemoryError(), 5),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 5),
        (sqlite3.OperationalError("database or disk is full"), 5),
        (IntegrityError("x"), 6),
        (QualityGateError("x"), 7),
        (Interrupted("x"), 130),
        (Interrupted("x", exit_code=ExitCode.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("boom"), 1),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert _code(error) == code


def test_all_four_parts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _code(ConfigError("The thing is wrong", where="a.yaml", why="found 3", hint="craft-fast init"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: The thing is wrong\n  where: a.yaml\n  why: found 3\n  hint: craft-fast init\n"


def test_an_unforeseen_error_is_one_line_and_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    _code(ValueError("boom\nsecond line\nthird"))
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "Error: Unexpected ValueError: boom"
    assert "CRAFT_DEBUG=1" in err
    assert "Traceback" not in err
    assert "second line" not in err


def test_the_traceback_is_shown_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_DEBUG", "1")
    assert _code(ValueError("boom")) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "ValueError: boom" in err


def test_a_script_gets_the_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    _code(ConfigError("wrong", where="here"), as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert (row["event"], row["what"], row["where"], row["exit_code"]) == ("error", "wrong", "here", 3)


def test_an_error_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _code(ConfigError("bad prompt", why="found \x1b[2J\x1b]0;owned\x07 \u202egnp.exe"))
    err = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(err)
    assert "\\x1b[2J" in err


def test_out_of_memory_names_settings_that_exist() -> None:
    from craft_fast.settings_io import load_settings

    hint = translate(MemoryError()).__dict__["hint"]
    words = [word.strip(";,:") for word in hint.split()]
    load_settings("tiny", None, [word for word in words if "=" in word])
    assert sum("=" in word for word in words) >= 3
