"""One file over HTTP into its ``.part``, and from there to its name. Used by ``fetching`` alone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from craft_fast.errors import IntegrityError, Interrupted
from craft_fast.progress import Progress, Task
from craft_fast.rewards import shelf
from craft_fast.rewards.catalog import Asset
from craft_fast.rewards.http_file import Again, Answer, Gone, ask, reason
from craft_fast.store import atomic

_PIECE = 256 * 1024
_TOLD_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Transfer:
    """What came.

    Attributes:
        sha256, size: of the whole file.
        url: asked for.
        revision: the commit that the server named; may be empty.
        checked: against what: ``pinned``, ``server`` or ``nothing``.
    """

    sha256: str
    size: int
    url: str
    revision: str
    checked: str


def receive(
    asset: Asset, url: str, path: Path, *, token: str | None, progress: Progress, should_stop: Callable[[], bool]
) -> Transfer:
    """Fetch one file to ``path``, going on with its ``.part`` where there is one. One attempt.

    Args:
        asset: the file.
        url: where it is.
        path: its place; the folder is there, and this process holds the file's lock.
        token: for the url's host alone.
        progress: told of bytes.
        should_stop: asked at every piece.

    Raises:
        Again: worth another attempt. Gone: the server will not give it.
        IntegrityError: another size or sha256; the part is removed. ResourceError: the disk. Interrupted: told to stop.
    """
    part, note = part_of(path), path.with_name(path.name + ".part.json")
    have = part.stat().st_size if part.is_file() else 0
    before = _read_note(note) if have else ""
    if have and not before:
        have = _drop(part, note)
    answer = ask(url, have, token)
    with contextlib.closing(answer.body):
        if have and (answer.identity != before or answer.start != have):
            # Another file than the one begun, or a server that knows no ranges and sends all of it.
            have = _drop(part, note)
        if answer.start != have:
            raise Again("what was here does not fit the server's file, beginning anew")
        _check_size(asset, answer)
        if not have:
            atomic.write_json(note, {"file": answer.identity})
        try:
            digest, size = _stream(asset, answer, part, have, progress, should_stop)
        except Gone:
            _drop(part, note)
            raise
    if answer.total is not None and size != answer.total:
        raise Again(f"the connection ended after {size:,} of {answer.total:,} bytes", size - have)
    checked = _check_digest(asset, url, answer, digest, part, note, resumed=have > 0)
    try:
        os.replace(part, path)
        atomic.sync_folder(path.parent)
        note.unlink(missing_ok=True)
    except OSError as error:
        raise atomic.disk_error(error, path) from error
    return Transfer(digest, size, url, answer.revision, checked)


def part_of(path: Path) -> Path:
    """The name under which a file grows."""
    return path.with_name(path.name + ".part")


def _check_size(asset: Asset, answer: Answer) -> None:
    if asset.exact and answer.total not in (None, asset.size):
        raise IntegrityError(
            "The server's file is not the published one.",
            where=f"{asset.source} {asset.file}",
            why=f"it has {answer.total:,} bytes, the published file {asset.size:,}",
            hint="it was changed where it is published, or HF_ENDPOINT names a mirror that has another",
        )


def _check_digest(asset: Asset, url: str, answer: Answer, digest: str, part: Path, note: Path, *, resumed: bool) -> str:
    """Compare the whole file's sha256; what it was compared with."""
    wanted = asset.sha256 or answer.sha256
    if not wanted:
        return "nothing"
    if digest == wanted:
        return "pinned" if asset.sha256 else "server"
    _drop(part, note)
    if resumed:
        # A part that a power loss left with holes has the right length; only all of it can tell.
        raise Again("what was here before did not fit, beginning anew")
    raise IntegrityError(
        "A fetched file has the wrong sha256; it was removed.",
        where=url,
        why=f"it is {digest}, {'the published file has' if asset.sha256 else 'the server says'} {wanted}",
        hint="try again later; if it stays so, the file was changed where it is published, or on the way",
    )


def _stream(
    asset: Asset, answer: Answer, part: Path, have: int, progress: Progress, should_stop: Callable[[], bool]
) -> tuple[str, int]:
    """Append the body to the part; sha256 and size of all of it."""
    digest, total, size = hashlib.sha256(), answer.total, have
    scale, unit = (10**6, "MB") if (total or asset.size) >= 10**6 else (10**3, "kB")
    label = f"{asset.repository} {asset.name}"
    with progress.task(label, None if total is None else -(-total // scale), unit) as task, _open(part, have) as file:
        meter = _Meter(task, scale)
        for piece in _begun(file, have):
            digest.update(piece)
            meter.add(len(piece))
        try:
            while piece := _read(answer, size - have):
                if not size and (why := shelf.not_a_file(piece[:512])):
                    raise Gone(f"the server answered with something else: {why}")
                _write(file, piece, part)
                digest.update(piece)
                size += len(piece)
                meter.add(len(piece))
                if should_stop():
                    raise Interrupted(
                        f"Stopped after {shelf.size_text(size)} of {asset.name}",
                        hint="they are kept; the same command continues",
                    )
        finally:
            meter.end(whole=size == total)
            _settle(file, part)
    return digest.hexdigest(), size


class _Meter:
    """Bytes to whole units of a task, now and then."""

    def __init__(self, task: Task, scale: int) -> None:
        self._task, self._scale = task, scale
        self._bytes = self._told = 0
        self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._bytes += count
        if time.monotonic() - self._last >= _TOLD_EVERY_S:
            self._last = time.monotonic()
            self._tell(self._bytes // self._scale)

    def end(self, *, whole: bool) -> None:
        self._tell(-(-self._bytes // self._scale) if whole else self._bytes // self._scale)

    def _tell(self, units: int) -> None:
        if units > self._told:
            self._task.advance(units - self._told)
            self._told = units


def _begun(file: IO[bytes], count: int) -> Iterator[bytes]:
    """The first ``count`` bytes; leaves the position at their end."""
    while count and (piece := file.read(min(_PIECE, count))):
        count -= len(piece)
        yield piece


def _read(answer: Answer, received: int) -> bytes:
    try:
        # What is there now, however little: a stop is heard at once on a slow line too.
        piece: bytes = answer.body.read1(_PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise Again(f"the connection broke ({reason(error)})", received) from error
    return piece


def _open(part: Path, have: int) -> IO[bytes]:
    try:
        return open(part, "r+b" if have else "w+b", buffering=0)
    except OSError as error:
        raise atomic.disk_error(error, part) from error


def _write(file: IO[bytes], piece: bytes, part: Path) -> None:
    view = memoryview(piece)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise atomic.disk_error(error, part) from error


def _settle(file: IO[bytes], part: Path) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise atomic.disk_error(error, part) from error


def _drop(part: Path, note: Path) -> int:
    """Forget what was begun; 0, the bytes that are here now."""
    try:
        note.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    except OSError as error:
        raise atomic.disk_error(error, part) from error
    return 0


def _read_note(note: Path) -> str:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(note.read_text(encoding="utf-8"))["file"])
    return ""
