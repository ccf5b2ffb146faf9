"""The accepted set out as a dataset and in again, and own pictures of any shape, through the command line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.store.run import open_run
from craft_fast.store.safe_load import read_image
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards

SETTINGS = """
preset: none
model: {path: ROOT/model}
prompts: {file: ROOT/prompts.txt, heldout_file: ROOT/heldout.txt}
expand: {variants: 2, templates: ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]}
generate: {num_inference_steps: 2, guidance_scale: 1.5, batch_size: 12, max_images: 12, width_px: 64, height_px: 64}
rewards:
  h: {kind: clip, path: ROOT/rewards/h}
  p: {kind: clip, path: ROOT/rewards/p}
filter: {rewards: [h], target_samples: 100, block_groups: 4}
train: {rank: 2, lora_alpha: 2, steps: 2, micro_batch_size: 4, warmup_steps: 0, sample_every: 0}
evaluate: {prompts: 2, bootstrap_samples: 100}
report: {grid_prompts: 2}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    build_random_sdxl(root / "model")
    build_random_rewards(root / "rewards")
    for file in (root / "rewards").glob("*/reward.json"):  # as published rewards do: pictures of any shape
        file.write_text(json.dumps({**json.loads(file.read_text()), "resize": "bicubic"}))
    (root / "prompts.txt").write_text("a red circle\na blue square\ntwo green stars\na black cross\n")
    (root / "heldout.txt").write_text("a white star\na yellow square\n")
    (root / "sea.yaml").write_text(SETTINGS.replace("ROOT", str(root)))
    done = craft(root, "run", "--config", "sea.yaml", "--name", "sea")
    assert done.exit_code == 0, done.output
    return root


def craft(root: Path, *args: str) -> Result:
    here = Path.cwd()
    os.chdir(root)
    try:
        return CliRunner().invoke(app, [*args], prog_name="craft-fast")
    finally:
        os.chdir(here)


def samples(root: Path, name: str) -> list[tuple[Any, ...]]:
    """The training set: which picture, which text, which weight, under which id."""
    with open_run(root / "runs" / name, read_only=True) as run:
        rows = {row.name: row for row in run.manifest.stages()}
        by_id = {row.candidate_id: row for row in run.manifest.candidates(rows["generate"].key)}
        return sorted(
            (by_id[s.candidate_id].image.sha256, by_id[s.candidate_id].member, s.prompt, s.weight, s.sample_id)
            for s in run.manifest.samples(rows["cache"].key)
        )


