"""The main job through the command line, on a random model: run, stop, continue, stage by stage, what goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.pipeline import STAGES
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards

SETTINGS = """
preset: none
model: {path: ROOT/model}
prompts: {file: ROOT/prompts.txt, heldout_file: ROOT/heldout.txt}
expand:
  variants: 2
  templates: ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]
generate: {num_inference_steps: 2, guidance_scale: 1.5, batch_size: 12, max_images: 24}
rewards:
  h: {kind: clip, path: ROOT/rewards/h}
  p: {kind: clip, path: ROOT/rewards/p}
  image_reward: {kind: image_reward, path: ROOT/rewards/image_reward, held_out: true}
filter: {rewards: [h, p], target_samples: 100, block_groups: 4}
train: {rank: 2, lora_alpha: 2, steps: 8, micro_batch_size: 4, warmup_steps: 0, checkpoint_every: 2, sample_every: 0}
evaluate: {prompts: 4, bootstrap_samples: 100}
report: {grid_prompts: 2}
"""
LORA = Path("lora/craft.safetensors")
# Everything that may stand on stderr when all is well: stages, figures, what the filter says, the run's name.
EXPECTED_LINE = re.compile(
    r"\[\d/9\] \w+(: .*)?|run: runs/\w+ .*|\d+ images of \d+ prompts: .*|\d+ samples accepted of .*"
    r"|warning: Fewer samples than wanted, .*"
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model, random rewards, prompts and settings; no run in it."""
    root = tmp_path_factory.mktemp("world")
    build_random_sdxl(root / "model")
    build_random_rewards(root / "rewards")
    shapes, colours = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow")
    lines = [f"a {colour} {shape}" for shape in shapes for colour in colours]
    (root / "prompts.txt").write_text("\n".join(lines) + "\n")
    (root / "heldout.txt").write_text("\n".join(line.replace("a ", "two ") for line in lines[:4]) + "\n")
    (root / "small.yaml").write_text(SETTINGS.replace("ROOT", str(root)))
    return root


