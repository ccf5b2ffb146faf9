"""The user's memory of scores: what is put is there again, for several processes, whatever happens to the file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from craft_fast.records import Provenance
from craft_fast.rewards.memory import Judgement, ScoreMemory, memory_path, reward_digest

ONE = Judgement(0.25, 0, 640, 480)
PAIRS = [(f"{n:064x}", text) for n in range(3) for text in ("a red circle", "", "naïve\n\x1b[31m")]


def open_one(path: Path, said: list[str] | None = None, **options: int) -> ScoreMemory:
    return ScoreMemory(path, warn=(said if said is not None else []).append, **options)


def test_what_was_put_is_there_for_the_next_command(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.sqlite"
    judged = {pair: Judgement(at / 7, at, 64 + at, 32) for at, pair in enumerate(PAIRS)}
    with open_one(path) as memory:
        memory.put("r", judged)
    with open_one(path) as memory:
        assert memory.known("r", [*PAIRS, ("f" * 64, "a red circle")]) == judged
        assert memory.known("another reward", PAIRS) == {}


def test_a_score_is_replaced_by_a_newer_one(tmp_path: Path) -> None:
    with open_one(tmp_path / "s") as memory:
        memory.put("r", {PAIRS[0]: ONE})
        memory.put("r", {PAIRS[0]: Judgement(0.5, 3, 1, 2)})
        assert memory.known("r", PAIRS) == {PAIRS[0]: Judgement(0.5, 3, 1, 2)}


def test_neither_pictures_nor_texts_are_kept(tmp_path: Path) -> None:
    with open_one(tmp_path / "s") as memory:
        memory.put("r", {("ab" * 32, "a secret wish"): ONE})
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret" not in kept
    assert b"ab" * 32 not in kept


def test_the_digest_follows_key_and_provenance() -> None:
    made = Provenance("native", "c" * 64, precision="float32")
    digests = {
        reward_digest("key", made),
        reward_digest("other", made),
        reward_digest("key", Provenance("native", "c" * 64, precision="float16")),
        reward_digest("key", Provenance("native", "d" * 64, precision="float32")),
    }
    assert len(digests) == 4
    assert reward_digest("key", Provenance("native", "c" * 64, precision="float32")) in digests


def test_more_than_one_query_is_asked(tmp_path: Path) -> None:
    pairs = [(f"{n:064x}", "x") for n in range(1203)]
    with open_one(tmp_path / "s") as memory:
        memory.put("r", {pair: Judgement(float(n), 0, 1, 1) for n, pair in enumerate(pairs)})
        assert [found.score for found in memory.known("r", pairs).values()] == [float(n) for n in range(1203)]


def test_the_oldest_are_dropped(tmp_path: Path) -> None:
    pairs = [(f"{n:064x}", "x") for n in range(250)]
    with open_one(tmp_path / "s", most_rows=100) as memory:
        for pair in pairs:
            memory.put("r", {pair: ONE})
        known = list(memory.known("r", pairs))
    assert 90 <= len(known) <= 100
    assert known == pairs[-len(known) :]


@pytest.mark.parametrize("damage", ["text", "middle", "end", "table", "empty"])
def test_a_damaged_file_is_set_aside_and_begun_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.sqlite"
    pairs = [(f"{n:064x}", "x") for n in range(2000)]
    with open_one(path) as memory:
        memory.put("r", {pair: ONE for pair in pairs})
    if damage == "text":
        path.write_bytes(b"this is no database, whatever its name says\n" * 100)
    elif damage in ("middle", "end"):
        data = bytearray(path.read_bytes())
        start = 4096 if damage == "middle" else len(data) // 4096 // 2 * 4096  # the first pages are whole
        data[start:] = b"\xa5" * (len(data) - start)
        path.write_bytes(data)
    elif damage == "table":
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE scores")
            db.execute("CREATE TABLE other (x)")
        db.close()
    else:
        path.write_bytes(b"")
    said: list[str] = []
    with open_one(path, said) as memory:
        assert memory.known("r", pairs) == {}
        memory.put("r", {pairs[0]: ONE})
        assert memory.known("r", pairs) == {pairs[0]: ONE}
    with open_one(path) as memory:
        assert memory.known("r", pairs) == {pairs[0]: ONE}
    if damage != "empty":  # which is what a new file looks like
        assert len(said) == 1
        assert "damaged" in said[0]
        assert (tmp_path / "scores.sqlite.damaged").exists()


def test_a_process_that_has_the_damaged_file_open_does_not_spoil_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    first = open_one(path)
    first.put("r", {PAIRS[0]: ONE})
    first._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else its log, which is whole, would stand in for the file
    index = path.with_name("scores.sqlite-shm")
    shared = index.stat().st_ino
    with path.open("r+b") as file:
        file.write(b"not a database " * 100)
    with open_one(path) as second:
        assert index.stat().st_ino != shared
        second.put("r", {PAIRS[1]: ONE})
        first.put("r", {PAIRS[2]: ONE})
        first.close()
        second.put("r", {PAIRS[3]: ONE})
    with open_one(path) as third:
        assert set(third.known("r", PAIRS)) >= {PAIRS[1], PAIRS[3]}


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE scores (future)")
        db.execute("PRAGMA user_version = 99")
    db.close()
    said: list[str] = []
    with open_one(path, said) as memory:
        memory.put("r", {PAIRS[0]: ONE})
        assert memory.known("r", PAIRS) == {PAIRS[0]: ONE}
    assert len(said) == 1
    assert "version 99" in said[0]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)
    db.close()


def test_where_no_file_can_be_made_scores_are_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with open_one(tmp_path / "file" / "scores.sqlite", said) as memory:
        memory.put("r", {PAIRS[0]: ONE})
        assert memory.known("r", PAIRS) == {PAIRS[0]: ONE}
    assert len(said) == 1
    assert "not kept" in said[0]


def test_a_row_that_was_tampered_with_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_one(path) as memory:
        memory.put("r", dict.fromkeys(PAIRS, ONE))
    with sqlite3.connect(path) as db:
        for at, change in enumerate(("score = 'high'", "score = 9e999", "width_px = -1", "tokens_cut = 'no'")):
            db.execute(f"UPDATE scores SET {change} WHERE ord = {at + 1}")
    db.close()
    with open_one(path) as memory:
        assert memory.known("r", PAIRS) == dict.fromkeys(PAIRS[4:], ONE)


WRITER = """
import sys
from pathlib import Path
from craft_fast.rewards.memory import Judgement, ScoreMemory
said = []
with ScoreMemory(Path(sys.argv[1]), warn=said.append) as memory:
    for n in range(60):
        memory.put("r", {(sys.argv[2], str(n)): Judgement(float(n), 0, 1, 1)})
assert said == [], said
"""


def test_processes_may_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    path.write_bytes(b"not a database, and long enough to be one" * 100)  # one of them sets it aside, once
    root = str(Path(__file__).parents[2])
    first = ScoreMemory(path)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(who)], cwd=root, stderr=subprocess.PIPE)
        for who in range(3)
    ]
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert (writer.returncode, err) == (0, b"")
    with first as memory:
        pairs = [(str(who), str(n)) for who in range(3) for n in range(60)]
        assert list(memory.known("r", pairs)) == pairs


def test_the_place_follows_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert memory_path() == tmp_path / "craft-fast" / "scores.sqlite"
