"""Files that are there whole or not at all (design.md section 5).

Every file is written to a temporary name in its own folder, fsynced, renamed, and the folder fsynced: after a kill
or a power loss the final name holds the old content or the new one, never a part. Only then may a manifest row name
it. A full disk or a short write is a ``ResourceError``, and the temporary file is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from craft_fast.errors import CraftError, EnvironmentProblem, ResourceError

if TYPE_CHECKING:
    import torch

TEMP_SUFFIX = ".craft-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_counter = itertools.count()
_deferred = threading.local()

# The three calls that can fail on a bad disk, named so that tests can put a failing disk in their place.
_write = os.write
_fsync = os.fsync
_replace = os.replace


class Written(NamedTuple):
    """What was written: sha256 hex digest and size in bytes."""

    sha256: str
    size: int


def disk_error(error: OSError, path: Path | str) -> CraftError:
    """The ``CraftError`` that tells a user what an ``OSError`` of writing means."""
    if error.errno in _FULL:
        return ResourceError(
            "The disk is full; nothing that was reported as done is lost",
            where=str(path),
            why=os.strerror(error.errno or 0),
            hint="free some space, then type the same command again: it continues",
        )
    if error.errno in _DENIED:
        return EnvironmentProblem(
            "A file cannot be written", where=str(path), why=str(error), hint="check the folder's owner and permissions"
        )
    return ResourceError(
        "Writing a file failed", where=str(path), why=str(error), hint="check the disk, then run again"
    )


def make_folder(path: Path) -> Path:
    """Create ``path`` and its missing parents, each entry fsynced into its parent folder."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), [path, *path.parents]))
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that renames in it survive a power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> Written:
    """Write ``data`` to ``path`` atomically.

    Raises:
        ResourceError: the disk is full or the write fell short; ``path`` is as it was.
    """
    return write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Write the concatenation of ``chunks`` to ``path`` atomically; see ``write_bytes``."""
    path = Path(path)
    make_folder(path.parent)
    temp = path.with_name(f".{path.name[:100]}.{os.getpid()}-{next(_counter)}{TEMP_SUFFIX}")
    try:
        written = _write_temp(temp, chunks)
        _replace(temp, path)
        if path.parent.resolve() not in _deferred_folders():
            sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
    return written


def _write_temp(temp: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    digest, size = hashlib.sha256(), 0
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while view:
                done = _write(fd, view)
                if done <= 0:
                    raise OSError(errno.ENOSPC, "short write")
                view = view[done:]
        _fsync(fd)
        if (found := os.fstat(fd).st_size) != size:
            raise OSError(errno.EIO, f"short write: {found} of {size} bytes")
    finally:
        os.close(fd)
    return Written(digest.hexdigest(), size)


def write_text(path: Path, text: str) -> Written:
    """Write UTF-8 text atomically, line ends as they are."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Written:
    """Write ``value`` as indented JSON with sorted keys; NaN and infinity are refused."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write ``tensors`` (any shape, any device) as safetensors, the same bytes for the same content.

    The library's own writer puts ``metadata`` in an order that differs from process to process, so a file's sha256
    would not be repeatable; this one sorts it and streams the tensors one by one.

    Args:
        path: the file.
        tensors: name to tensor.
        metadata: text to text, stored in the header.
    """
    return write_chunks(path, _safetensors_chunks(tensors, metadata or {}))


def safetensors_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """sha256 and size of the file that ``write_safetensors`` would write; nothing is written."""
    digest, size = hashlib.sha256(), 0
    for chunk in _safetensors_chunks(tensors, metadata or {}):
        digest.update(chunk)
        size += memoryview(chunk).nbytes
    return Written(digest.hexdigest(), size)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256, hex, of what ``write_safetensors`` writes after the header; it does not depend on the metadata."""
    chunks = _safetensors_chunks(tensors, {})
    next(chunks)  # the header
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def safetensors_part(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, start: int, size: int
) -> bytes:
    """Bytes ``start`` to ``start + size`` of what ``write_safetensors`` would write; fewer at its end."""
    found, offset = bytearray(), 0
    for chunk in _safetensors_chunks(tensors, metadata):
        view = memoryview(chunk).cast("B")
        found += view[max(start - offset, 0) : max(start + size - offset, 0)]
        offset += len(view)
        if offset >= start + size:
            break
    return bytes(found)


def _safetensors_chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    # Widest element first, as the library does: every tensor then starts aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _raw_bytes(tensors[name])


def _dtype_name(dtype: torch.dtype) -> str:
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    return names[dtype]


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _deferred_folders() -> set[Path]:
    if not hasattr(_deferred, "folders"):
        _deferred.folders = set()
    folders: set[Path] = _deferred.folders
    return folders


class Batch:
    """Writes into one folder whose renames are fsynced together at the end; made by ``batch``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_bytes(self, name: str, data: bytes) -> Written:
        """``write_bytes`` of a file in the batch's folder."""
        return write_bytes(self.folder / name, data)

    def write_json(self, name: str, value: Any) -> Written:
        """``write_json`` of a file in the batch's folder."""
        return write_json(self.folder / name, value)

    def write_safetensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> Written:
        """``write_safetensors`` of a file in the batch's folder."""
        return write_safetensors(self.folder / name, tensors, metadata)


@contextmanager
def batch(folder: Path) -> Iterator[Batch]:
    """Write several files of ``folder`` with one folder fsync at the end.

    Inside, this module's functions, too, leave out the folder's fsync for files directly in ``folder``. Commit
    manifest rows that name the files only after the block.
    """
    resolved = make_folder(Path(folder)).resolve()
    folders = _deferred_folders()
    outermost = resolved not in folders
    folders.add(resolved)
    try:
        yield Batch(Path(folder))
    finally:
        if outermost:
            folders.discard(resolved)
    if outermost:
        try:
            sync_folder(resolved)
        except OSError as error:
            raise disk_error(error, folder) from error


def commit_folder(temp: Path, final: Path) -> None:
    """Give a finished folder its final name: fsync it, rename it, fsync the parent. A stale ``final`` is replaced."""
    try:
        sync_folder(temp)
        if final.exists():
            shutil.rmtree(final)
        _replace(temp, final)
        sync_folder(final.parent)
    except OSError as error:
        raise disk_error(error, final) from error


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; the file gets it in one write or, on a full disk, the call raises ResourceError."""
    data = memoryview((line + "\n").encode("utf-8"))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if _write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, "short write")
        finally:
            os.close(fd)
    except OSError as error:
        raise disk_error(error, path) from error


def sweep(root: Path) -> int:
    """Remove temporary files that a killed process left under ``root``; only the owner of the run's lock may call it.

    Returns:
        How many were removed.
    """
    leftovers = [path for path in root.rglob(f".*{TEMP_SUFFIX}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
