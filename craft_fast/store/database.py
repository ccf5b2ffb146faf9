"""One SQLite file: opening, migration, transactions and what its errors mean to a person.

WAL with synchronous=FULL: a row that was committed survives a kill and a power loss. No torch here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from craft_fast.errors import CraftError, IntegrityError, ResourceError
from craft_fast.store.schema import MIGRATIONS, READ_AS_CURRENT, SCHEMA, SCHEMA_VERSION


class Database:
    """The file behind a manifest. One thread, one writer (``open_run`` holds the lock).

    A file of an earlier version is brought up to date in one transaction when it is opened for writing; opened
    ``read_only`` it stays as it is, and is read as if it were of this version.

    Args:
        path: the SQLite file; made when missing, unless ``read_only``.
        read_only: refuse every change.

    Raises:
        CraftError: a later version made the file. IntegrityError: it is damaged.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._depth = 0
        with self._errors():
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            self._open(read_only)
        except BaseException:
            self._db.close()
            raise

    def _open(self, read_only: bool) -> None:
        with self._errors():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                # Also what a kill leaves that comes before the first commit.
                self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            version = self._version()
            if version not in (*MIGRATIONS, SCHEMA_VERSION):
                raise self._of_another_version(version)
            if read_only:
                for sql in READ_AS_CURRENT.get(version, ()):
                    self._db.execute(sql)
                self._db.execute("PRAGMA query_only = ON")
            elif version != SCHEMA_VERSION:
                self._migrate()

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        """Bring the file up to date: all steps or none, as SQLite keeps the version in the same transaction."""
        with self.transaction():
            while (version := self._version()) != SCHEMA_VERSION:
                for sql in MIGRATIONS[version]:
                    self._db.execute(sql)
                self._db.execute(f"PRAGMA user_version = {version + 1}")

    def _of_another_version(self, version: int) -> CraftError:
        return CraftError(
            "This run was made by another version of craft-fast",
            where=str(self.path),
            why=f"its manifest has version {version}, this program reads {SCHEMA_VERSION} and earlier",
            hint="use the version that made it, or start a new run with another --name",
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
                raise ResourceError(
                    "The disk is full or failing; nothing that was reported as done is lost",
                    where=str(self.path),
                    why=str(error),
                    hint="free some space, then type the same command again: it continues",
                ) from error
            if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or name.startswith("SQLITE_CORRUPT"):
                raise IntegrityError(
                    "The run's manifest is damaged",
                    where=str(self.path),
                    why=str(error),
                    hint="move the run's folder away and run again",
                ) from error
            raise CraftError("The run's manifest cannot be used", where=str(self.path), why=str(error)) from error

    def close(self) -> None:
        """Close the file; the manifest cannot be used afterwards."""
        self._db.close()

    def problems(self) -> list[str]:
        """What SQLite's own check of the whole file finds; empty when nothing."""
        found = [str(row[0]) for row in self._all("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside are committed together, or none; nests into the outermost one."""
        with self._errors():
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                try:
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise

    def _many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        with self.transaction():
            self._db.executemany(sql, rows)

    def _all(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(sql, args).fetchall()


def upsert(table: str, unique: str, values: str) -> str:
    """SQL that inserts a row or, where the ``unique`` columns are taken, changes its ``values`` and keeps its place."""
    columns = unique.split() + values.split()
    marks = ", ".join("?" * len(columns))
    changes = ", ".join(f"{name} = excluded.{name}" for name in values.split())
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        f" ON CONFLICT ({', '.join(unique.split())}) DO UPDATE SET {changes}"
    )
