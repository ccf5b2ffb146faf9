"""Atomic writes: the order of fsync and rename, full disks, short writes, and bytes that repeat."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from craft_fast.errors import EnvironmentProblem, ExitCode, ResourceError
from craft_fast.store import atomic


class Recorder:
    """Passes the file calls on and keeps their order; ``fail_at`` makes the n-th write fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}
        monkeypatch.setattr(atomic, "_write", self.write)
        monkeypatch.setattr(atomic, "_fsync", self.fsync)
        monkeypatch.setattr(atomic, "_replace", self.replace)

    @staticmethod
    def _name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def write(self, fd: int, data: memoryview) -> int:
        self.calls.append(("write", self._name(fd)))
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        self.calls.append(("fsync", self._name(fd)))
        os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        self.calls.append(("replace", target.name))
        os.replace(source, target)


def test_order_is_write_fsync_rename_fsync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    written = atomic.write_bytes(tmp_path / "a.bin", b"abc")
    kinds = [kind for kind, _ in recorder.calls]
    assert kinds == ["write", "fsync", "replace", "fsync"]
    assert recorder.calls[0][1] == recorder.calls[1][1]
    assert recorder.calls[0][1].endswith(atomic.TEMP_SUFFIX)
    assert recorder.calls[2][1] == "a.bin"
    assert recorder.calls[3][1] == tmp_path.name
    assert written == (hashlib.sha256(b"abc").hexdigest(), 3)


def test_new_folders_are_synced_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    atomic.make_folder(tmp_path / "x" / "y")
    assert recorder.calls == [("fsync", tmp_path.name), ("fsync", "x")]


def test_batch_syncs_its_folder_once_and_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with atomic.batch(tmp_path) as batch:
        for name in ("a", "b", "c"):
            batch.write_bytes(name, b"1")
        atomic.write_text(tmp_path / "d", "x")
    assert [call for call in recorder.calls if call == ("fsync", tmp_path.name)] == [("fsync", tmp_path.name)]
    assert recorder.calls[-1] == ("fsync", tmp_path.name)
    assert len([call for call in recorder.calls if call[0] == "fsync"]) == 5
    atomic.write_bytes(tmp_path / "e", b"1")
    assert recorder.calls[-1] == ("fsync", tmp_path.name)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_write", lambda fd, data: os.write(fd, data[:7]))
    content = bytes(range(256))
    atomic.write_bytes(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("where", ["_write", "_fsync", "_replace"])
def test_a_full_disk_leaves_the_old_file_and_no_temp(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    atomic.write_bytes(path, b"old")

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, where, full)
    with pytest.raises(ResourceError) as caught:
        atomic.write_bytes(path, b"new")
    assert caught.value.exit_code == ExitCode.RESOURCE
    assert "same command" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_takes_nothing_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_write", lambda fd, data: 0)
    with pytest.raises(ResourceError):
        atomic.write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == []


def test_a_write_that_lies_about_its_length_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_write", lambda fd, data: os.write(fd, data[:-1]) + 1)
    with pytest.raises(ResourceError, match="failed"):
        atomic.write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == []


def test_file_size_limit_of_the_kernel_is_a_resource_error(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(ResourceError):
            atomic.write_bytes(tmp_path / "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_dev_full_is_a_resource_error() -> None:
    with pytest.raises(ResourceError):
        atomic.append_line(Path("/dev/full"), "x")


def test_a_folder_that_may_not_be_written_is_an_environment_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(atomic, "_replace", denied)
    with pytest.raises(EnvironmentProblem):
        atomic.write_bytes(tmp_path / "a", b"x")


def test_commit_folder_syncs_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp, final = tmp_path / "step.tmp", tmp_path / "step"
    atomic.write_bytes(temp / "a", b"1")
    atomic.write_bytes(final / "stale", b"1")
    recorder = Recorder(monkeypatch)
    atomic.commit_folder(temp, final)
    assert recorder.calls == [("fsync", "step.tmp"), ("replace", "step"), ("fsync", tmp_path.name)]
    assert os.listdir(final) == ["a"]
    assert not temp.exists()


def test_sweep_removes_only_leftovers(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "sub" / "keep.bin", b"1")
    (tmp_path / "sub" / f".keep.bin.1-1{atomic.TEMP_SUFFIX}").write_bytes(b"half")
    assert atomic.sweep(tmp_path) == 1
    assert os.listdir(tmp_path / "sub") == ["keep.bin"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a.json", {"x": float("nan")})


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def test_safetensors_round_trip_of_every_shape_and_dtype(tmp_path: Path) -> None:
    tensors = {f"t{i}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["strided"] = torch.randn(4, 6).t()[1:]
    path = tmp_path / "a.safetensors"
    written = atomic.write_safetensors(path, tensors, {"b": "1", "a": "é"})
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes(loaded[name].reshape(-1).view(torch.uint8)) == bytes(
            tensor.contiguous().reshape(-1).view(torch.uint8)
        )
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "é", "b": "1"}
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_bytes_do_not_depend_on_process_or_order(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from craft_fast.store import atomic\n"
        "t = {'b': torch.arange(4.), 'a': torch.zeros(3, dtype=torch.bfloat16)}\n"
        "m = {k: k for k in 'zyxwv'}\n"
        "print(atomic.write_safetensors(Path(sys.argv[1]), t, m).sha256)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "one.safetensors")]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.arange(4.0)}
    here = atomic.write_safetensors(tmp_path / "two.safetensors", tensors, {k: k for k in "vwxyz"})
    assert here.sha256 == other
