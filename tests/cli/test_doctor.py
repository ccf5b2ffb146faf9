"""``craft-fast doctor`` on this machine: what is there, and faults that are made for it to find."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
from typer.testing import CliRunner, Result

import craft_fast.tiny
from craft_cli.main import app

ASSETS = Path(craft_fast.tiny.__path__[0]) / "assets"
CPU = ("--set", "model.device=cpu")


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path / "shelf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # --offline changes these two in this process
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")


def doctor(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="craft-fast")


def checked(*args: str) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """Exit code, the result object, and its checks by name."""
    done = doctor(*args, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["result", "error"][: 2 if done.exit_code else 1], done.output
    result = events[0]
    assert len({check["check"] for check in result["checks"]}) == len(result["checks"])
    assert all(check["fix"] for check in result["checks"] if check["result"] != "ok")
    return done.exit_code, result, {check["check"]: check for check in result["checks"]}


def test_the_embedded_default_lacks_nothing_here(tmp_path: Path) -> None:
    code, result, checks = checked(*CPU)
    assert (code, result["ok"], result["failed"], result["run"]) == (0, True, 0, "tiny")
    expected = ["python", "packages", "memory", "disk", "fsync", "torch", "driver", "gpu", "threads", "model"]
    assert list(checks)[: len(expected)] == expected
    assert {"reward h", "reward oracle", "arithmetic", "bitsandbytes", "triton"} <= set(checks)
    assert checks["torch"]["found"].startswith(torch.__version__)
    assert f"torch {torch.__version__}" in checks["packages"]["found"]
    assert "NF4 works on cpu" in checks["bitsandbytes"]["found"]
    assert "float32 on cpu: right" in checks["arithmetic"]["found"]
    assert str(ASSETS / "sdxl") in checks["model"]["found"]
    assert "predicts epsilon" in checks["model"]["found"]
    assert list(tmp_path.iterdir()) == []  # not even the folder of the runs


def test_a_machine_without_a_gpu_is_warned_and_one_that_must_have_it_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, checks = checked()
    assert (code, checks["gpu"]["result"], checks["driver"]["result"]) == (0, "warn", "warn")
    code, _, checks = checked("--set", "model.device=cuda")
    assert (code, checks["gpu"]["result"], checks["driver"]["result"]) == (4, "fail", "fail")
    code, _, checks = checked(*CPU)
    assert (code, checks["gpu"]["result"], checks["driver"]["result"]) == (0, "ok", "ok")


def test_a_gpu_that_is_not_there_fails() -> None:
    done = doctor("--set", "model.device=cuda:9")
    assert done.exit_code == 4
    assert "FAIL  gpu" in done.stdout
    assert "model.device is cuda:9" in done.stdout
    assert "--set model.device=cpu" in done.stderr


def test_lines_for_a_person_say_what_to_type(tmp_path: Path) -> None:
    done = doctor(*CPU, "--set", "rewards.h.path=./gone")
    assert done.exit_code == 4
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok    python")
    at = next(i for i, line in enumerate(lines) if line.startswith("FAIL  reward h"))
    assert "./gone" in lines[at]
    assert lines[-1].endswith("checks: 1 failed, 0 to know of")
    assert done.stderr.startswith("Error: This machine lacks something that the run needs\n  where: reward h")


def test_quiet_says_nothing_when_all_is_well_and_the_error_when_not() -> None:
    done = doctor(*CPU, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    done = doctor(*CPU, "--quiet", "--set", "model.path=./gone")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "where: model" in done.stderr


def test_a_file_in_place_of_the_folder_of_runs_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    code, _, checks = checked(*CPU)
    assert (code, checks["disk"]["result"]) == (4, "fail")
    assert f"no file can be made at {tmp_path / 'runs'}: Not a directory" in checks["disk"]["found"]
    assert "--runs DIR" in checks["disk"]["fix"]
    assert "fsync" not in checks
    assert (tmp_path / "runs").read_text() == "mine"


def test_nothing_is_left_in_the_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code, _, checks = checked(*CPU, "--runs", "there")
    assert code == 0
    assert str(tmp_path / "there") in checks["disk"]["found"]
    assert "ms for 4 KiB (median of 64" in checks["fsync"]["found"]
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: shutil.rmtree(model / "unet"), "unet"),
        (lambda model: (model / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda model: cut(model / "unet/diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model"),
        (lambda model: shutil.rmtree(model), "There is no such file or folder"),
    ],
)
def test_a_model_that_is_not_whole_fails(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "sdxl", tmp_path / "model")
    assert checked(*CPU, "--set", "model.path=./model")[0] == 0
    damage(tmp_path / "model")
    code, _, checks = checked(*CPU, "--set", "model.path=./model")
    assert (code, checks["model"]["result"]) == (4, "fail")
    assert said in checks["model"]["found"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "no weights"),
        ("tokenizer", "no tokenizer"),
        ("reward.json", "reward.json"),
        ("head.safetensors", "head.safetensors"),
    ],
)
def test_a_reward_that_is_not_whole_fails(name: str, said: str, tmp_path: Path) -> None:
    which = "a" if name in {"head.safetensors", "reward.json"} else "h"
    folder = tmp_path / which
    shutil.copytree(ASSETS / "rewards" / which, folder)
    chosen = (*CPU, "--set", f"rewards.{which}.path={folder}")
    assert checked(*chosen)[0] == 0
    for path in folder.glob("tokenizer*" if name == "tokenizer" else name):
        path.unlink()
    if name == "tokenizer":
        for path in (*folder.glob("vocab.*"), *folder.glob("merges.txt")):
            path.unlink()
    code, _, checks = checked(*chosen)
    assert (code, checks[f"reward {which}"]["result"]) == (4, "fail")
    assert said in checks[f"reward {which}"]["found"]


def test_a_function_that_is_not_there_fails() -> None:
    code, _, checks = checked(*CPU, "--set", "rewards.oracle.path=craft_fast.tiny.oracle:gone")
    assert (code, checks["reward oracle"]["result"]) == (4, "fail")
    assert "no callable 'gone'" in checks["reward oracle"]["found"]


def test_what_a_hub_has_is_a_warning_and_offline_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tests/cli/test_offline.py`` shows that the network is not asked."""
    chosen = ["model.path=nobody/sdxl", "rewards.h.path=nobody/h", "expand.kind=transformers", "expand.model=nobody/lm"]
    options = [*CPU, *(word for one in chosen for word in ("--set", one))]
    code, _, checks = checked(*options)
    assert code == 0
    for name, hub_id in (("model", "nobody/sdxl"), ("reward h", "nobody/h"), ("expander", "nobody/lm")):
        assert checks[name]["result"] == "warn"
        assert f"hf download {hub_id} " in checks[name]["fix"]
        assert checks[name]["found"].startswith(f"{hub_id} (")
    assert "about 14 GiB are to be fetched" in checks["hub cache"]["found"]
    code, _, checks = checked(*options, "--offline")
    assert code == 4
    assert [checks[name]["result"] for name in ("model", "reward h", "expander")] == ["fail"] * 3
    assert "hub cache" not in checks


