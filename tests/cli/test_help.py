"""Help is documentation: every command has it, with examples that the parser itself accepts."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.errors import ExitCode
from craft_fast.pipeline import STAGES
from craft_fast.settings_io import load_settings, preset_names

COMMANDS = [
    "run",
    "init",
    "plan",
    "doctor",
    "status",
    "verify",
    *STAGES,
    "dataset",
    "compare",
    "try",
    "bench",
    "rewards",
    "lora",
]


def _help(*args: str) -> str:
    done = CliRunner().invoke(app, [*args, "--help"], prog_name="craft-fast")
    assert done.exit_code == 0
    return done.stdout


def _examples(text: str) -> list[str]:
    return re.findall(r"^ {2,4}(craft-fast .*)$", text, flags=re.MULTILINE)


def test_every_command_is_listed_once_and_in_full() -> None:
    text = _help()
    listed = re.findall(r"^  (\w+)  +\S.*$", text.partition("Commands:")[2].partition("Exit codes")[0], re.MULTILINE)
    assert listed == COMMANDS
    assert "..." not in text.partition("Commands:")[2]


def test_every_exit_code_is_listed() -> None:
    text = _help().partition("Exit codes:")[2]
    listed = [int(code) for code in re.findall(r"^ +(\d+) ", text, re.MULTILINE)]
    assert listed == [int(code) for code in ExitCode]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example ends in its command (a missing run or file), never in a usage error of the parser."""
    monkeypatch.chdir(tmp_path)
    examples = _examples(_help(command))
    assert len(examples) >= 2
    for example in examples:
        program, *args = shlex.split(example)
        assert program == "craft-fast"
        assert args[0] == command
        done = CliRunner().invoke(app, [*args, "--help"], prog_name="craft-fast")
        assert done.exit_code == 0, f"{example}\n{done.output}"
        settings = [value for flag, value in itertools.pairwise(args) if flag == "--set"]
        preset = next((value for flag, value in itertools.pairwise(args) if flag == "--preset"), "tiny")
        load_settings(preset, None, settings)


@pytest.mark.parametrize("command", [*STAGES[:3], "cache", "train", "evaluate", "run", "plan", "doctor"])
def test_commands_that_load_models_have_a_cap_and_can_leave_the_network_alone(command: str) -> None:
    text = _help(command)
    assert "--vram GIB" in text
    assert "--offline / --online" in text


@pytest.mark.parametrize("command", ["filter", "export", "report"])
def test_commands_that_need_no_gpu_have_no_cap(command: str) -> None:
    text = _help(command)
    assert "--vram" not in text
    assert "--offline / --online" in text  # the model's digest is asked for all the same


def test_all_presets_are_named() -> None:
    text = " ".join(_help("run").split())
    assert f"Settings to start from: {', '.join(preset_names())}. Default: tiny." in text


def test_no_command_prints_help() -> None:
    done = CliRunner().invoke(app, [], prog_name="craft-fast")
    assert done.exit_code == 0
    assert done.stdout.strip() == _help().strip()


def test_version() -> None:
    from craft_fast import __version__

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"craft-fast {__version__}\n")
