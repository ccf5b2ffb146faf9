"""Checkpoints are there whole or not at all, and a damaged one never counts."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast import checkpoint
from craft_fast.errors import ResourceError
from craft_fast.progress import Silent
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import Run, open_run

KEY, OTHER = "a" * 64, "b" * 64


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def save(run: Run, step: int, *, key: str = KEY, keep: int = 2) -> Path:
    return checkpoint.save(
        run, key=key, step=step, adapter={"w": torch.full((2, 3), float(step))},
        optimizer={"w.state1": torch.arange(6, dtype=torch.uint8), "w.step": torch.tensor(step)},
        meta={"losses": [0.1, None, 1 / 3]}, keep=keep,
    )  # fmt: skip


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.path("checkpoints").iterdir())


def test_round_trip(run: Run) -> None:
    folder = save(run, 50)
    assert folder.name == "step-000050"
    found = checkpoint.latest(run, KEY)
    assert found is not None
    assert found.step == 50
    assert torch.equal(found.adapter["w"], torch.full((2, 3), 50.0))
    assert torch.equal(found.optimizer["w.state1"], torch.arange(6, dtype=torch.uint8))
    assert found.optimizer["w.step"].dtype == torch.int64
    assert found.meta["losses"] == [0.1, None, 1 / 3]


def test_complete_json_holds_the_digest_of_each_file(run: Run) -> None:
    folder = save(run, 1)
    record = json.loads((folder / "COMPLETE.json").read_text())
    files = {path.name for path in folder.iterdir()}
    assert files == {"adapter.safetensors", "optimizer.safetensors", "state.json", "COMPLETE.json"}
    assert record["files"] == {name: sha256_file(folder / name) for name in files - {"COMPLETE.json"}}


def test_only_the_newest_are_kept_and_the_manifest_agrees(run: Run) -> None:
    for step in (10, 20, 30):
        save(run, step)
    assert names(run) == ["step-000020", "step-000030"]
    refs = run.manifest.files(checkpoint.FILES_KIND, KEY)
    assert len(refs) == 8
    for ref in refs.values():
        assert sha256_file(run.path(ref.path)) == ref.sha256
        assert run.path(ref.path).stat().st_size == ref.size


def test_another_key_is_never_served_and_not_removed(run: Run) -> None:
    save(run, 10, key=OTHER)
    assert checkpoint.latest(run, KEY) is None
    for step in (20, 30, 40):
        save(run, step, keep=1)
    assert names(run) == ["step-000010", "step-000040"]
    found = checkpoint.latest(run, OTHER)
    assert found is not None
    assert found.step == 10


def test_same_step_of_another_key_is_replaced(run: Run) -> None:
    save(run, 10, key=OTHER)
    save(run, 10)
    assert checkpoint.latest(run, OTHER) is None
    assert run.manifest.files(checkpoint.FILES_KIND, OTHER) == {}
    assert checkpoint.latest(run, KEY) is not None


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoint_gives_way_to_the_one_before(run: Run, name: str, damage: str) -> None:
    save(run, 10)
    path = save(run, 20) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data[: len(data) // 2] if damage == "cut" else data))
    listener = Listener()
    found = checkpoint.latest(run, KEY, progress=listener)
    assert found is not None
    assert found.step == 10
    assert any("step-000020 is damaged" in line for line in listener.warnings)


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"key": 3}', b'{"key": "x", "step": 1, "files": {}}', b"[]"])
def test_unfinished_folder_does_not_count(run: Run, content: bytes | None) -> None:
    record = save(run, 10) / "COMPLETE.json"
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    assert checkpoint.latest(run, KEY) is None


def test_weights_that_are_not_finite_do_not_count(run: Run) -> None:
    save(run, 10)
    checkpoint.save(run, key=KEY, step=20, adapter={"w": torch.tensor([float("nan")])}, optimizer={}, meta={}, keep=2)
    found = checkpoint.latest(run, KEY)
    assert found is not None
    assert found.step == 10


def test_damaged_later_one_does_not_push_out_the_newly_saved(run: Run) -> None:
    save(run, 10)
    (save(run, 30) / "adapter.safetensors").write_bytes(b"junk")
    save(run, 20, keep=1)
    assert names(run) == ["step-000020"]


@pytest.mark.parametrize("room", range(7))
def test_full_disk_leaves_the_old_one_and_no_litter(run: Run, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    save(run, 10)
    written = iter(range(100))

    def write(fd: int, data: Any) -> int:
        if next(written) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data)

    monkeypatch.setattr(atomic, "_write", write)
    with pytest.raises(ResourceError, match="disk is full"):
        save(run, 20)
    monkeypatch.undo()
    assert names(run) == ["step-000010"]
    assert checkpoint.latest(run, KEY) is not None


def test_litter_of_a_killed_process_is_swept(run: Run) -> None:
    litter = run.path("checkpoints", "step-000099.tmp")
    litter.mkdir(parents=True)
    (litter / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.latest(run, KEY) is None
    save(run, 10)
    assert names(run) == ["step-000010"]


def test_a_save_killed_before_its_rows_is_settled(run: Run) -> None:
    for step in (10, 20, 30):
        save(run, step, keep=3)
    run.manifest.drop_files(
        checkpoint.FILES_KIND,
        KEY,
        [f"step-000030/{path.name}" for path in (run.path("checkpoints", "step-000030")).iterdir()],
    )
    (run.path("checkpoints", "step-000040.tmp")).mkdir()
    found = checkpoint.latest(run, KEY)
    assert found is not None
    checkpoint.settle(run, KEY, found, keep=2)
    assert names(run) == ["step-000020", "step-000030"]
    refs = run.manifest.files(checkpoint.FILES_KIND, KEY)
    assert {name.split("/")[0] for name in refs} == {"step-000020", "step-000030"}
    assert all(sha256_file(run.path(ref.path)) == ref.sha256 for ref in refs.values())


def test_a_damaged_newest_one_does_not_push_out_the_good_one(run: Run) -> None:
    save(run, 10, keep=2)
    newest = save(run, 20, keep=2)
    (newest / "adapter.safetensors").write_bytes(b"rotten")
    found = checkpoint.latest(run, KEY)
    assert found is not None
    assert found.step == 10
    checkpoint.settle(run, KEY, found, keep=1)
    again = checkpoint.latest(run, KEY)
    assert again is not None
    assert again.step == 10
