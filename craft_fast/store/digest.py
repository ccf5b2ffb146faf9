"""Content digests: sha256 hex everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from craft_fast.errors import CraftError, EnvironmentProblem
from craft_fast.store import atomic

# Hashing takes about a second per GB. Of files this large the result is kept for later processes too.
REMEMBERED_BYTES = 256 * 1024**2
_MOST_REMEMBERED = 500
_DIGESTED_SUFFIXES = {".safetensors", ".json", ".txt"}
_file_cache: dict[tuple[str | int, ...], str] = {}


def sha256_bytes(data: bytes) -> str:
    """Sha256 of ``data``, hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Sha256 of a file's content, hex; always read from the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(obj: Any) -> str:
    """Sha256 of ``obj`` as canonical JSON: sorted keys, no spaces, no NaN; tuples count as lists."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256_bytes(text.encode())


def digest_folder(path: Path | str) -> str:
    """Digest of a model folder: names and content of all its ``*.safetensors``, ``*.json`` and ``*.txt`` files.

    Files are hashed once, see ``sha256_once``.

    Raises:
        EnvironmentProblem: there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise EnvironmentProblem(
            "There is no such model folder", where=str(path), hint="check the path in the settings"
        )
    files = sorted(file for file in root.rglob("*") if file.suffix in _DIGESTED_SUFFIXES and file.is_file())
    return digest_files(root, files)


def digest_files(root: Path, files: Iterable[Path]) -> str:
    """Digest of names below ``root`` and content of the given files, in the given order."""
    return digest_json([[file.relative_to(root).as_posix(), sha256_once(file)] for file in files])


def sha256_once(path: Path | str) -> str:
    """Sha256 of a file's content, hex; read again only when its path, size, times or inode changed.

    Remembered within the process, and for files from ``REMEMBERED_BYTES`` on across processes, in
    ``craft-fast/digests.json`` of the user's cache folder (``XDG_CACHE_HOME``).
    """
    path = Path(path).resolve()
    stamp = _stamp(path)
    key: tuple[str | int, ...] = (str(path), *stamp)
    if key not in _file_cache:
        _file_cache[key] = _known(path, stamp) or _hash(path, stamp)
    return _file_cache[key]


def _stamp(path: Path) -> tuple[int, ...]:
    # The change time too: a copy tool can set the modification time back, but not this one.
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft-fast" / "digests.json"


def _remembered() -> dict[str, Any]:
    """What earlier processes found; nothing where the file is missing or broken."""
    with contextlib.suppress(OSError, ValueError, RecursionError, RuntimeError):
        known = json.loads(_memory().read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def _known(path: Path, stamp: tuple[int, ...]) -> str | None:
    if stamp[0] < REMEMBERED_BYTES:
        return None
    entry = _remembered().get(str(path))
    if not isinstance(entry, dict) or entry.get("stamp") != list(stamp):
        return None
    found = entry.get("sha256")
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _hash(path: Path, stamp: tuple[int, ...]) -> str:
    found = sha256_file(path)
    # A file that is being written, or was within the clock's coarseness, may change without its times showing it.
    settled = time.time_ns() - max(stamp[1], stamp[2]) > 2_000_000_000
    if stamp[0] >= REMEMBERED_BYTES and settled and _stamp(path) == stamp:
        # Losing this costs time and nothing else.
        with contextlib.suppress(CraftError, OSError, RuntimeError):
            known = _remembered() | {str(path): {"stamp": list(stamp), "sha256": found}}
            atomic.write_json(_memory(), dict(list(known.items())[-_MOST_REMEMBERED:]))
    return found
