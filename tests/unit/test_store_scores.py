"""The manifest's scores: provenance, judgements of pictures; and manifests that version 1 made."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from craft_fast.errors import CraftError
from craft_fast.records import Provenance, ScoreRow
from craft_fast.store import schema
from craft_fast.store.manifest import Manifest

CPU = Provenance("native", "a" * 64, "pil-bicubic/crop-floor/224", "clip-bpe/77/open_clip/0123456789ab", "float32")
GPU = replace(CPU, precision="float16")


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    opened = Manifest(tmp_path / "manifest.sqlite")
    yield opened
    opened.close()


def test_scores_have_their_provenance(manifest: Manifest) -> None:
    manifest.put_scores([ScoreRow("c1", "h", "k", 1.0, CPU), ScoreRow("c2", "h", "k", 2.0, CPU)])
    manifest.put_scores([ScoreRow("c2", "h", "k", 2.5, GPU), ScoreRow("c3", "p", "x", 3.0)])
    keys = {"h": "k", "p": "x"}
    assert manifest.scores(keys) == {"c1": {"h": 1.0}, "c2": {"h": 2.5}, "c3": {"p": 3.0}}
    assert manifest.scores(keys, provenances={"h": GPU}) == {"c2": {"h": 2.5}, "c3": {"p": 3.0}}
    assert manifest.scores(keys, provenances={"h": GPU, "p": CPU}) == {"c2": {"h": 2.5}}
    assert manifest.scores(keys, provenances={"p": None}, candidate_ids=["c3"]) == {"c3": {"p": 3.0}}
    assert manifest.scored_by(keys) == {"c1": {"h": CPU}, "c2": {"h": GPU}, "c3": {"p": None}}
    assert manifest.provenances(keys) == {"h": {CPU: 1, GPU: 1}, "p": {None: 1}}
    assert manifest.provenances(keys, ["c1"]) == {"h": {CPU: 1}}
    assert len(manifest._all("SELECT * FROM provenances")) == 2
    manifest.drop_scores("h", "k", ["c1"])
    assert manifest.provenances(keys, ["c1", "c2"]) == {"h": {GPU: 1}}


def test_judgements_are_of_a_picture_and_a_text(manifest: Manifest) -> None:
    one, two, odd = ("i1", "a cat"), ("i2", "a cat"), ("i1", "lone \ud800 surrogate")
    manifest.put_judgements("k", CPU, {one: 1.0, odd: 3.0})
    manifest.put_judgements("k", GPU, {one: 1.5, two: 2.5})
    assert manifest.judgements("k", CPU, [one, two, odd]) == {one: 1.0, odd: 3.0}
    assert manifest.judgements("k", GPU, [one, two]) == {one: 1.5, two: 2.5}
    assert manifest.judgements("k", CPU, [("i1", "a dog")]) == manifest.judgements("other", CPU, [one]) == {}
    assert set(manifest.judgements("k", None, [one, two, ("i3", "a cat")])) == {one, two}
    manifest.put_judgements("k", CPU, {one: 1.25})
    assert manifest.judgements("k", CPU, [one]) == {one: 1.25}


def test_scores_of_an_evaluation_have_their_provenance(manifest: Manifest) -> None:
    base, tuned = ("base", "p1", "h", 1.0), ("tuned", "p1", "h", 2.0)
    manifest.put_eval_scores("k", [base], {"h": CPU})
    manifest.put_eval_scores("k", [tuned, ("base", "p1", "p", 0.5)], {"h": GPU})
    assert manifest.eval_scores("k") == [base, tuned, ("base", "p1", "p", 0.5)]
    assert manifest.eval_provenances("k") == {"h": {CPU: 1, GPU: 1}, "p": {None: 1}}
    manifest.put_eval_scores("k", [base], {"h": GPU})
    assert manifest.eval_provenances("k")["h"] == {GPU: 2}


# ---- manifests of version 1

# The tables that version 1 had in another form, as it made them; the others have not changed.
VERSION_1 = """
CREATE TABLE scores (
  candidate_id TEXT NOT NULL, reward TEXT NOT NULL, reward_key TEXT NOT NULL, value REAL NOT NULL,
  PRIMARY KEY (candidate_id, reward, reward_key)) WITHOUT ROWID;
CREATE TABLE eval_scores (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, side TEXT NOT NULL, prompt_id TEXT NOT NULL, reward TEXT NOT NULL,
  value REAL NOT NULL, UNIQUE (key, side, prompt_id, reward));
