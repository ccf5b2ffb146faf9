"""Content digests: sha256 hex everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from craft_fast.errors import EnvironmentProblem

_DIGESTED_SUFFIXES = {".safetensors", ".json", ".txt"}
_file_cache: dict[tuple[str, int, int], str] = {}


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

    A file's hash is remembered within the process by its path, size and mtime, so a second call reads nothing.

    Raises:
        EnvironmentProblem: there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise EnvironmentProblem(
            "There is no such model folder", where=str(path), hint="check the path in the settings"
        )
    files = sorted(file for file in root.rglob("*") if file.suffix in _DIGESTED_SUFFIXES and file.is_file())
    return digest_json([[file.relative_to(root).as_posix(), _sha256_cached(file)] for file in files])


def _sha256_cached(path: Path) -> str:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _file_cache:
        _file_cache[key] = sha256_file(path)
    return _file_cache[key]
