"""The stream's scores: lazy ones, ones that came about on another machine, and what stops half-way."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.config import Settings
from craft_fast.errors import IntegrityError, Interrupted
from craft_fast.pipeline import run_pipeline
from craft_fast.pipeline_keys import InputKeys, input_keys
from craft_fast.progress import Silent
from craft_fast.records import Provenance, ScoreRow, Selection
from craft_fast.rewards.registry import load_reward
from craft_fast.store.run import open_run
from craft_fast.store.safe_load import read_image
from craft_fast.tiny.random_rewards import build_random_rewards
from tests.unit.small_runs import changed

TRAIN = ["red circle", "blue square", "green star", "black triangle", "pink square", "white heart"]
GPU = Provenance("native", "f" * 64, precision="float16")


class Said(Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lines: list[str] = []

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        self.stages += [] if note else [name]

    def warn(self, message: str) -> None:
        self.lines.append(message)

    @property
    def about_scores(self) -> list[str]:
        return [line for line in self.lines if "another way" in line]


@pytest.fixture(scope="module")
def settings(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("scores")
    build_random_rewards(folder / "rewards")
    (folder / "train.txt").write_text("\n".join(TRAIN))
    (folder / "heldout.txt").write_text("orange circle")
    rewards = {name: {"kind": kind, "path": str(folder / "rewards" / name)} for name, kind in KINDS.items()}
    return Settings.model_validate(
        {
            "model": {"path": str(sdxl_folder), "device": "cpu"},
            "prompts": {"file": str(folder / "train.txt"), "heldout_file": str(folder / "heldout.txt")},
            "expand": {"variants": 2, "templates": ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]},
            "generate": {"num_inference_steps": 2, "batch_size": 6},
            "rewards": rewards,
            "score": {"batch_size": 2},
            "filter": {"rewards": ["h", "a"], "target_samples": 100, "block_groups": 2},
            "train": {"weighting": "uniform"},
        }
    )


KINDS = {"h": "clip", "a": "aesthetic"}


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    run_pipeline(root, settings, until="filter")
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def keys_of(settings: Settings, root: Path) -> InputKeys:
    return input_keys(settings, root / "expansions")


def selections(root: Path, settings: Settings) -> list[Selection]:
    with open_run(root, read_only=True) as run:
        return run.manifest.selections(keys_of(settings, root).filter)


def accepted(root: Path, settings: Settings) -> list[str]:
    return [row.candidate_id for row in selections(root, settings) if row.accepted]


def ways(root: Path, settings: Settings) -> dict[str, dict[Provenance | None, int]]:
    with open_run(root, read_only=True) as run:
        return run.manifest.provenances(keys_of(settings, root).rewards)


def of_another_machine(root: Path, settings: Settings, most: int = 1000) -> int:
    """Scores of h as if a GPU had made them; returns how many."""
    key = keys_of(settings, root).rewards["h"]
    with open_run(root) as run:
        rows = list(run.manifest.scores({"h": key}).items())[:most]
        run.manifest.put_scores([ScoreRow(name, "h", key, row["h"] + 100, GPU) for name, row in rows])
    return len(rows)


def all_scores(root: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(root / "manifest.sqlite") as db:
        rows = [row for table in ("scores", "judgements") for row in db.execute(f"SELECT * FROM {table}")]
    db.close()
    return rows


# ---- lazy


def test_fewer_are_asked_and_the_same_are_accepted(finished: Path, settings: Settings, tmp_path: Path) -> None:
    everyone = changed(settings, score={"lazy": False})
    run_pipeline(tmp_path / "run", everyone, until="filter")
    assert accepted(tmp_path / "run", everyone) == accepted(finished, settings) != []
    count = {name: sum(found.values()) for name, found in ways(finished, settings).items()}
    assert max(count.values()) == 18
    assert min(count.values()) < 18
    assert {sum(found.values()) for found in ways(tmp_path / "run", everyone).values()} == {18}
    with open_run(finished, read_only=True) as run:
        rows = {row.name: row for row in run.manifest.stages()}
    assert rows["score"].info["survivors"] == ["h", "a"]
    assert rows["filter"].info["asked"] != {"h": 12, "a": 12}
    assert rows["filter"].info["r_total"] == {}
    assert {row.r_total for row in selections(finished, settings)} == {0.0}


def test_lazy_is_in_no_key_unless_it_changes_r_total(settings: Settings, tmp_path: Path) -> None:
    def keys(**sections: dict[str, Any]) -> InputKeys:
        return keys_of(changed(settings, **sections), tmp_path)

    weighted = {"train": {"weighting": "positive"}}
    assert keys(**weighted) == keys(**weighted, score={"lazy": False})
    assert keys().score == keys(score={"lazy": False}).score
    assert keys().filter != keys(score={"lazy": False}).filter == keys(**weighted).filter
    assert keys().score != keys(score={"dtype": "bfloat16"}).score
    assert keys().all_rewards != keys(score={"dtype": "bfloat16"}).all_rewards


def test_shared_pixels_give_the_bits_that_a_reward_gives_by_itself(finished: Path, settings: Settings) -> None:
    keys = keys_of(settings, finished)
    with open_run(finished, read_only=True) as run:
        rows = run.manifest.candidates(keys.generate)[:2]
        images = torch.stack([read_image(run.path(row.image.path)) for row in rows])
        scores = run.manifest.scores(keys.rewards)
    for name in KINDS:
        reward = load_reward(name, settings.rewards[name])
        alone = reward.score(images, [row.base_prompt for row in rows]).tolist()
        assert [scores[row.candidate_id].get(name, value) for row, value in zip(rows, alone, strict=True)] == alone
    assert set(KINDS) == set(scores[rows[0].candidate_id])


def test_what_was_not_asked_is_asked_when_it_is_wanted(copy: Path, settings: Settings) -> None:
    said = Said()
    everyone = changed(settings, score={"lazy": False})
    run_pipeline(copy, everyone, until="filter", progress=said)
    assert "score" in said.stages
    assert {sum(found.values()) for found in ways(copy, everyone).values()} == {18}
    assert accepted(copy, everyone) == accepted(copy, settings)


@pytest.fixture(scope="module")
def drawn(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "drawn"
    run_pipeline(root, settings, until="generate")
    return root


@pytest.mark.parametrize("keep", ["each", "all"])
def test_stops_anywhere_end_in_the_same_scores(keep: str, drawn: Path, settings: Settings, tmp_path: Path) -> None:
    kept = changed(settings, filter={"keep": keep})

    def score(root: Path, stop_after: int = 1000) -> int:
        """Score until it has been asked so often whether to stop; returns how often it was."""
        left = iter(range(stop_after))
        if not root.exists():
            shutil.copytree(drawn, root)
        run_pipeline(root, kept, only="score", should_stop=lambda: next(left, None) is None)
        return stop_after - len(list(left))

    polls = score(tmp_path / "whole")
    assert polls > 12
    wanted, stopped = all_scores(tmp_path / "whole"), set()
    for number in range(3, polls, 4):
        root = tmp_path / f"stopped-{number}"
        with pytest.raises(Interrupted):
            score(root, number)
        stopped.add(len(all_scores(root)))
        score(root)
        assert all_scores(root) == wanted
    assert len(stopped) > 2


def test_prompts_that_a_reward_cuts_are_told_once(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(
        "\n".join(f"{word} circle" + " and red circle" * 60 for word in ("red", "blue"))
    )
    long = changed(settings, prompts={"file": str(tmp_path / "train.txt")}, filter={"block_groups": 1, "rewards": []})
    said = Said()
    run_pipeline(tmp_path / "run", long, until="score", progress=said)
    told = [line for line in said.lines if "longer than it reads" in line]
    assert told == ["h: 2 prompts are longer than it reads; it judged by the beginning"]


# ---- another machine


def test_scores_of_another_machine_are_used_while_none_is_missing(copy: Path, settings: Settings) -> None:
    of_another_machine(copy, settings)
    said = Said()
    run_pipeline(copy, settings, until="filter", progress=said)
    assert said.stages == []
    other = changed(settings, filter={"target_samples": 90})
    run_pipeline(copy, other, until="filter", progress=said)
    assert said.stages == ["filter"] * said.stages.count("filter")
    assert accepted(copy, other) == accepted(copy, settings)
    assert said.about_scores == []
    assert list(ways(copy, settings)["h"]) == [GPU]


def test_once_one_is_missing_they_are_made_again(finished: Path, settings: Settings, tmp_path: Path) -> None:
    root, said = tmp_path / "run", Said()
    run_pipeline(root, changed(settings, generate={"max_images": 12}), until="score")
    number = of_another_machine(root, settings)
    run_pipeline(root, settings, until="filter", progress=said)
    assert len(said.about_scores) == 1
    assert said.about_scores[0].startswith(f"{number} scores came about in another way")
    assert "h: " in said.about_scores[0]
    assert "precision: float16, float32" in said.about_scores[0]
    assert GPU not in ways(root, settings)["h"]
    assert selections(root, settings) == selections(finished, settings)
    assert sorted(row for row in all_scores(root) if len(row) == 5) == sorted(all_scores(finished))
    run_pipeline(root, settings, until="filter", progress=said)
    assert len(said.about_scores) == 1


def test_scores_of_two_machines_are_not_compared(copy: Path, settings: Settings) -> None:
    other, said = changed(settings, filter={"target_samples": 90}), Said()
    number = of_another_machine(copy, settings, 5)
    with pytest.raises(IntegrityError, match="not compared") as caught:
        run_pipeline(copy, other, only="filter")
    assert caught.value.exit_code == 6
    assert "precision" in caught.value.why
    assert "craft-fast score" in caught.value.hint
    run_pipeline(copy, other, only="score", progress=said)
    assert said.about_scores[0].startswith(f"{number} scores came about")
    run_pipeline(copy, other, only="filter")
    assert accepted(copy, other) == accepted(copy, settings)
    assert GPU not in ways(copy, settings)["h"]
