"""The authors' packages in environments of their own, made by the command that users type.

CRAFT_PARITY_TORCH=2.14.1 chooses their torch; CRAFT_PARITY_ENVS=DIR keeps them there (6 GiB each) for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import craft_cli
import craft_fast
import craft_kernels
from craft_fast.rewards.packages import environments
from craft_fast.rewards.packages.environments import Environment


@pytest.fixture(scope="session")
def packages_root() -> Iterator[Path]:
    """Where the environments are; the ones that nobody asked to keep are removed."""
    kept = os.environ.get("CRAFT_PARITY_ENVS")
    root = Path(kept).absolute() if kept else Path(tempfile.mkdtemp(prefix="craft-parity-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAFT_FAST_PACKAGES", str(root))
        yield root
    if not kept:
        shutil.rmtree(root)


def _install(package: str, root: Path) -> Environment:
    """Make an environment; the tests that need it are skipped where this machine cannot."""
    roots = {str(Path(p).parent) for module in (craft_fast, craft_cli, craft_kernels) for p in module.__path__}
    torch = os.environ.get("CRAFT_PARITY_TORCH")
    command = [sys.executable, "-m", "craft_cli", "rewards", "install", package, "--json"]
    done = subprocess.run(
        [*command, "--torch", torch] if torch else command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sorted(roots)), "CRAFT_FAST_PACKAGES": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode in (4, 5):
        told = events[-1]
        pytest.skip(f"{told['what']} {told['why'][-400:]}; {told['hint']}")
    assert done.returncode == 0, done.stderr
    return environments.need(package)


@pytest.fixture(scope="session")
def hpsv2(packages_root: Path) -> Environment:
    return _install("hpsv2", packages_root)


@pytest.fixture(scope="session")
def image_reward(packages_root: Path) -> Environment:
    return _install("image-reward", packages_root)


@pytest.fixture(scope="session")
def hpsv2_python(hpsv2: Environment) -> Path:
    return hpsv2.python


@pytest.fixture(scope="session")
def image_reward_python(image_reward: Environment) -> Path:
    return image_reward.python
