"""A run's folder: where its files are, who may write, and its log."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from craft_fast.errors import CraftError, EnvironmentProblem, UsageError
from craft_fast.records import FileRef
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.manifest import Manifest

MANIFEST_NAME = "manifest.sqlite"
LOG_NAME = "log.jsonl"
LOCK_NAME = ".lock"


class Run:
    """An open run folder; made by ``open_run``."""

    def __init__(self, root: Path, manifest: Manifest, *, read_only: bool = False) -> None:
        self.root = root
        self.manifest = manifest
        self.read_only = read_only

    @property
    def seed(self) -> int:
        """Root of all randomness, as the manifest holds it (0 until the pipeline has set it)."""
        return int(self.manifest.get_meta("seed") or 0)

    def path(self, *parts: str) -> Path:
        """A path inside the run's folder.

        Raises:
            CraftError: the path would leave the folder.
        """
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise CraftError("A path would leave the run's folder", where=str(path), why=f"the folder is {self.root}")
        return path

    def ref(self, path: Path) -> FileRef:
        """The record of a file in the run's folder, hashed now."""
        relative = path.resolve().relative_to(self.root.resolve()).as_posix()
        return FileRef(relative, sha256_file(path), path.stat().st_size)

    def log(self, event: str, **fields: Any) -> None:
        """Append one event to ``log.jsonl``; values that are not finite become strings, so lines stay JSON."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        atomic.append_line(self.path(LOG_NAME), json.dumps(_plain(record), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read_log(run: Run) -> list[dict[str, Any]]:
    """All whole events of ``log.jsonl``; a line that a kill cut short is left out."""
    path = run.path(LOG_NAME)
    events: list[dict[str, Any]] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


@contextmanager
def open_run(root: Path, *, create: bool = False, read_only: bool = False) -> Iterator[Run]:
    """Open a run folder; for writing, under its one-writer lock.

    Args:
        root: the folder, ``runs/<name>``.
        create: make the folder when it is not there.
        read_only: no lock, no change; works beside a writer.

    Raises:
        UsageError: there is no such run.
        CraftError: another process writes into it; the message names its pid.
    """
    root = Path(root)
    if not (root / MANIFEST_NAME).exists() and not create:
        raise UsageError(
            "There is no such run", where=str(root), why="no manifest.sqlite there", hint="craft-fast run --name NAME"
        )
    if read_only:
        manifest = Manifest(root / MANIFEST_NAME, read_only=True)
        try:
            yield Run(root, manifest, read_only=True)
        finally:
            manifest.close()
        return
    atomic.make_folder(root)
    with _lock(root / LOCK_NAME):
        atomic.sweep(root)
        _end_last_line(root / LOG_NAME)
        manifest = Manifest(root / MANIFEST_NAME)
        try:
            yield Run(root, manifest)
        finally:
            manifest.close()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise atomic.disk_error(error, path) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise CraftError(
                "Another process is writing into this run",
                where=str(path.parent),
                why=f"its process id is {owner}",
                hint="wait for it, stop it, or give this run another --name",
            ) from error
        # The lock itself is the kernel's and ends with the process, however it ends; the pid is only for the message.
        _write_pid(fd, path)
        yield
    finally:
        os.close(fd)


def _write_pid(fd: int, path: Path) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise atomic.disk_error(error, path) from error


def _end_last_line(path: Path) -> None:
    """A kill may leave half a line in the log; end it, so that the next event starts on its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read(1) == b"\n"
    if not whole:
        atomic.append_line(path, "")


def resolve_uri(uri: str) -> Path | str:
    """Where a model, a reward or a prompt file is.

    ``package:NAME/FOLDER`` is a path inside an installed package; an existing path becomes a ``Path``; a name like
    ``owner/model`` that is no path stays a string, for the hub.

    Raises:
        EnvironmentProblem: the package or the path is not there.
    """
    if uri.startswith("package:"):
        return _package_path(uri)
    path = Path(uri).expanduser()
    if path.exists():
        return path.resolve()
    if path.is_absolute() or uri.startswith((".", "~")) or uri.count("/") != 1 or path.suffix in _FILE_SUFFIXES:
        raise EnvironmentProblem("There is no such file or folder", where=uri, why=f"looked in {Path.cwd()}")
    return uri


_FILE_SUFFIXES = {".txt", ".csv", ".tsv", ".jsonl", ".json", ".safetensors", ".yaml"}


def _package_path(uri: str) -> Path:
    name, _, inside = uri.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        path = Path(location) / inside
        if path.exists():
            return path
    raise EnvironmentProblem(
        "A package's file or folder is not there",
        where=uri,
        why=f"package {name} is {'installed, without ' + inside if locations else 'not installed'}",
        hint="install it, or set the path to a folder",
    )
