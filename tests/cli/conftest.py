"""The command as a user starts it: a process of its own, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import craft_cli
import craft_fast
import craft_kernels

Finished = subprocess.CompletedProcess[str]
Craft = Callable[..., Finished]


@pytest.fixture(scope="session")
def craft_env() -> dict[str, str]:
    """Environment of a user's shell; the three source roots are there however the tests found them."""
    roots = {str(Path(p).parent) for m in (craft_fast, craft_cli, craft_kernels) for p in m.__path__}
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("CRAFT_", "PYTHON", "TRANSFORMERS_", "DIFFUSERS_"))
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(sorted(roots)), "TERM": "dumb", "COLUMNS": "100", "LANG": "C.UTF-8"}


@pytest.fixture(scope="session")
def craft(craft_env: dict[str, str]) -> Craft:
    """``craft("run", "--quiet", cwd=folder)``: run the command to its end."""

    def call(*args: str, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 120) -> Finished:
        return subprocess.run(
            command(args),
            cwd=cwd,
            env={**craft_env, **(env or {})},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return call


@pytest.fixture(scope="session")
def craft_start(craft_env: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """``craft_start("run", cwd=folder)``: start the command and go on."""

    def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(args),
            cwd=cwd,
            env=craft_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
        )

    return start


def command(args: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "craft_cli", *args]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/one`` and ``runs/two``, finished, which their seeds set apart; tests must not change it."""
    from tests.cli.small_pair import build  # torch, which most tests here do without

    return build(tmp_path_factory.mktemp("pair"))
