"""Training states that are there whole or not at all (design.md section 5).

``checkpoints/step-000050/`` holds ``adapter.safetensors``, ``optimizer.safetensors``, ``state.json`` and, written last,
``COMPLETE.json`` with the sha256 of each. It is built as ``step-000050.tmp`` and renamed. There is no random state to
save: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.progress import Progress, Silent
from craft_fast.records import FileRef
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import Run
from craft_fast.store.safe_load import load_safetensors

FILES_KIND = "checkpoint"
COMPLETE = "COMPLETE.json"
_FILES = {"adapter.safetensors", "optimizer.safetensors", "state.json"}
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified training state.

    Attributes:
        step: optimizer steps done.
        folder: where it was read from.
        adapter: the trained tensors by name.
        optimizer: see ``craft_fast.qlora.optim.optimizer_tensors``.
        meta: the rest of the state, from ``state.json``.
    """

    step: int
    folder: Path
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    run: Run,
    *,
    key: str,
    step: int,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint and, once it is complete, remove all but the ``keep`` newest of the same key.

    Args:
        run: the open run.
        key: the train stage's key; a checkpoint never serves another one.
        step: optimizer steps done.
        adapter: trained tensors.
        optimizer: optimizer state.
        meta: JSON values.
        keep: checkpoints kept, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: the disk is full; older checkpoints are untouched.
    """
    final = run.path("checkpoints", f"step-{step:06d}")
    temp = final.with_name(final.name + ".tmp")
    _sweep(final.parent)
    try:
        refs = _write(temp, key, step, adapter, optimizer, meta)
        _forget(run, final)
        atomic.commit_folder(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    _register(run, key, final, refs)
    # What claims a later step than the one just saved was passed over as damaged when training resumed.
    later = [folder for folder, record in _complete(run, key) if int(record["step"]) > step]
    _remove(run, later)
    _remove(run, [folder for folder, _ in _complete(run, key)][keep:])
    return final


def settle(run: Run, key: str, found: Checkpoint, *, keep: int) -> None:
    """Finish what a killed ``save`` left undone: half-written folders, rows of a complete one, folders beyond ``keep``.

    Args:
        run: the open run.
        key: the train stage's key.
        found: the newest checkpoint that verified; it and the ``keep - 1`` before it stay.
        keep: checkpoints kept.
    """
    _sweep(run.path("checkpoints"))
    known = run.manifest.files(FILES_KIND, key)
    for folder, record in reversed(list(_complete(run, key))):
        if int(record["step"]) <= found.step and f"{folder.name}/{COMPLETE}" not in known:
            written = {name: atomic.Written(sha256, _size(folder / name)) for name, sha256 in record["files"].items()}
            written[COMPLETE] = atomic.Written(sha256_file(folder / COMPLETE), _size(folder / COMPLETE))
            _register(run, key, folder, written)
    # Counted from the one that verified: a damaged newer one must not push out the good one.
    _remove(run, [folder for folder, record in _complete(run, key) if int(record["step"]) <= found.step][keep:])


def latest(run: Run, key: str, *, progress: Progress | None = None) -> Checkpoint | None:
    """The newest checkpoint of ``key`` whose files are what was written; damaged ones are passed over, and said so.

    Args:
        run: the open run.
        key: the train stage's key.
        progress: told about damaged ones.
    """
    progress = progress or Silent()
    for folder, record in _complete(run, key):
        try:
            return _read(folder, record)
        except IntegrityError as error:
            progress.warn(
                f"Checkpoint {folder.name} is damaged and passed over: {error.where}: {error.what} {error.why}"
            )
    return None


def _write(
    temp: Path,
    key: str,
    step: int,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> dict[str, atomic.Written]:
    with atomic.batch(temp) as batch:
        written = {
            "adapter.safetensors": batch.write_safetensors("adapter.safetensors", adapter),
            "optimizer.safetensors": batch.write_safetensors("optimizer.safetensors", optimizer),
            "state.json": batch.write_json("state.json", {**meta, "step": step}),
        }
        record = {"key": key, "step": step, "files": {name: item.sha256 for name, item in written.items()}}
        written[COMPLETE] = batch.write_json(COMPLETE, record)
    return written


def _read(folder: Path, record: Mapping[str, Any]) -> Checkpoint:
    files = record["files"]
    state = folder / "state.json"
    if not state.is_file() or sha256_file(state) != files["state.json"]:
        raise IntegrityError("A file is missing or not what was written.", where=str(state))
    meta = json.loads(state.read_text(encoding="utf-8"))
    return Checkpoint(
        step=int(record["step"]),
        folder=folder,
        adapter=load_safetensors(folder / "adapter.safetensors", expect_sha256=files["adapter.safetensors"]),
        optimizer=load_safetensors(folder / "optimizer.safetensors", expect_sha256=files["optimizer.safetensors"]),
        meta=meta,
    )


def _complete(run: Run, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders of ``key`` that say they are complete, newest first, with what their ``COMPLETE.json`` says."""
    root = run.path("checkpoints")
    folders = [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
    for folder in sorted(folders, key=lambda path: int(path.name[5:]), reverse=True):
        record = _record(folder)
        if record is not None and record["key"] == key:
            yield folder, record


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        whole = isinstance(record["key"], str) and set(record["files"]) == _FILES and int(record["step"]) >= 0
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _register(run: Run, key: str, folder: Path, refs: Mapping[str, atomic.Written]) -> None:
    rows = {f"{folder.name}/{name}": _ref(run, folder / name, *written) for name, written in refs.items()}
    run.manifest.put_files(FILES_KIND, key, rows)


def _remove(run: Run, folders: Sequence[Path]) -> None:
    for old in folders:
        _forget(run, old)
        # Away under one rename: a kill while files are removed must not leave half a checkpoint under its name.
        doomed = old.with_name(old.name + ".tmp")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(run: Run, folder: Path) -> None:
    """Drop the manifest's rows of a folder that is about to go, whichever key it was saved under."""
    record = _record(folder)
    if record is not None:
        run.manifest.drop_files(
            FILES_KIND, record["key"], [f"{folder.name}/{name}" for name in [*record["files"], COMPLETE]]
        )


def _sweep(root: Path) -> None:
    """Remove what a killed process left half-written; the run's lock makes sure that nobody is writing it now."""
    for temp in root.glob("step-*.tmp"):
        shutil.rmtree(temp, ignore_errors=True)


def _ref(run: Run, path: Path, sha256: str, size: int) -> FileRef:
    return FileRef(path.relative_to(run.root).as_posix(), sha256, size)
