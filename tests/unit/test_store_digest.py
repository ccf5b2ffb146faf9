"""Digests of large files: hashed once, remembered across processes, and never believed when the file changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from craft_fast.store import digest


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``hashed(path, ...)``: digests as a new process would make them; ``reads`` counts files that were read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "REMEMBERED_BYTES", 1000)

    def run(*paths: Path) -> list[str]:
        monkeypatch.setattr(digest, "_file_cache", {})
        return [digest.sha256_once(path) for path in paths]

    return run


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = digest.sha256_file
    monkeypatch.setattr(digest, "sha256_file", lambda path: [seen.append(Path(path).name), original(path)][1])
    return seen


def settled(path: Path, content: bytes) -> Path:
    """A file that was written a while ago: until its change time shows it, a digest is not kept."""
    path.write_bytes(content)
    os.utime(path, ns=(1_600_000_000_000_000_000,) * 2)
    time.sleep(2.1)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that no test changes."""
    return settled(tmp_path_factory.mktemp("settled") / "large", b"a" * 2000)


def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "craft-fast" / "digests.json"


def test_a_large_file_is_read_once_by_all_processes(
    tmp_path: Path, hashed: Callable[..., list[str]], reads: list[str]
) -> None:
    path = settled(tmp_path / "large", b"a" * 2000)
    first = hashed(path, path)
    assert first == [digest.sha256_bytes(b"a" * 2000)] * 2
    assert reads == ["large"]
    assert hashed(path) == first[:1]
    assert reads == ["large"]
    [entry] = json.loads(memory(tmp_path).read_text()).values()
    assert entry["sha256"] == first[0]
    # Same size and, set back, the same modification time: the change time still tells.
    path.write_bytes(b"b" * 2000)
    os.utime(path, ns=(1_600_000_000_000_000_000,) * 2)
    assert hashed(path) == [digest.sha256_bytes(b"b" * 2000)]


def test_small_and_fresh_files_are_not_remembered(
    tmp_path: Path, hashed: Callable[..., list[str]], reads: list[str]
) -> None:
    (tmp_path / "small").write_bytes(b"a" * 999)
    (tmp_path / "fresh").write_bytes(b"a" * 2000)
    for _ in range(2):
        hashed(tmp_path / "small", tmp_path / "fresh")
    assert reads == ["small", "fresh"] * 2
    assert not memory(tmp_path).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"PATH": 3}',
        b'{"PATH": {"stamp": STAMP, "sha256": 1}}',
        b'{"PATH": {"stamp": STAMP, "sha256": "zz"}}',
        b'{"PATH": {"stamp": [1, 2, 3, 4], "sha256": "SHA"}}',
    ],
)
def test_a_broken_memory_is_ignored_and_written_anew(
    content: bytes, large: Path, tmp_path: Path, hashed: Callable[..., list[str]], reads: list[str]
) -> None:
    path = large
    stamp = json.dumps(list(digest._stamp(path))).encode()
    content = content.replace(b"PATH", str(path).encode()).replace(b"STAMP", stamp).replace(b"SHA", b"0" * 64)
    memory(tmp_path).parent.mkdir(parents=True)
    memory(tmp_path).write_bytes(content)
    expected = [digest.sha256_bytes(b"a" * 2000)]
    assert hashed(path) == expected
    assert hashed(path) == expected
    assert reads == ["large"]


def test_a_cache_folder_that_cannot_be_written_costs_time_alone(
    large: Path, tmp_path: Path, hashed: Callable[..., list[str]], reads: list[str]
) -> None:
    path = large
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert hashed(path) == hashed(path)
    assert reads == ["large"] * 2
