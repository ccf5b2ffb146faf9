"""The manifest: round trips, idempotence, order, transactions, damage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from craft_fast.errors import CraftError, IntegrityError
from craft_fast.records import (
    Candidate,
    EvalRow,
    FileRef,
    Group,
    Prompt,
    Sample,
    ScoreRow,
    Selection,
    StageRow,
    Variant,
)
from craft_fast.store.manifest import Manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    opened = Manifest(tmp_path / "manifest.sqlite")
    yield opened
    opened.close()


def ref(name: str) -> FileRef:
    return FileRef(f"candidates/{name}", "0" * 64, 7)


def group(name: str, split: str = "train") -> Group:
    prompt = Prompt(name, f"text of {name}", split, 3, {"source": "é"})  # type: ignore[arg-type]
    return Group(prompt, tuple(Variant(name, j, f"{name} {j}") for j in range(3)))


def candidate(prompt: str, member: int) -> Candidate:
    return Candidate(f"{prompt}-{member}", prompt, member, prompt, f"{prompt} x", 2**62 + member, ref("a"), ref("b"))


def test_groups_keep_their_order_and_split(manifest: Manifest) -> None:
    names = ["z", "a", "m"]
    manifest.put_groups("k", [group(name) for name in names])
    manifest.put_groups("k", [group("h", "heldout")])
    manifest.put_groups("k", [group("a"), group("b")])
    assert manifest.groups("k", "train") == [group(name) for name in ["z", "a", "m", "b"]]
    assert manifest.groups("k", "heldout") == [group("h", "heldout")]
    assert manifest.groups("other", "train") == []


def test_candidates_come_by_group_then_member_and_keep_their_place(manifest: Manifest) -> None:
    rows = [candidate(prompt, member) for prompt in ("z", "a") for member in (0, 1, 2)]
    manifest.put_candidates("k", rows[3:][::-1])
    manifest.put_candidates("k", rows[:3])
    assert manifest.candidates("k") == rows[3:] + rows[:3]
    manifest.drop_candidates("k", ["a"])
    assert manifest.candidates("k") == rows[:3]
    manifest.put_candidates("k", rows[3:])
    manifest.put_candidates("k", rows[3:])
    assert manifest.candidates("k") == rows[3:] + rows[:3]


def test_scores_are_picked_by_reward_key(manifest: Manifest) -> None:
    manifest.put_scores(
        [ScoreRow("c1", "h", "new", 1.5), ScoreRow("c1", "h", "old", 9.0), ScoreRow("c2", "p", "x", 0.1)]
    )
    manifest.put_scores([ScoreRow("c1", "h", "new", 1.25)])
    assert manifest.scores({"h": "new", "p": "x"}) == {"c1": {"h": 1.25}, "c2": {"p": 0.1}}
    assert manifest.scores({"h": "new", "p": "x"}, ["c2"]) == {"c2": {"p": 0.1}}


def test_the_rest_makes_the_round_trip_twice(manifest: Manifest) -> None:
    selections = [Selection("c", "p", 1, True, {"h": True, "a": False}, 0.1 + 0.2, -1.0)]
    samples = [Sample("s2", "c", "text", 1 / 3), Sample("s1", "c", "text", 2.0)]
    evals = [EvalRow("oracle", True, 0.1, 0.2, 0.5, -0.1, 0.3, 64)]
    scores = [("base", "p", "h", 1.0), ("tuned", "p", "h", 2.0)]
    for _ in range(2):
        manifest.put_selections("k", selections)
        manifest.put_samples("k", samples)
        manifest.put_files("cache", "k", {"t": ref("t"), "u": ref("u")})
        manifest.put_eval("k", evals)
        manifest.put_eval_scores("k", scores)
    assert manifest.selections("k") == selections
    assert manifest.samples("k") == samples
    assert manifest.files("cache", "k") == {"t": ref("t"), "u": ref("u")}
    assert manifest.eval_rows("k") == evals
    assert manifest.eval_scores("k") == scores
    manifest.drop_files("cache", "k", ["t"])
    assert [(kind, name) for kind, _, name, _ in manifest.all_files()] == [("cache", "u")]


def test_an_interrupted_stage_keeps_its_seconds_under_the_same_key_only(manifest: Manifest) -> None:
    manifest.begin_stage("train", "k1")
    manifest.put_stage(StageRow("train", "k1", "running", 12.0))
    assert manifest.begin_stage("train", "k1").seconds == 12.0
    assert manifest.begin_stage("train", "k2").seconds == 0.0
    manifest.finish_stage("train", "k2", 3.0, 0.5, {"steps": 8})
    assert manifest.stages() == [StageRow("train", "k2", "done", 3.0, 0.5, {"steps": 8})]
    assert manifest.begin_stage("train", "k2").state == "running"


def test_a_failed_transaction_leaves_nothing(manifest: Manifest) -> None:
    def fail_halfway() -> None:
        with manifest.transaction():
            manifest.set_meta("a", "1")
            with manifest.transaction():
                manifest.put_candidates("k", [candidate("p", 0)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert manifest.get_meta("a") is None
    assert manifest.candidates("k") == []
    manifest.set_meta("a", "2")
    assert manifest.get_meta("a") == "2"


def test_durability_settings(manifest: Manifest) -> None:
    assert manifest._all("PRAGMA journal_mode") == [("wal",)]
    assert manifest._all("PRAGMA synchronous") == [(2,)]


def test_read_only_refuses_changes_and_sees_the_writer(manifest: Manifest) -> None:
    manifest.set_meta("a", "1")
    reader = Manifest(manifest.path, read_only=True)
    assert reader.get_meta("a") == "1"
    with pytest.raises(CraftError, match="manifest"):
        reader.set_meta("a", "2")
    manifest.set_meta("a", "3")
    assert reader.get_meta("a") == "3"
    reader.close()


def test_damage_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    path.write_bytes(b"this is no database" * 300)
    with pytest.raises(IntegrityError, match="damaged"):
        Manifest(path)


def test_another_schema_version_is_said(manifest: Manifest) -> None:
    with manifest.transaction():
        manifest._db.execute("PRAGMA user_version = 999")
    with pytest.raises(CraftError, match="another version") as caught:
        Manifest(manifest.path)
    assert "999" in caught.value.why


def test_no_torch_is_imported() -> None:
    modules = "craft_fast.store.manifest, craft_fast.store.atomic, craft_fast.store.safe_load, craft_fast.store.run"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