def test_an_op_that_is_told_to_take_what_cannot_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, checks = checked(*CPU)
    assert (code, checks["triton"]["result"], checks["triton"]["fix"]) == (4, "fail", "unset CRAFT_KERNELS_IMPL")
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "cuda")
    assert "must be one of auto" in checked(*CPU)[2]["triton"]["found"]


def test_a_kernel_is_run_for_real(tmp_path: Path, craft: Callable[..., Any]) -> None:
    """In Triton's interpreter, which takes the place of a GPU here."""
    pytest.importorskip("triton")
    done = craft("doctor", "--json", *CPU, cwd=tmp_path, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert "a kernel was compiled and ran" in checks["triton"]["found"]


def test_a_run_is_looked_at_with_its_own_settings(tmp_path: Path) -> None:
    assert (
        CliRunner().invoke(app, ["init", "runs/sea/config.yaml", "--set", "rewards.p.path=./gone", *CPU]).exit_code == 0
    )
    code, result, checks = checked("--name", "sea")
    assert (code, result["run"]) == (4, "sea")
    assert checks["reward p"]["result"] == "fail"
    assert "./gone" in checks["reward p"]["found"]
    assert checked()[2]["reward p"]["result"] == "ok"


def test_settings_that_are_not_right_come_first() -> None:
    done = doctor("--set", "train.rnk=3")
    assert done.exit_code == 3
    assert done.stdout == ""
    assert doctor("--vram", "0").exit_code == 3
    assert doctor("--vram", "lots").exit_code == 2


def test_each_line_comes_when_it_is_known(tmp_path: Path, craft_start: Callable[..., subprocess.Popen[str]]) -> None:
    with craft_start("doctor", *CPU, cwd=tmp_path) as process:
        assert process.stdout is not None
        times = [time.monotonic() for _ in process.stdout]
    assert process.returncode == 0
    assert len(times) > 15
    assert times[-1] - times[0] > 0.3  # torch is imported after the first lines


JUDGES = ("reward h", "reward p", "reward a", "reward image_reward")


@pytest.mark.parametrize("preset", ["sdxl-6gb", "sdxl-paper"])
def test_a_full_size_preset_is_looked_at_without_its_weights(preset: str) -> None:
    """All of it is fetched by a run, so nothing fails; each warning has its own command."""
    code, _, checks = checked("--preset", preset)
    assert code == 0
    assert {checks[name]["result"] for name in ("model", *JUDGES)} == {"warn"}
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in checks["model"]["fix"]
    assert checks["reward h"]["fix"] == "craft-fast rewards fetch hpsv2.1"
    assert "3 files, 1.8 GiB, not on this machine" in checks["reward h"]["found"]
    assert "8.8 GiB are to be fetched" in checks["reward shelf"]["found"]


def test_offline_each_missing_file_of_a_judge_has_its_place(tmp_path: Path) -> None:
    code, _, checks = checked("--preset", "sdxl", "--offline")
    assert (code, {checks[name]["result"] for name in JUDGES}) == (4, {"fail"})
    told = checks["reward h"]["found"]
    for file in ("xswu--HPSv2/HPS_v2.1_compressed.pt", "openai--clip-vit-large-patch14/merges.txt"):
        assert str(tmp_path / "shelf" / file) in told
    assert "huggingface.co/xswu/HPSv2" in told
    assert "reward shelf" not in checks


def test_a_judge_whose_package_is_not_installed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path / "packages"))
    code, _, checks = checked("--preset", "sdxl", "--set", "rewards.h.backend=package")
    assert (code, checks["reward h"]["result"]) == (4, "fail")
    assert checks["reward h"]["fix"] == "craft-fast rewards install hpsv2"