"""
EVAL = [("base", "p1", "h", 0.5), ("tuned", "p1", "h", 0.75)]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A manifest of version 1 with rows in it."""
    path = tmp_path / "old.sqlite"
    Manifest(path).close()
    with sqlite3.connect(path) as db:
        db.executescript(
            "".join(f"DROP TABLE {name};" for name in ("scores", "eval_scores", "provenances", "judgements"))
        )
        db.executescript(VERSION_1)
        db.executemany("INSERT INTO scores VALUES (?, 'h', 'k', ?)", [("c1", 1.0), ("c2", 2.0)])
        db.executemany("INSERT INTO eval_scores (key, side, prompt_id, reward, value) VALUES ('e', ?, ?, ?, ?)", EVAL)
        db.execute("INSERT INTO meta VALUES ('seed', '7')")
        db.execute("PRAGMA user_version = 1")
    db.close()
    return path


def version(path: Path) -> int:
    with sqlite3.connect(path) as db:
        found = int(db.execute("PRAGMA user_version").fetchone()[0])
    db.close()
    return found


def holds_what_it_held(manifest: Manifest) -> None:
    assert manifest.get_meta("seed") == "7"
    assert manifest.scores({"h": "k"}) == {"c1": {"h": 1.0}, "c2": {"h": 2.0}}
    assert manifest.provenances({"h": "k"}) == {"h": {None: 2}}
    assert manifest.eval_scores("e") == EVAL
    assert manifest.eval_provenances("e") == {"h": {None: 2}}
    assert manifest.judgements("k", CPU, [("i", "t")]) == {}
    assert manifest.problems() == []


def test_an_old_manifest_is_brought_up_to_date(old: Path, manifest: Manifest) -> None:
    opened = Manifest(old)
    holds_what_it_held(opened)
    opened.put_scores([ScoreRow("c1", "h", "k", 1.5, CPU)])
    opened.put_eval_scores("e", [EVAL[0]], {"h": CPU})
    opened.put_judgements("k", CPU, {("i", "t"): 1.5})
    opened.close()
    assert version(old) == schema.SCHEMA_VERSION == 2
    again = Manifest(old)
    assert again.provenances({"h": "k"}) == {"h": {CPU: 1, None: 1}}
    # From here on it is what a new one is: same tables, same columns in the same order.
    for name, *_ in manifest._all("SELECT name FROM sqlite_master WHERE type = 'table'"):
        assert again._all(f"PRAGMA table_info({name})") == manifest._all(f"PRAGMA table_info({name})")
    again.close()


def test_an_old_manifest_is_read_as_it_is(old: Path) -> None:
    before = old.read_bytes()
    reader = Manifest(old, read_only=True)
    holds_what_it_held(reader)
    with pytest.raises(CraftError):
        reader.put_scores([ScoreRow("c1", "h", "k", 1.5, CPU)])
    assert (old.read_bytes(), version(old)) == (before, 1)
    # A writer that comes now brings it up to date, and the reader goes on.
    Manifest(old).close()
    holds_what_it_held(reader)
    reader.close()


KILL = """
import os, signal, sqlite3, sys
class Connection(sqlite3.Connection):
    left = int(sys.argv[2])
    def execute(self, sql, *values):
        if sql.startswith(("ALTER", "CREATE", "PRAGMA user_version =", "COMMIT")):
            if Connection.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            Connection.left -= 1
        return super().execute(sql, *values)
connect = sqlite3.connect
sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)
from pathlib import Path
from craft_fast.store.manifest import Manifest
Manifest(Path(sys.argv[1])).close()
"""


def test_a_kill_in_the_middle_of_it_loses_nothing(old: Path) -> None:
    steps = len(schema.MIGRATIONS[1]) + 2  # and the version, and the commit
    for kept in range(steps + 1):
        code = subprocess.run([sys.executable, "-c", KILL, str(old), str(kept)], env=dict(os.environ)).returncode
        assert code == (0 if kept == steps else -9)
        assert version(old) == (2 if kept == steps else 1)
        reader = Manifest(old, read_only=True)
        holds_what_it_held(reader)
        reader.close()


def test_versions_that_are_not_known_are_refused(old: Path) -> None:
    for number in (0, 3):
        with sqlite3.connect(old) as db:
            db.execute(f"PRAGMA user_version = {number}")
        db.close()
        for read_only in (False, True):
            with pytest.raises(CraftError, match="another version") as caught:
                Manifest(old, read_only=read_only)
            assert f"version {number}" in caught.value.why
