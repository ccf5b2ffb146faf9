"""What pictures were once given, kept for the user: scores by picture, text and reward, in one SQLite file.

``craft-fast rewards score`` puts every finished batch here, so that the same command again goes on where it was
stopped and costs nothing once all is known. No picture and no text is kept, only digests of them. The file is a help
and never a must: where it cannot be used, that is said and scores are kept in memory instead. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from craft_fast.records import Provenance
from craft_fast.store.digest import digest_json

MOST_ROWS = 5_000_000  # about 100 bytes each with their index, so at most half a GB
_VERSION = 1
_KEYS_A_QUERY = 500  # SQLite allowed 999 variables in a statement before 3.32
_SCHEMA = f"""
CREATE TABLE scores (
    ord INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, score REAL NOT NULL,
    tokens_cut INTEGER NOT NULL, width_px INTEGER NOT NULL, height_px INTEGER NOT NULL
);
PRAGMA user_version = {_VERSION};
"""

Pair = tuple[str, str]
"""sha256 of a picture's file, hex, and the text it is judged against."""


class Judgement(NamedTuple):
    """One score with what only a look at the picture and the text tells.

    Attributes:
        score: float32 value.
        tokens_cut: tokens of the text that the reward did not see.
        width_px, height_px: of the picture, upright.
    """

    score: float
    tokens_cut: int
    width_px: int
    height_px: int


class _OtherVersionError(Exception):
    """The file is whole, and not of this program's layout."""


def memory_path() -> Path:
    """Where scores are kept: ``craft-fast/scores.sqlite`` in the user's cache folder (``XDG_CACHE_HOME``).

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft-fast" / "scores.sqlite"


def reward_digest(key: str, provenance: Provenance) -> str:
    """What a score is kept under beside picture and text: the reward's key and how its scores come about here."""
    return digest_json([key, asdict(provenance)])


class ScoreMemory:
    """Scores of earlier commands; several processes may use one file at the same time.

    WAL with synchronous=NORMAL: what was put survives a kill of the process; a power loss may take the last batches.

    Args:
        path: the SQLite file, made when missing; None: keep nothing beyond this process.
        most_rows: beyond so many the oldest are dropped.
        warn: told, once each, why the file is not used, or that it was set aside.
    """

    def __init__(
        self, path: Path | None, *, most_rows: int = MOST_ROWS, warn: Callable[[str], None] = lambda _text: None
    ) -> None:
        self.path = path
        self._most_rows = most_rows
        self._warn = warn
        self._db: sqlite3.Connection = self._open()

    def known(self, reward: str, pairs: Sequence[Pair]) -> dict[Pair, Judgement]:
        """Those of ``pairs`` that the reward of this digest has judged before, in their order."""
        keys = {_key(reward, pair): pair for pair in pairs}
        blobs = list(keys)
        found: dict[Pair, Judgement] = {}
        for start in range(0, len(blobs), _KEYS_A_QUERY):
            for blob, *values in self._try(partial(self._select, blobs[start : start + _KEYS_A_QUERY]), []):
                judgement = _checked(values)
                if judgement is not None:
                    found[keys[blob]] = judgement
        return {pair: found[pair] for pair in keys.values() if pair in found}

    def _select(self, keys: list[bytes]) -> list[tuple[Any, ...]]:
        sql = (
            f"SELECT key, score, tokens_cut, width_px, height_px FROM scores WHERE key IN ({','.join('?' * len(keys))})"
        )
        return self._db.execute(sql, keys).fetchall()

    def put(self, reward: str, judged: Mapping[Pair, Judgement]) -> None:
        """Keep judgements, all in one transaction; one that is there already is replaced."""
        rows = [(_key(reward, pair), *judgement) for pair, judgement in judged.items()]

        def write() -> None:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "INSERT INTO scores (key, score, tokens_cut, width_px, height_px) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET score = excluded.score, tokens_cut = excluded.tokens_cut, "
                    "width_px = excluded.width_px, height_px = excluded.height_px",
                    rows,
                )
                self._drop_oldest()
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

        self._try(write, None)

    def _drop_oldest(self) -> None:
        first, last = self._db.execute("SELECT min(ord), max(ord) FROM scores").fetchone()
        if last is not None and last - first >= self._most_rows:
            # A tenth more than must be, so that not every batch pays for it.
            self._db.execute("DELETE FROM scores WHERE ord <= ?", (last - self._most_rows * 9 // 10,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> ScoreMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- a file that cannot be used must not stop the work

    def _try(self, work: Callable[[], Any], otherwise: Any) -> Any:
        """``work`` on the file; once more on a new one when it fails, and then ``otherwise``."""
        try:
            return work()
        except sqlite3.Error as error:
            self._db.close()
            self._db = self._anew(error)
        try:
            return work()
        except sqlite3.Error:
            return otherwise

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _in_memory()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                return _connect(self.path)
        except (sqlite3.Error, OSError, _OtherVersionError) as error:
            return self._anew(error)

    def _anew(self, error: Exception) -> sqlite3.Connection:
        """A new file in place of a damaged one; else, scores kept in memory."""
        if self.path is not None and _is_damage(error):
            with contextlib.suppress(sqlite3.Error, OSError, _OtherVersionError), _locked(self.path):
                connection = _whole(self.path)
                if connection is None:
                    aside = _set_aside(self.path)
                    connection = _connect(self.path)
                    self._warn(f"the file of known scores was damaged ({error}); it is now {aside}, and begun anew")
                return connection
        if self.path is not None:
            self._warn(f"scores are not kept for a later command: {self.path}: {error}")
            self.path = None
        return _in_memory()


def _key(reward: str, pair: Pair) -> bytes:
    image, text = pair
    of_text = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return hashlib.sha256(f"{reward} {image} {of_text}".encode()).digest()


def _checked(values: Sequence[Any]) -> Judgement | None:
    """A row as it must be; SQLite keeps any type in any column, so one that was tampered with is not used."""
    score, *rest = values
    if isinstance(score, float) and math.isfinite(score) and all(isinstance(n, int) and n >= 0 for n in rest):
        return Judgement(score, *rest)
    return None


def _in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(_SCHEMA)
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file, made when missing; call with its lock held.

    Raises:
        sqlite3.Error: it cannot be used, or is not SQLite. _OtherVersionError: of another layout.
    """
    connection = sqlite3.connect(path, timeout=60.0, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise _OtherVersionError(
                f"it has version {version}, this program reads {_VERSION}; delete it to begin anew"
            )
        connection.execute("SELECT ord, key, score, tokens_cut, width_px, height_px FROM scores LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _whole(path: Path) -> sqlite3.Connection | None:
    """The file opened, when all of it is sound: another process may have begun it anew already."""
    try:
        connection = _connect(path)
    except sqlite3.Error as error:
        if _is_damage(error):
            return None
        raise
    try:
        if connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return connection
    except sqlite3.DatabaseError:
        pass
    connection.close()
    return None


def _is_damage(error: Exception) -> bool:
    name = getattr(error, "sqlite_errorname", "") or ""
    # A table or column that is missing from a file of the right version is a plain SQLITE_ERROR.
    return name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or name == "SQLITE_ERROR"


def _set_aside(path: Path) -> Path:
    """Rename a damaged file; an older damaged one makes room."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    # A process that still has the damaged file open must not share its log and index with the new one.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return aside


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time opens the file or replaces it; reading and writing rows need no lock of ours."""
    with open(path.with_name(f"{path.name}.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
