"""A disk that fills up: exit code 5, nothing lost, and the same command afterwards ends in the same bits."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.crash, pytest.mark.slow]


def test_a_disk_that_fills_up_again_and_again(world: Any) -> None:
    """Every start gets a few files further; each of them ends in the same error and loses nothing."""
    draw = random.Random(5)
    starts = 0
    while (code := world.run("full", sabotage=f"full_disk:{draw.randint(150_000, 400_000)}")) != 0:
        assert code == 5, world.output("full")
        assert world.bad_checks("full") == []
        assert not list(world.root("full").rglob("*.craft-tmp")), "a temporary file was left on a full disk"
        starts += 1
        assert starts < 40
    assert starts >= 4
    assert "same command" in world.output("full")
    assert world.differences("full") == []


@pytest.mark.parametrize("size", [20_000, 60_000, 150_000])
def test_the_kernels_file_size_limit(size: int, world: Any) -> None:
    name = f"limit-{size}"
    assert world.run(name, sabotage=f"file_limit:{size}") == 5, world.output(name)
    assert world.bad_checks(name) == []
    assert world.run(name) == 0, world.output(name)
    assert world.differences(name) == []


def test_a_real_small_disk(world: Any, tmp_path: Path) -> None:
    disk = world.root("small-disk")
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here; the limits above stand in for it")
    try:
        for size in ("300k", "420k", "600k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            assert world.run("small-disk") == 5, world.output("small-disk")
            assert world.bad_checks("small-disk") == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert world.run("small-disk") == 0, world.output("small-disk")
        assert world.differences("small-disk") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