def states(root: Path, name: str) -> set[str]:
    told = craft(root, "status", "--name", name, "--json")
    return {stage["state"] for stage in json.loads(told.stdout.splitlines()[-1])["stages"]}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_dataset_comes_back_with_the_same_selection_and_weights(world: Path) -> None:
    done = craft(world, "dataset", "accepted", "--name", "sea", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (world / "accepted/metadata.jsonl").read_text().splitlines()]
    assert told["pictures"] == told["accepted"] == len(rows) == len(samples(world, "sea"))
    for row in rows:
        file = world / "accepted" / row["file_name"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == row["sha256"]
        assert file.with_suffix(".txt").read_text() == row["text"] + "\n" == row["prompt"] + "\n"
        assert row["scores"]["h"] > row["base_scores"]["h"]
        assert row["scored_by"]["h"]["checkpoint"]
    done = craft(world, "run", "--config", "sea.yaml", "--images", "accepted", "--name", "back")
    assert done.exit_code == 0, done.output
    assert samples(world, "back") == samples(world, "sea")
    assert craft(world, "verify", "--name", "back").exit_code == 0
    status = craft(world, "status", "--name", "back", "--json")
    assert "given" in status.stdout

    # What goes out of that run is what came in.
    assert craft(world, "dataset", "again", "--name", "back").exit_code == 0
    twice = [json.loads(line) for line in (world / "again/metadata.jsonl").read_text().splitlines()]
    facts = ("sha256", "prompt", "variant", "member", "weight", "advantage")
    assert [[row[name] for name in facts] for row in twice] == [[row[name] for name in facts] for row in rows]

    # Another folder with the same content: nothing is done again, nothing is stale.
    (world / "accepted").rename(world / "moved")
    again = craft(world, "run", "--name", "back", "--images", "moved", "--json")
    assert again.exit_code == 0, again.output
    assert states(world, "back") == {"done"}
    # A folder that is not there any more: the run has its own copies.
    (world / "moved").rename(world / "away")
    gone = craft(world, "run", "--name", "back", "--set", "train.steps=3")
    assert gone.exit_code == 0, gone.output
    assert "its own copies" in gone.stderr
    (world / "away").rename(world / "moved")

    # Other weights make no other candidates; a caption that changed does.
    made = {path.name for path in (world / "runs/back/candidates").iterdir()}
    rows[0]["weight"] *= 2
    write_rows(world / "moved", rows)
    changed = craft(world, "run", "--name", "back", "--until", "cache")
    assert changed.exit_code == 0, changed.output
    assert f"1 with another weight ({rows[0]['file_name']})" in changed.stderr
    assert {path.name for path in (world / "runs/back/candidates").iterdir()} == made
    assert sorted(one[3] for one in samples(world, "back")) == sorted(row["weight"] for row in rows)
    assert states(world, "back") == {"done", "stale"}
    rows[0]["prompt"] = "a purple circle"
    write_rows(world / "moved", rows)
    changed = craft(world, "run", "--name", "back", "--until", "cache")
    assert changed.exit_code == 0, changed.output
    assert "1 with another caption" in changed.stderr
    assert {path.name for path in (world / "runs/back/candidates").iterdir()} > made


def test_everything_of_a_run_as_a_folder(world: Path) -> None:
    args = ["dataset", "all", "--name", "sea", "--all", "--caption", "expanded"]
    assert craft(world, *args).exit_code == 0
    rows = [json.loads(line) for line in (world / "all/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["member"] for row in rows} == {0, 1, 2}
    assert all(("weight" in row) == row["accepted"] for row in rows)
    assert all(row["text"] == row["variant"] for row in rows)
    # The verdicts follow from the file alone.
    judged = [row for row in rows if row["member"]]
    assert [row["passed"]["h"] for row in judged] == [row["scores"]["h"] > row["base_scores"]["h"] for row in judged]
    assert {row["passed"]["h"] for row in judged} == {True, False}
    first = {path.name: path.read_bytes() for path in (world / "all").iterdir()}
    there = craft(world, *args)
    assert there.exit_code == 2
    assert "--force" in there.stderr
    assert craft(world, *args, "--force").exit_code == 0
    assert {path.name: path.read_bytes() for path in (world / "all").iterdir()} == first
    assert [path.name for path in world.iterdir() if "craft-fast-tmp" in path.name] == []
    # Of all of it, what was rejected stays out; the held-out prompts came along.
    options = ("--set", "prompts.heldout_file=null", "--until", "cache")
    done = craft(world, "run", "--config", "sea.yaml", "--images", "all", "--name", "fromall", *options)
    assert done.exit_code == 0, done.output
    assert samples(world, "fromall") == samples(world, "sea")
    with open_run(world / "runs/fromall", read_only=True) as run:
        key = next(row.key for row in run.manifest.stages() if row.name == "expand")
        told = [group.prompt.text for group in run.manifest.groups(key, "heldout")]
    assert told == ["a white star", "a yellow square"]


def test_a_folder_of_other_things_is_never_replaced(world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    done = craft(world, "dataset", str(mine), "--name", "sea")  # an empty folder is no loss
    assert done.exit_code == 0, done.output
    (mine / "photo.png").write_bytes(b"dear")
    there = craft(world, "dataset", str(mine), "--name", "sea", "--force")
    assert there.exit_code == 2
    assert "photo.png" in there.stderr
    # Nor under the name that it is written as.
    other = tmp_path / "new.craft-fast-tmp"
    other.mkdir()
    (other / "photo.png").write_bytes(b"dear")
    assert craft(world, "dataset", str(tmp_path / "new"), "--name", "sea").exit_code == 2
    assert (mine / "photo.png").read_bytes() == (other / "photo.png").read_bytes() == b"dear"
    # What a kill has left is.
    (other / "photo.png").rename(other / "00001_0123abcd.png")
    assert craft(world, "dataset", str(tmp_path / "new"), "--name", "sea").exit_code == 0
    assert not other.exists()


def test_a_damaged_picture_and_an_unfinished_run_are_not_exported(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "runs/sea", tmp_path / "sea")
    for path in (tmp_path / "sea/candidates").glob("*.png"):
        path.write_bytes(b"other")
    args = ["dataset", "out", "--name", "sea", "--runs", str(tmp_path)]
    done = craft(tmp_path, *args)
    assert done.exit_code == 6
    assert list(tmp_path.glob("out*")) == []
    with open_run(tmp_path / "sea") as run:
        run.manifest.begin_stage("generate", "another")
    done = craft(tmp_path, *args)
    assert done.exit_code == 2
    assert "generate" in done.stderr
    assert "--until cache" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["dataset", "x", "--name", "see"], 2, "sea"),
        (["dataset", "x", "--name", "sea", "--caption", "bse"], 2, "did you mean base?"),
        (["dataset", "runs/sea/new", "--name", "sea"], 2, "own place"),
        (["dataset", "prompts.txt/new", "--name", "sea"], 5, "prompts.txt"),
        (["dataset", "prompts.txt", "--name", "sea", "--force"], 2, "there already"),
        (["dataset", "runs/sea", "--name", "sea"], 2, "run's own place"),
        (["dataset", "model", "--name", "sea", "--force"], 2, "something else"),
        (["run", "--images", "modle", "--config", "sea.yaml", "--name", "n"], 3, "did you mean"),
        (["run", "--images", "nowhere", "--config", "sea.yaml", "--name", "n"], 3, "no such folder"),
        (["run", "prompts.txt", "--images", "own", "--config", "sea.yaml", "--name", "n"], 2, "captions"),
    ],
)
def test_what_cannot_be_done(world: Path, args: list[str], code: int, word: str) -> None:
    done = craft(world, *args)
    assert done.exit_code == code, done.output
    assert word in done.stderr


HOSTILE: dict[str, tuple[dict[str, bytes | None], int]] = {
    "no caption": ({"bad.png": None}, 3),
    "caption is empty": ({"bad.png": None, "bad.txt": b""}, 3),
    "not UTF-8 (invalid": ({"bad.png": None, "bad.txt": b"\xff"}, 3),
    "no weight": ({"bad.png": None, "bad.txt": b"x", "metadata.jsonl": b'{"file_name": "p.png", "weight": 1}'}, 3),
    "weight nan": ({"metadata.jsonl": b'{"file_name": "p.png", "weight": NaN}'}, 3),
    "not positive": ({"metadata.jsonl": b'{"file_name": "p.png", "weight": -1}'}, 3),
    "line 1": ({"metadata.jsonl": b"{"}, 3),
    "UTF-8": ({"metadata.csv": b"file_name,text\n\xff,x"}, 3),
    "it is empty": ({"bad.png": b"", "bad.txt": b"x"}, 6),
    "is damaged": ({"bad.webp": b"<html>", "bad.txt": b"x"}, 6),
    "heic is not read": ({"bad.heic": b"x", "bad.txt": b"x"}, 6),
}


@pytest.mark.parametrize("word", HOSTILE)
def test_what_is_wrong_with_a_folder_has_its_exit_code_and_nothing_is_done(
    word: str, world: Path, tmp_path: Path
) -> None:
    files, code = HOSTILE[word]
    square = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(square, format="PNG")
    for name, data in {"p.png": None, "p.txt": b"a red circle", **files}.items():
        (tmp_path / name).write_bytes(square.getvalue() if data is None else data)
    runs = tmp_path / "runs"
    done = craft(world, "run", "--images", str(tmp_path), "--config", "sea.yaml", "--name", "n", "--runs", str(runs))
    assert done.exit_code == code, done.output
    assert word in done.stderr
    assert not (runs / "n/candidates").exists()


def test_own_pictures_of_any_shape_are_scored_filtered_and_trained_on(world: Path) -> None:
    own = world / "own"
    own.mkdir()
    for number, size in enumerate([(128, 64), (64, 128), (90, 80), (200, 200), (64, 64), (100, 70)]):
        Image.effect_noise(size, 60).convert("RGB").save(own / f"p{number}.png")
        (own / f"p{number}.txt").write_text(["a red circle", "a blue square"][number % 2])
    (own / "p6.jpg").write_bytes(b"\xff\xd8\xff broken")
    (own / "p6.txt").write_text("a red circle")
    options = ["--config", "sea.yaml", "--images", "own", "--name", "own"]
    options += ["--set", "train.weighting=uniform", "--set", "filter.rewards=[]"]
    broken = craft(world, "run", *options)
    assert broken.exit_code == 6
    assert "p6.jpg" in broken.stderr
    (own / "p6.jpg").unlink()
    (own / "p6.txt").unlink()
    planned = craft(world, "plan", *options, "--no-probe", "--json")
    made = json.loads(planned.stdout.splitlines()[-1])["made"]
    assert (made["images"], made["own"], made["groups"]) == (8, 6, 2)
    done = craft(world, "run", *options, "--set", "generate.max_images=2")
    assert done.exit_code == 0, done.output
    with open_run(world / "runs/own", read_only=True) as run:
        rows = {row.name: row for row in run.manifest.stages()}
        candidates = run.manifest.candidates(rows["generate"].key)
        assert (
            len(candidates) == 6 + 2
        )  # two base pictures: all that the budget had room for, and own ones cost nothing
        accepted = [row.candidate_id for row in run.manifest.selections(rows["filter"].key) if row.accepted]
        assert {row.candidate_id for row in candidates if row.member} == set(accepted)
        sizes = {read_image(run.path(row.image.path)).shape for row in candidates if row.member}
        assert len(sizes) >= 3
    assert rows["train"].info["samples"] == 6
    # A damaged copy in the run is made again from the folder.
    victim = next(row for row in candidates if row.member)
    whole = (world / "runs/own" / victim.latents.path).read_bytes()
    (world / "runs/own" / victim.latents.path).write_bytes(b"gone")
    again = craft(world, "run", *options, "--set", "generate.max_images=2", "--set", "train.steps=3")
    assert again.exit_code == 0, again.output
    assert craft(world, "verify", "--name", "own").exit_code == 0
    assert (world / "runs/own" / victim.latents.path).read_bytes() == whole

    # Where no held-out prompts are given, a share of the captions is held out, with their pictures.
    done = craft(world, "expand", *options, "--set", "prompts.heldout_file=null")
    assert done.exit_code == 0, done.output
    assert "1 captions are held out" in done.stderr
    told = json.loads(craft(world, "status", "--name", "own", "--json").stdout.splitlines()[-1])["stages"][0]
    assert told["info"] == {"train": 1, "heldout": 1, "own_pictures": 3}
