"""``craft-fast rewards score`` with the tiny model's rewards, and with a function that can be slow, wrong or killed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.config import RewardSettings
from craft_fast.rewards.registry import load_reward
from craft_fast.store.safe_load import read_image

TINY = "package:craft_fast.tiny/assets/rewards"


def mine(module: str) -> list[str]:
    """Options that bring a function of the working folder; each test has its own module, as Python keeps them."""
    return ["--set", "rewards.mine.kind=function", "--set", f"rewards.mine.path={module}:score"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of 64x64 in p/, an empty cache and an empty shelf."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "CRAFT_FAST_REWARDS"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    for n in range(12):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(f"p/{n}.png")
    return tmp_path


def score(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["rewards", "score", *args], prog_name="craft-fast")
    assert done.exit_code == code, done.output
    return done


def result(*args: str, code: int = 0) -> dict[str, Any]:
    events = [json.loads(line) for line in score(*args, "--json", code=code).stdout.splitlines()]
    found: dict[str, Any] = next(event for event in events if event["event"] == "result")
    return found


def rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_presets_rewards_judge_as_in_a_run() -> None:
    told = result("p", "--preset", "tiny", "--prompt", "a red circle", "--output", "scores.csv", "--batch-size", "5")
    assert (told["pictures"], told["rated"], told["scores"], told["scores_made"]) == (12, 12, 84, 84)
    assert (told["ok"], told["output"], told["texts"]) == (True, "scores.csv", 1)
    found = rows("scores.csv")
    assert [row["image"] for row in found[::7]] == [f"{n}.png" for n in range(12)]
    reward = load_reward("image_reward", RewardSettings(kind="image_reward", path=f"{TINY}/image_reward"))
    expected = reward.score(torch.stack([read_image(f"p/{n}.png") for n in range(12)]), ["a red circle"] * 12)
    mine = [row for row in found if row["reward"] == "image_reward"]
    assert [float(row["score"]) for row in mine] == pytest.approx(expected.tolist(), abs=1e-5)
    assert {row["held_out"] for row in mine} == {"true"}
    assert {(row["backend"], row["checkpoint"], row["precision"]) for row in mine} == {
        ("native", reward.provenance.checkpoint, "float32")
    }
    figures = next(one for one in told["rewards"] if one["reward"] == "image_reward")
    assert figures["mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert (figures["n"], figures["min"]) == (12, min(float(row["score"]) for row in mine))


def test_a_table_is_shown_and_how_to_get_a_file() -> None:
    Path("p/.hidden.png").write_bytes(b"x")
    done = score("p", "--preset", "tiny", "-r", "h", "-r", "a", "-p", "a red circle", "-p", "a\x1b[31mb")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["image", "prompt", "h", "a", "mean", "rank"]
    assert "a\\x1b[31mb" in done.stdout
    assert "\x1b" not in done.output
    assert "12 of 12 pictures rated: 36 scores made, 0 known before" in done.stdout  # of a, once a picture
    assert "--output scores.csv writes every score" in done.stdout


def test_names_and_texts_cannot_drive_the_terminal(folder: Path) -> None:
    for name in ("a\nError: b\x1b[2J.png", "\x9b31m.png", "\u202e.png"):
        (folder / "p" / name).write_bytes((folder / "p/0.png").read_bytes())
    (folder / "p/broken\nok\x1b[1m.png").write_bytes(b"x")
    done = score("p", "--preset", "tiny", "-r", "h", "-p", "a\n\x1b[31m\u202eb\x9b", code=6)
    assert not set(done.output) & set("\x1b\x9b\u202e")
    assert not [line for line in done.output.splitlines() if line.startswith(("ok", "Error: b"))]
    assert [row[:8] for row in done.stdout.splitlines() if row.startswith("a\\x0a")] == ["a\\x0aErr"]
    score("p", "--preset", "tiny", "-r", "h", code=3)


def test_quiet_says_nothing_and_writes_all_the_same() -> None:
    done = score("p/1.png", "p/0.png", "--preset", "tiny", "-r", "a", "-q", "-o", "deep/s.jsonl")
    assert done.output == ""
    found = [json.loads(line) for line in Path("deep/s.jsonl").read_text().splitlines()]
    assert [(row["image"], row["prompt"], row["reward"]) for row in found] == [("1.png", "", "a"), ("0.png", "", "a")]
    assert not [path.name for path in Path("deep").iterdir() if path.name != "s.jsonl"]


def test_stdout_is_the_file() -> None:
    done = score("p", "--preset", "tiny", "-r", "a", "--format", "json")
    assert len(json.loads(done.stdout)) == 12
    assert "12 of 12 pictures rated" in done.stderr
    assert len(score("p", "--preset", "tiny", "-r", "a", "-o", "-").stdout.splitlines()) == 13
    assert score("p", "-o", "-", "--json", code=2).stdout.startswith('{"event": "error"')


def test_texts_come_from_beside_the_pictures() -> None:
    score("p", "--preset", "tiny", "-r", "h", code=3)
    for n in range(11):
        Path(f"p/{n}.txt").write_text(f"a caption {n}")
    lacking = score("p", "--preset", "tiny", "-r", "h", code=3).stderr
    assert "1 of 12 pictures do not have a text" in lacking
    assert "where: 11.png" in lacking
    Path("p/metadata.csv").write_text("file_name,text\n11.png,the last\n")
    score("p", "--preset", "tiny", "-r", "h", "-o", "s.csv")
    assert [row["prompt"] for row in rows("s.csv")] == [*(f"a caption {n}" for n in range(11)), "the last"]
    assert score("p", "--preset", "tiny", "-r", "h", "-o", "p/metadata.csv", code=2).stdout == ""
    assert Path("p/metadata.csv").read_text().startswith("file_name")


def test_texts_that_are_cut_are_counted() -> None:
    done = score(
        "p/0.png", "--preset", "tiny", "-r", "h", "-p", "a red circle", "-p", "a red circle " * 20, "-o", "s.csv"
    )
    assert [int(row["tokens_cut"]) for row in rows("s.csv")] == [0, 60 - 30]
    assert "h: 1 texts are longer than it reads" in done.stdout


# ---- which rewards


def test_without_any_rewards_it_says_what_to_fetch() -> None:
    said = score("p", "-p", "x", code=4).stderr
    assert "craft-fast rewards fetch hpsv2.1" in said
    assert "--preset tiny" in said
    assert "64x64" in said


def test_names_that_are_not_known() -> None:
    said = score("p", "-p", "x", "-r", "hpsv3", code=2).stderr
    assert "known are hpsv2.1, hpsv2.0, pickscore" in said
    said = score("p", "-p", "x", "-r", "hpsv3", "--preset", "tiny", code=2).stderr
    assert "known are h, p, a, image_reward" in said
    assert "no such run" in score("p", "-p", "x", "--name", "sea", code=2).stderr
    assert "did you mean p" in score("pp", "-p", "x", "--preset", "tiny", code=2).stderr
    assert "--dtype half" in score("p", "-p", "x", "--preset", "tiny", "--dtype", "half", code=2).stderr
    assert "model.device" in score("p", "-p", "x", "--preset", "tiny", "--device", "gpu", code=3).stderr


def test_a_published_reward_whose_files_are_missing_is_named() -> None:
    said = score("p", "-p", "x", "-r", "pickscore", "--offline", code=4).stderr
    assert "PickScore" in said or "pickscore" in said


def test_settings_of_a_file_and_of_a_run_bring_rewards(folder: Path) -> None:
    CliRunner().invoke(app, ["init", "runs/sea/config.yaml", "--set", "rewards.p=null", "--set", "filter.rewards=[h]"])
    (folder / "runs/sea/manifest.sqlite").write_bytes(b"")
    told = result("p", "-p", "a red circle", "--name", "sea")
    assert [one["reward"] for one in told["rewards"]] == [
        "h", "a", "image_reward", "oracle_alignment", "oracle_clean", "oracle",
    ]  # fmt: skip
    again = result("p", "-p", "a red circle", "--config", "runs/sea/config.yaml", "-r", "h", "--dtype", "bfloat16")
    assert [(one["reward"], one["precision"]) for one in again["rewards"]] == [("h", "bfloat16")]
    assert again["scores_known"] == 0  # another precision, other scores


# ---- what goes wrong


def test_pictures_that_cannot_be_read_are_named_at_the_end(folder: Path) -> None:
    Path("p/3.png").write_bytes(b"\x89PNG broken")
    Path("p/5.png").write_bytes(b"")
    Image.new("RGB", (100, 80)).save("p/7.png")
    told = result("p", "--preset", "tiny", "-r", "a", "-o", "s.csv", code=6)
    assert [one["image"] for one in told["failures"]] == ["3.png", "5.png", "7.png"]
    assert "100x80" in told["failures"][2]["why"]
    assert (told["ok"], told["rated"], len(rows("s.csv"))) == (False, 9, 9)
    said = score("p", "--preset", "tiny", "-r", "a", "-o", "s.csv", code=6).stderr
    assert "3 of 12 pictures could not be rated; the scores of the others are there" in said
    assert "5.png: A picture cannot be read: it is empty" in said
    strictly = score("p", "--preset", "tiny", "-r", "a", "-o", "t.csv", "--strict", code=6).stderr
    assert "5.png" in strictly
    assert not Path("t.csv").exists()
    assert score("p/5.png", "--preset", "tiny", "-r", "a", "-o", "t.csv", code=6).stdout.startswith("0 of 1 pictures")
    assert not Path("t.csv").exists()


def test_a_reward_that_fails_keeps_what_is_done_and_goes_on_after_the_fix(folder: Path) -> None:
    body = "def score(images, prompts):\n    return [{} for image in images]\n"
    Path("good.py").write_text(body.format("1.0"))
    Path("bad.py").write_text(body.format("float('nan')"))
    both = ["p", "-p", "x", "--preset", "tiny", "-r", "h", "-r", "mine", "-o", "s.csv"]
    said = score(*both, *mine("bad"), code=1).stderr
    assert "reward mine" in said
    assert "picture 0.png" in said
    assert "the same command continues" in said
    assert not Path("s.csv").exists()
    told = result(*both, *mine("good"))
    assert (told["scores_known"], told["scores_made"]) == (12, 12)
    assert len(rows("s.csv")) == 24


def test_a_damaged_cache_is_said_and_begun_anew(folder: Path) -> None:
    path = folder / "cache/craft-fast/scores.sqlite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database " * 1000)
    done = score("p", "--preset", "tiny", "-r", "a")
    assert "warning: the file of known scores was damaged" in done.stderr
    assert result("p", "--preset", "tiny", "-r", "a")["scores_known"] == 12
    assert result("p", "--preset", "tiny", "-r", "a", "--fresh")["scores_made"] == 12


SLOW = """
import time
def score(images, prompts):
    time.sleep(0.15)
    return [float(image.float().mean()) for image in images]
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_ended_goes_on_where_it_was(
    number: signal.Signals, folder: Path, craft_env: dict[str, str]
) -> None:
    (folder / f"slow{number:d}.py").write_text(SLOW)
    words = ["p", "-p", "x", *mine(f"slow{number:d}"), "--batch-size", "2", "--json", "--output", "s.csv"]
    env = {**craft_env, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "craft_cli", "rewards", "score", *words]
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["stage"] == "mine" and event["done"] >= 4:
                process.send_signal(number)
                break
        process.stdout.read()
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert not (folder / "s.csv").exists()
    told = result(*words[:-3], "--output", "s.csv")
    assert 4 <= told["scores_known"] < 12
    assert told["scores_known"] + told["scores_made"] == 12
    score(*words[:-3], "--output", "fresh.csv", "--fresh")
    assert (folder / "s.csv").read_bytes() == (folder / "fresh.csv").read_bytes()
