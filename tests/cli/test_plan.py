"""``craft-fast plan`` as a user types it, on the tiny default: a table, JSON, exit codes, and nothing written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from craft_cli.commands.plan import command_line, plan_lines
from craft_cli.main import app
from craft_cli.request import Request
from craft_fast.budget import GIB, Machine, ModelShape, with_changes
from craft_fast.pipeline import STAGES
from craft_fast.plan import Plan, plan
from craft_fast.sdxl import published
from craft_fast.settings_io import load_settings
from tests.cli.conftest import Craft

SDXL = ModelShape(published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the working one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["plan", *args], prog_name="craft-fast")


def test_the_table_names_every_stage_and_nothing_is_written(craft: Craft, tmp_path: Path) -> None:
    done = craft("plan", "--no-probe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert [name for name in rows if name in STAGES] == list(STAGES)
    assert "run it: craft-fast run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_with_the_probe(here: Path) -> None:
    done = invoke("--json", "--set", "generate.batch_size=4", "--set", "train.micro_batch_size=4")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    [result] = [line for line in lines if line["event"] == "result"]
    assert result["fits"] is True
    assert result["probe"]["train_s"] > 0
    train = next(stage for stage in result["stages"] if stage["name"] == "train")
    assert train["state"] == "new"
    assert train["seconds"] > 0
    assert result["seconds"] >= train["seconds"]
    assert list(here.iterdir()) == []


def test_what_does_not_fit_is_exit_code_5_with_the_command_that_would(here: Path) -> None:
    done = invoke(
        "--no-probe", "--vram", "0.75", "--set", "train.gradient_checkpointing=none",
        "--set", "train.micro_batch_size=64",
    )  # fmt: skip
    assert done.exit_code == 5, done.stdout
    assert "DOES NOT FIT" in done.stdout
    assert "settings that fit, cheapest first" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("run it: "))
    words = shlex.split(command.removeprefix("run it: craft-fast run"))
    again = invoke("--no-probe", *words)
    assert again.exit_code == 0, again.stdout + again.stderr


def test_where_nothing_helps_that_is_said(here: Path) -> None:
    done = invoke("--no-probe", "--vram", "0.1")
    assert done.exit_code == 5
    assert "Nothing here makes this run fit" in done.stderr


def test_a_wrong_setting_is_still_a_config_error(here: Path) -> None:
    done = invoke("--set", "train.rnak=3")
    assert done.exit_code == 3


def test_prompts_are_counted_and_not_kept(here: Path) -> None:
    done = invoke("--no-probe", "--json", "-p", "a red circle", "-p", "a blue square")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["made"]["groups"] == 2
    assert "-p 'a red circle' -p 'a blue square'" in result["command"]
    assert list(here.iterdir()) == []


def planned(gib: float, tmp_path: Path, **changes: Any) -> Plan:
    settings = with_changes(load_settings("sdxl"), {"train.method": "qlora", "engine.resident": "never", **changes})
    return plan(tmp_path / "run", settings, machine=Machine("a card", True, int(gib * GIB)))


def test_lines_for_a_card_that_is_too_small(tmp_path: Path) -> None:
    found = planned(8, tmp_path, **{"generate.batch_size": 64})
    text = "\n".join(plan_lines(found, "craft-fast run X"))
    assert "a card, 8.0 GiB" in text
    assert "DOES NOT FIT: UNet, 64 images at once guided" in text
    assert "--set generate.batch_size=" in text
    assert text.endswith("run it: craft-fast run X")


def test_a_card_that_nothing_makes_fit_gets_no_command(tmp_path: Path) -> None:
    lines = plan_lines(planned(2, tmp_path), "craft-fast run X")
    assert "run it" not in "\n".join(lines)
    assert any("not enough" in line for line in lines)


@pytest.mark.parametrize(
    ("request_", "texts", "more", "expected"),
    [
        (Request(), (), (), "craft-fast run"),
        (Request("sea", preset="sdxl", vram_gib=8.0), (), ["--set train.rank=8"],
         "craft-fast run --name sea --preset sdxl --vram 8 --set train.rank=8"),
        (Request(runs=Path("my runs"), prompts="a b.txt", offline=True, max_images=9), (), (),
         "craft-fast run 'a b.txt' --max-images 9 --offline --runs 'my runs'"),
    ],
)  # fmt: skip
def test_the_command_is_the_run_that_was_planned(request_: Request, texts: Any, more: Any, expected: str) -> None:
    assert command_line(request_, texts, more) == expected
