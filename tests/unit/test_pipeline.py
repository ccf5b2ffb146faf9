"""The pipeline in one process: what is skipped, what is stale, budgets, single stages, interruptions, gates."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from craft_fast import workbench
from craft_fast.config import Settings
from craft_fast.errors import ExitCode, Interrupted, QualityGateError, UsageError
from craft_fast.pipeline import STAGES, RunSummary, run_pipeline, status
from craft_fast.progress import Silent
from craft_fast.sdxl.identify import read_header
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import open_run
from craft_fast.tiny.random_rewards import build_random_rewards
from craft_fast.verify import verify_run
from tests.unit.small_runs import changed

TRAIN = ["red circle", "blue square", "green star", "black triangle", "pink square", "white heart"]
HELDOUT = ["orange circle", "purple star"]


class Said(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.lines: list[str] = []

    def stage(self, name: str, index: int, total: int, note: str = "") -> None:
        assert STAGES[index - 1] == name
        self.stages.append((name, note))

    def info(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)

    @property
    def worked(self) -> set[str]:
        return {name for name, note in self.stages if not note}


@pytest.fixture(scope="module")
def settings(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("pipeline")
    build_random_rewards(folder / "rewards")
    (folder / "train.txt").write_text("\n".join(TRAIN))
    (folder / "heldout.txt").write_text("\n".join(HELDOUT))
    kinds = {"h": "clip", "a": "aesthetic", "image_reward": "image_reward"}
    rewards = {
        name: {"kind": kind, "path": str(folder / "rewards" / name), "held_out": name == "image_reward"}
        for name, kind in kinds.items()
    }
    return Settings.model_validate(
        {
            "model": {"path": str(sdxl_folder), "device": "cpu"},
            "prompts": {"file": str(folder / "train.txt"), "heldout_file": str(folder / "heldout.txt")},
            "expand": {"variants": 2, "templates": ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]},
            "generate": {"num_inference_steps": 2, "batch_size": 6},
            "rewards": rewards,
            "filter": {"rewards": ["h"], "target_samples": 100, "block_groups": 2},
            "train": {"rank": 2, "steps": 4, "micro_batch_size": 2, "checkpoint_every": 2, "sample_every": 0}
            | {"weighting": "uniform", "warmup_steps": 1},
            "evaluate": {"prompts": 2, "bootstrap_samples": 100},
        }
    )


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    run_pipeline(root, settings)
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def lora(root: Path) -> str:
    return sha256_file(root / "lora" / "craft.safetensors")


def accepted(root: Path, settings: Settings) -> list[str]:
    with open_run(root, read_only=True) as run:
        row = run.manifest.stage("filter")
        assert row is not None
        return [item.candidate_id for item in run.manifest.selections(row.key) if item.accepted]


def used_images(root: Path) -> tuple[int, str]:
    with open_run(root, read_only=True) as run:
        row = run.manifest.stage("filter")
        assert row is not None
        return int(row.info["images"]), str(row.info["reason"])


def test_a_whole_run_leaves_everything(finished: Path, settings: Settings) -> None:
    assert {stage.name: stage.state for stage in status(finished)} == dict.fromkeys(STAGES, "done")
    assert [check for check in verify_run(finished) if not check.ok] == []
    report = json.loads((finished / "report.json").read_text())
    assert report["selection"]["accepted"] == len(accepted(finished, settings)) > 0
    assert {row["metric"] for row in report["evaluation"]} == {"h", "a", "image_reward"}
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in report["stages"])


def test_the_same_call_again_does_nothing(copy: Path, settings: Settings) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.suffix in (".safetensors", ".png", ".html")
    }
    said = Said()
    summary = run_pipeline(copy, settings, progress=said)
    assert said.worked == set()
    assert {name for name, note in said.stages if note} == set(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert isinstance(summary, RunSummary)
    assert summary.lora == copy / "lora" / "craft.safetensors"
    assert summary.report == copy / "report.html"
    assert summary.accepted == len(accepted(copy, settings))
    assert summary.wanted == 100


@pytest.mark.parametrize(
    ("sections", "first"),
    [
        ({"report": {"title": "other"}}, "report"),
        ({"evaluate": {"bootstrap_samples": 150}}, "evaluate"),
        ({"export": {"dtype": "float16"}}, "export"),
        ({"train": {"rank": 3}}, "train"),
        ({"train": {"condition_on": "expanded"}}, "cache"),
        ({"filter": {"rewards": ["a"]}}, "filter"),
    ],
)
def test_a_changed_setting_makes_its_stage_and_those_after_it_stale(
    sections: dict[str, Any], first: str, copy: Path, settings: Settings
) -> None:
    said = Said()
    run_pipeline(copy, changed(settings, **sections), progress=said)
    assert said.worked == set(STAGES[STAGES.index(first) :])


@pytest.mark.parametrize(
    "sections",
    [
        {"generate": {"batch_size": 3}},
        {"score": {"batch_size": 2}},
        {"train": {"checkpoint_every": 1, "keep_checkpoints": 5}},
        {"evaluate": {"min_win_rate": 0.0}},
    ],
)
def test_what_changes_no_result_makes_nothing_stale_but_the_report(
    sections: dict[str, Any], copy: Path, settings: Settings
) -> None:
    said = Said()
    run_pipeline(copy, changed(settings, **sections), progress=said)
    assert said.worked == {"report"}


def test_stale_stages_are_told_by_status(copy: Path, settings: Settings) -> None:
    run_pipeline(copy, changed(settings, train={"rank": 3}), until="cache")
    states = {stage.name: stage.state for stage in status(copy)}
    assert {name for name, state in states.items() if state == "stale"} == {"train", "export", "evaluate", "report"}


def test_stage_by_stage_gives_what_a_whole_run_gives(finished: Path, settings: Settings, tmp_path: Path) -> None:
    root = tmp_path / "steps"
    for name in STAGES:
        said = Said()
        run_pipeline(root, settings, only=name, progress=said)
        assert name in said.worked
    assert lora(root) == lora(finished)
    assert accepted(root, settings) == accepted(finished, settings)
    assert {stage.name: stage.state for stage in status(root)} == dict.fromkeys(STAGES, "done")


@pytest.mark.parametrize("only", ["score", "filter", "train", "report"])
def test_a_stage_without_those_before_it_says_what_to_type(only: str, settings: Settings, tmp_path: Path) -> None:
    run_pipeline(tmp_path / "run", settings, only="expand")
    with pytest.raises(UsageError) as caught:
        run_pipeline(tmp_path / "run", settings, only=only)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "craft-fast " in caught.value.hint


def test_a_stage_of_a_run_that_is_not_there_makes_no_folder(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run_pipeline(tmp_path / "run", settings, only="train")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError):
        run_pipeline(tmp_path / "run", settings, until="trian")


def test_the_stream_stops_when_enough_are_accepted(settings: Settings, tmp_path: Path) -> None:
    few = changed(settings, filter={"target_samples": 1})
    run_pipeline(tmp_path / "run", few, until="filter")
    images, reason = used_images(tmp_path / "run")
    assert len(accepted(tmp_path / "run", few)) == 1
    assert reason == "enough were accepted"
    assert images % 6 == 0
    assert images < 18
    assert len(list((tmp_path / "run" / "candidates").glob("*.png"))) == images


def test_an_image_budget_is_kept_and_a_larger_one_goes_on(settings: Settings, tmp_path: Path) -> None:
    root = tmp_path / "run"
    said = Said()
    run_pipeline(root, changed(settings, generate={"max_images": 10}), until="filter", progress=said)
    assert used_images(root) == (9, "the image budget is spent")
    assert any("Fewer samples than wanted" in line and "h " in line and "--max-images" in line for line in said.lines)
    first = {path: path.stat().st_mtime_ns for path in (root / "candidates").iterdir()}
    run_pipeline(root, changed(settings, generate={"max_images": 12}), until="filter")
    assert used_images(root)[0] == 12
    kept = [path for path, time in first.items() if path.stat().st_mtime_ns == time]
    # The first block, two groups of one latents file and three pictures each, is not made again.
    assert len(kept) >= 8


def test_a_budget_too_small_for_one_group_is_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget"):
        run_pipeline(tmp_path / "run", changed(settings, generate={"max_images": 2}), until="filter")


def clock(step_s: float) -> Callable[[], float]:
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += step_s
        return now

    return monotonic


def test_what_the_clock_decided_is_kept(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = changed(settings, generate={"max_minutes": 1.0})
    root = tmp_path / "run"
    monkeypatch.setattr(workbench.time, "monotonic", clock(10.0))
    run_pipeline(root, timed, until="filter")
    images, reason = used_images(root)
    assert reason == "the time budget is spent"
    assert 0 < images < 18
    before = accepted(root, timed)
    monkeypatch.setattr(workbench.time, "monotonic", clock(0.0))
    run_pipeline(root, timed)
    assert used_images(root) == (images, reason)
    assert accepted(root, timed) == before
    assert len(list((root / "candidates").glob("*.png"))) == images


@pytest.mark.parametrize("polls", [1, 4, 8])
def test_an_interrupted_run_ends_in_the_same_bits(
    polls: int, finished: Path, settings: Settings, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    left = iter(range(polls))
    with pytest.raises(Interrupted) as caught:
        run_pipeline(root, settings, should_stop=lambda: next(left, None) is None)
    assert caught.value.exit_code == ExitCode.SIGINT
    assert [check for check in verify_run(root) if not check.ok] == []
    run_pipeline(root, settings)
    assert lora(root) == lora(finished)
    assert accepted(root, settings) == accepted(finished, settings)


def test_nothing_accepted_is_a_quality_error_with_hints_each_time(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "flat_reward.py").write_text("def score(images, prompts):\n    return [1.0] * len(prompts)\n")
    flat = {"h": {"kind": "function", "path": "flat_reward:score"}}
    os.chdir(tmp_path)
    tree = settings.model_dump() | {"rewards": flat}
    none = Settings.model_validate(tree)
    try:
        for _ in range(2):
            with pytest.raises(QualityGateError, match="Not one candidate") as caught:
                run_pipeline(tmp_path / "run", none)
            assert caught.value.exit_code == ExitCode.QUALITY
            assert "h 0%" in caught.value.why
            assert "more prompts" in caught.value.hint
    finally:
        sys.modules.pop("flat_reward", None)
    assert not (tmp_path / "run" / "lora").exists()


def test_the_quality_gate_comes_after_the_report(copy: Path, settings: Settings) -> None:
    (copy / "report.html").unlink()
    with pytest.raises(QualityGateError, match="not as good") as caught:
        run_pipeline(copy, changed(settings, evaluate={"min_win_rate": 1.0}))
    assert "image_reward" in caught.value.why
    assert (copy / "report.html").exists()


def test_top_spends_all_prompts_and_takes_the_best(settings: Settings, tmp_path: Path) -> None:
    top = changed(settings, filter={"select": "top", "target_samples": 2})
    run_pipeline(tmp_path / "run", top, until="filter")
    assert used_images(tmp_path / "run") == (18, "the prompts ran out")
    with open_run(tmp_path / "run", read_only=True) as run:
        row = run.manifest.stage("filter")
        assert row is not None
        rows = run.manifest.selections(row.key)
    passing = sorted((item.r_total for item in rows if item.passed.get("h")), reverse=True)
    assert sorted((item.r_total for item in rows if item.accepted), reverse=True) == passing[:2]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_run_through(method: str, copy: Path, settings: Settings) -> None:
    summary = run_pipeline(copy, changed(settings, train={"method": method}))
    assert summary.lora is not None
    assert summary.lora.exists()
    assert [check for check in verify_run(copy) if not check.ok] == []


def test_a_picture_of_the_evaluation_that_is_gone_is_drawn_again(copy: Path, settings: Settings) -> None:
    picture = sorted(copy.glob("samples/eval/tuned-*/*.png"))[0]
    before = picture.read_bytes()
    picture.unlink()
    assert [check.what for check in verify_run(copy) if not check.ok][-1] == picture.relative_to(copy).as_posix()
    said = Said()
    run_pipeline(copy, settings, progress=said)
    assert said.worked == {"evaluate"}
    assert picture.read_bytes() == before


def test_a_run_that_moved_goes_on(finished: Path, settings: Settings, tmp_path: Path) -> None:
    root = tmp_path / "before"
    run_pipeline(root, settings, until="train")
    moved = tmp_path / "after"
    root.rename(moved)
    run_pipeline(moved, settings)
    assert lora(moved) == lora(finished)


def said_of(root: Path, name: str = "craft") -> dict[str, str]:
    return dict(read_header(root / "lora" / f"{name}.safetensors").metadata)


def test_the_lora_says_how_it_was_made_and_what_it_scores(finished: Path, settings: Settings) -> None:
    said = said_of(finished)
    assert set(json.loads(said["craft.rewards"])) == set(settings.rewards)
    assert json.loads(said["craft.filter"])["rewards"] == ["h"]
    assert int(said["craft.accepted"]) == len(accepted(finished, settings))
    assert int(said["craft.candidates"]) == used_images(finished)[0]
    assert all(len(said[f"craft.{name}"]) == 64 for name in ("model", "config", "train_key", "weights_digest"))
    for row in json.loads((finished / "report.json").read_text())["evaluation"]:
        scores = json.loads(said["craft.scores"])[row["metric"]]
        assert scores == {name: row[name] for name in scores}
        assert {"base_mean", "tuned_mean", "win_rate", "held_out"} <= scores.keys()


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("written", [False, True], ids=["before the file", "before its record"])
def test_a_kill_while_the_scores_go_into_the_lora_is_mended(
    written: bool, copy: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed(settings, evaluate={"bootstrap_samples": 150}, export={"format": "both"})
    quiet, names = Path(shutil.copytree(copy, tmp_path / "undisturbed")), ("craft", "craft-diffusers")
    run_pipeline(quiet, other)
    write, said = atomic.write_safetensors, Said()

    def killed(path: Path, tensors: Any, metadata: Any = None) -> Any:
        scored = "craft.scores" in (metadata or {})
        done = write(path, tensors, metadata) if written or not scored else None
        if scored:
            raise Killed
        return done

    monkeypatch.setattr(atomic, "write_safetensors", killed)
    with pytest.raises(Killed):
        run_pipeline(copy, other)
    monkeypatch.undo()
    assert [check for check in verify_run(copy) if not check.ok] == []
    run_pipeline(copy, other, progress=said)
    assert said.worked == {"evaluate", "report"}
    assert all("craft.scores" in said_of(copy, name) for name in names)
    # Both files are looked at, and what is made anew is the same, scores and all.
    (copy / "lora/craft-diffusers.safetensors").unlink()
    assert {check.what for check in verify_run(copy) if not check.ok} == {"LoRA", "lora/craft-diffusers.safetensors"}
    run_pipeline(copy, other)
    assert all(
        (copy / f"lora/{n}.safetensors").read_bytes() == (quiet / f"lora/{n}.safetensors").read_bytes() for n in names
    )
    assert [check for check in verify_run(copy) if not check.ok] == []
