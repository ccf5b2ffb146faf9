"""Benchmark rows (docs/design.md section 7): their fields, where they stand, and how they get into a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from craft_fast.errors import CraftError, EnvironmentProblem, ResourceError

Row = dict[str, Any]

FIELDS = (
    "suite", "name", "impl", "case", "dtype", "mode", "p20_ms", "p50_ms", "p80_ms", "gbps", "copy_fraction",
    "peak_gib", "versus", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
MORE_FIELDS = (
    "size", "unit", "bytes", "floor_ms", "copy_gbps", "host_us", "graph_ms", "saved_gib", "checked", "failed",
    "device_name", "run",
)  # fmt: skip
COMMIT = "CRAFT_BENCH_COMMIT"
_MAKERS = {"nvidia", "geforce", "tesla", "quadro", "amd", "instinct"}


def blank_row(**known: Any) -> Row:
    """A row with every field; what is not given is null.

    Raises:
        KeyError: a field that rows do not have.
    """
    row: Row = dict.fromkeys((*FIELDS, *MORE_FIELDS))
    for name, value in known.items():
        if name not in row:
            raise KeyError(name)
        row[name] = value
    return row


def device_slug(name: str) -> str:
    """Short name of a device for file names: ``h100`` of "NVIDIA H100 80GB HBM3", ``rtx4090``, ``cpu``."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _MAKERS]
    if not words:
        return "gpu"
    return words[0] + words[1] if words[0] in ("rtx", "gtx", "arc") and len(words) > 1 else words[0]


def environment(device_type: str) -> Row:
    """What every row of a run says of where it was measured."""
    import torch

    name = torch.cuda.get_device_name() if device_type == "cuda" else _processor()
    now = datetime.datetime.now(datetime.UTC)
    return {
        "device": device_slug(name) if device_type == "cuda" else "cpu",
        "device_name": name,
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "commit": commit(),
        "date": f"{now:%Y-%m-%d}",
        "run": f"{now:%Y-%m-%dT%H:%M:%SZ}",
    }


def commit() -> str | None:
    """The checkout's commit, with ``+`` where sources differ from it; None if that cannot be known.

    ``CRAFT_BENCH_COMMIT`` names it where the sources travelled without their history.
    """
    here = Path(__file__).resolve().parent
    try:
        # The wheel may lie in an environment inside of somebody else's checkout: only a tracked file has a commit.
        if _git(here, "log", "-1", "--format=%h", "--", "registry.py"):
            found = _git(here, "rev-parse", "--short", "HEAD")
            sources = ("bench/craft_bench", "kernels", "craft_fast")
            top = Path(_git(here, "rev-parse", "--show-toplevel"))
            return found + ("+" if _git(top, "status", "--porcelain", "--", *sources) else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return os.environ.get(COMMIT) or None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    try:
        from triton import __version__
    except ImportError:
        return None
    return str(__version__)


class RowFile:
    """Rows appended to a JSONL file; each is on the disk before the next one is measured.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end_a_torn_line()
        except OSError as error:
            raise _disk_error(error, path) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            ResourceError: the disk is full.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise _disk_error(error, self.path) from error

    def _end_a_torn_line(self) -> None:
        """After a power loss the last line may be cut off; the next row must not become part of it."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._file)


def _disk_error(error: OSError, path: Path) -> CraftError:
    hint = "the rows written so far are whole; choose another folder with --out"
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError):
        return EnvironmentProblem("Rows cannot be written", where=str(path), why=str(error.strerror), hint=hint)
    return ResourceError("Rows cannot be written", where=str(path), why=str(error.strerror), hint=hint)