@pytest.fixture(scope="session")
def finished(world: Path, craft: Callable[..., Any]) -> subprocess.CompletedProcess[str]:
    """One undisturbed run, ``runs/small``, started as a user's script would start it."""
    done: subprocess.CompletedProcess[str] = craft("run", "--config", "small.yaml", "--json", cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


@pytest.fixture
def runs(here: Path, finished: object, tmp_path: Path) -> Path:
    """A folder of runs with a copy of the finished one, free to be damaged."""
    shutil.copytree(here / "runs" / "small", tmp_path / "runs" / "small")
    return tmp_path / "runs"


def _craft(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="craft-fast")


def _events(stdout: str) -> list[dict[str, Any]]:
    def refuse(text: str) -> float:
        raise AssertionError(f"not JSON: {text}")

    return [json.loads(line, parse_constant=refuse) for line in stdout.splitlines()]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_lines_tell_the_whole_run(world: Path, finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.stderr == ""
    events = _events(finished.stdout)
    stages = list(dict.fromkeys(event["stage"] for event in events if event["event"] == "stage"))
    assert tuple(stages) == STAGES
    assert all(event["total"] == len(STAGES) for event in events if event["event"] == "stage")
    steps = [event for event in events if event["event"] == "progress" and event["stage"] == "train"]
    assert (steps[-1]["done"], steps[-1]["total"], steps[-1]["unit"]) == (8, 8, "steps")
    assert all(event["metrics"]["loss"] > 0 for event in steps if event["done"])
    result = events[-1]
    assert result["event"] == "result"
    assert result["images"] == 24
    assert 0 < result["accepted"] < 24
    assert (world / result["lora"]).is_file()
    assert (world / result["report"]).is_file()
    assert {row["metric"]: row["held_out"] for row in result["evaluation"]} == {
        "h": False, "p": False, "image_reward": True
    }  # fmt: skip


def test_the_same_command_costs_nothing_and_tells_the_result(here: Path, finished: object) -> None:
    before = {path: path.stat().st_mtime_ns for path in (here / "runs/small").rglob("*.[spj][a-z]*") if path.is_file()}
    done = _craft("run", "--config", "small.yaml")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("done already") == len(STAGES)
    assert all(EXPECTED_LINE.fullmatch(line) for line in done.stderr.splitlines()), done.stderr
    assert re.search(r"^\d+ samples accepted of 24 images", done.stdout, re.MULTILINE)
    held_out, training = done.stdout.index("held-out rewards"), done.stdout.index("training rewards")
    assert held_out < done.stdout.index("image_reward") < training < done.stdout.index("\n  h ")
    assert re.search(r"^LoRA +runs/small/lora/craft.safetensors$", done.stdout, re.MULTILINE)
    assert re.search(r"^report +runs/small/report.html$", done.stdout, re.MULTILINE)
    assert re.search(r"^time +\d", done.stdout, re.MULTILINE)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_stages_one_by_one_make_the_same_lora(here: Path, finished: object) -> None:
    done = _craft("expand", "prompts.txt", "--config", "small.yaml", "--name", "single")
    for stage in STAGES[1:]:
        assert done.exit_code == 0, done.output
        # The next command is the one that the last one named.
        assert f"next: craft-fast {stage} --name single" in done.stdout
        done = _craft(stage, "--name", "single")
        assert f"] {stage}" in done.stderr
    assert done.exit_code == 0, done.output
    assert "next:" not in done.stdout
    assert _sha256(here / "runs/single" / LORA) == _sha256(here / "runs/small" / LORA)


def test_ctrl_c_saves_and_the_same_command_continues(
    here: Path, finished: object, craft_start: Callable[..., subprocess.Popen[str]]
) -> None:
    command = ("run", "--config", "small.yaml", "--name", "stopped")
    process = craft_start(*command, cwd=here)
    deadline = time.monotonic() + 100
    while not list((here / "runs/stopped").glob("checkpoints/*/COMPLETE.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "SIGINT: stopping after this step" in err
    told = err[err.index("Error:") :]
    assert "everything done so far is saved" in told
    assert "the same command continues" in told
    assert "craft-fast run --name stopped" in told
    lines = [line for line in err[: err.index("Error:")].splitlines() if not line.startswith("SIGINT")]
    assert all(EXPECTED_LINE.fullmatch(line) for line in lines), err
    assert not (here / "runs/stopped" / LORA).exists()

    again = _craft(*command, "--quiet")
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "")
    assert _sha256(here / "runs/stopped" / LORA) == _sha256(here / "runs/small" / LORA)


def test_status_shows_stages_costs_and_the_next_command(runs: Path) -> None:
    done = _craft("status", "--name", "small", "--runs", str(runs))
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[1:10]] == [[stage, "done"] for stage in STAGES]
    assert "9 of 9 stages done" in done.stdout
    assert "next:" not in done.stdout
    retrained = _craft("expand", "--name", "small", "--runs", str(runs), "--set", "train.rank=3")
    assert "train.rank 2 -> 3" in retrained.stderr
    done = _craft("status", "--name", "small", "--runs", str(runs), "--json")
    (event,) = _events(done.stdout)
    assert [row["state"] for row in event["stages"]] == ["done"] * 5 + ["stale"] * 4
    assert event["next"] == f"craft-fast run --name small --runs {runs}"


def test_verify_finds_a_flipped_bit(runs: Path) -> None:
    where = ("--name", "small", "--runs", str(runs))
    done = _craft("verify", *where)
    assert done.exit_code == 0, done.output
    assert "checks passed" in done.stdout
    victim = sorted((runs / "small/candidates").rglob("*.png"))[0]
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.write_bytes(data)
    done = _craft("verify", *where)
    assert done.exit_code == 6
    assert re.search(rf"^FAILED +candidates/.*{victim.name}", done.stdout, re.MULTILINE)
    assert "craft-fast run --name small" in done.stderr
    first, last = _events(_craft("verify", *where, "--json").stdout)
    assert (first["ok"], last["event"], last["exit_code"]) == (False, "error", 6)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_without_a_run_names_the_command(stage: str, here: Path) -> None:
    done = _craft(stage, "--name", "nowhere")
    assert done.exit_code == 2
    assert "craft-fast run --name nowhere" in done.stderr
    assert not (here / "runs/nowhere").exists()


def test_a_stage_without_the_one_before_names_the_command(here: Path, tmp_path: Path) -> None:
    where = ("--name", "x", "--runs", str(tmp_path))
    assert _craft("run", "--config", "small.yaml", "--until", "expand", *where).exit_code == 0
    for stage, missing in (("score", "craft-fast generate"), ("train", "craft-fast run"), ("report", "craft-fast run")):
        done = _craft(stage, *where)
        assert done.exit_code == 2, done.output
        assert missing in done.stderr


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"a red circle\n\xff\xfebad\na blue square\n", 0, "line 2: not UTF-8"),
        (b"a red\0circle\na blue square\n", 0, "line 1: NUL"),
        (b"a red circle\n\x1b[2Jx\n", 0, "line 2"),
        (b"<script>alert(1)</script>\n../../etc/passwd\n{0.__class__}\n%n\n", 0, ""),
        (b"", 3, "empty"),
        (b"\x80\x04\x95", 3, "line 1: not UTF-8"),
        (b"a " * 500_000, 3, "1,000,000 bytes"),
    ],
)
def test_hostile_prompt_files(content: bytes, code: int, told: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    done = _craft("expand", str(tmp_path / "p.txt"), "--config", "small.yaml", "--runs", str(tmp_path / "r"))
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.output
    assert {path.name for path in tmp_path.iterdir()} <= {"p.txt", "r"}


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["run", "--until", "trian"], 2, "train"),
        (["run", "--set", "train.rnk=3"], 3, "train.rank"),
        (["run", "--set", "model.path=/no/such/model"], 4, "/no/such/model"),
        (["run", "prompts.txt", "--prompt", "a red circle"], 2, "--prompt"),
        (["run", "prmpts.txt"], 3, "prompts.txt"),
        (["run", "--name", "../up"], 2, "--name"),
        (["run", "--max-images", "0"], 2, "--max-images"),
        (["run", "--max-images", "2"], 2, "generate.max_images"),
        (["run", "--json", "--quiet"], 2, "--quiet"),
        (["evaluate", "--set", "evaluate.min_win_rate=1.0"], 7, "small/report.html"),
    ],
)
def test_exit_codes(args: list[str], code: int, told: str, runs: Path) -> None:
    first, *rest = args
    where = [] if "--name" in args else ["--name", "small" if first == "evaluate" else "new"]
    config = [] if first == "evaluate" else ["--config", "small.yaml"]
    done = _craft(first, *rest, *where, *config, "--runs", str(runs))
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_renamed_pickle_is_refused(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "model", tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    done = _craft(
        "run", "--config", "small.yaml", "--runs", str(tmp_path / "r"), "--set", f"model.path={tmp_path}/model"
    )
    assert done.exit_code == 6, done.output
    assert "pickle" in done.stderr


def test_prompts_of_the_command_line(here: Path, tmp_path: Path) -> None:
    where = ("--config", "small.yaml", "--name", "two", "--runs", str(tmp_path))
    done = _craft("expand", "-p", "a red circle", "-p", "a blue square", *where, "--json")
    assert done.exit_code == 0, done.output
    result = _events(done.stdout)[-1]
    assert result["stages"][0]["info"]["train"] == 2
    shutil.move(tmp_path / "two", tmp_path / "moved")
    done = _craft("expand", "--name", "moved", "--runs", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "done already" in done.stderr


def test_one_writer_per_run(runs: Path) -> None:
    from craft_fast.store.run import open_run

    with open_run(runs / "small", create=False):
        done = _craft("report", "--name", "small", "--runs", str(runs))
    assert done.exit_code == 1
    assert "process id" in done.stderr
