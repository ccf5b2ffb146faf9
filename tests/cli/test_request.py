"""Which run and which settings a command line means."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from craft_cli.request import Request, resolve
from craft_fast.errors import ConfigError, UsageError
from craft_fast.settings_io import load_settings, render_yaml


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _save(root: Path, *overrides: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(render_yaml(load_settings("tiny", None, overrides)), encoding="utf-8")


@pytest.mark.parametrize(
    ("request_", "root"),
    [
        (Request(), "runs/tiny"),
        (Request(preset="sdxl"), "runs/sdxl"),
        (Request(preset="sdxl", config=Path("sea.yaml")), "runs/sea"),
        (Request(name="a.b-c_1", config=Path("sea.yaml")), "runs/a.b-c_1"),
        (Request(name="x", runs=Path("/data/r")), "/data/r/x"),
    ],
)
def test_the_folder_of_a_run(request_: Request, root: str) -> None:
    assert request_.root == Path(root)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", ".hidden", "-n", "a b", "x" * 101, "a\n", "sea\x1b[31m"])
def test_a_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(UsageError):
        _ = Request(name=name).root


def test_a_chosen_name_is_said() -> None:
    assert "runs/tiny" in resolve(Request()).notes[0]
    assert resolve(Request(name="x")).notes == ()


def test_saved_settings_are_the_base_of_the_next_command() -> None:
    _save(Path("runs/x"), "train.rank=4", "seed=9", "rewards.p=null", "filter.rewards=[h, a]")
    settings = resolve(Request(name="x", overrides=["train.steps=7"])).settings
    assert (settings.train.rank, settings.seed, settings.train.steps) == (4, 9, 7)
    assert "p" not in settings.rewards


def test_a_preset_or_a_file_goes_before_saved_settings() -> None:
    _save(Path("runs/x"), "train.rank=4")
    assert resolve(Request(name="x", preset="tiny")).settings == load_settings("tiny")
    Path("mine.yaml").write_text("train: {rank: 5}")
    assert resolve(Request(name="x", config=Path("mine.yaml"))).settings.train.rank == 5


def test_a_change_of_settings_is_said() -> None:
    _save(Path("runs/x"), "train.rank=4")
    assert resolve(Request(name="x")).notes == ()
    (note,) = resolve(Request(name="x", overrides=["train.rank=8"])).notes
    assert "train.rank 4 -> 8" in note


def test_prompts_of_the_command_line_are_kept_with_the_run(tmp_path: Path) -> None:
    texts = ["a red circle", "# not a comment", 'say "hi", x', "zwölf große Boxkämpfer"]
    settings = resolve(Request(name="x", texts=texts)).settings
    file = Path(settings.prompts.file)
    assert file.parent == tmp_path / "runs/x"
    assert [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()] == texts
    assert resolve(Request(name="x", texts=texts)).settings == settings
    assert resolve(Request(name="x", texts=texts[:1])).settings.prompts.file != str(file)


def test_prompts_of_the_command_line_move_with_the_run(tmp_path: Path) -> None:
    settings = resolve(Request(name="x", texts=["a red circle"])).settings
    (tmp_path / "runs/x/config.yaml").write_text(render_yaml(settings), encoding="utf-8")
    shutil.move("runs/x", "runs/y")
    moved = resolve(Request(name="y")).settings.prompts.file
    assert Path(moved).is_file()
    assert Path(moved).parent == tmp_path / "runs/y"


@pytest.mark.parametrize("name", ["p.txt", "a: b.txt", "null", "x # y.txt", "ü'\".txt", "{z}.txt", "12"])
def test_any_file_name_survives(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a red circle")
    assert resolve(Request(name="x", prompts=name)).settings.prompts.file == str(tmp_path / name)


def test_a_missing_prompt_file_names_the_closest_and_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle")
    with pytest.raises(ConfigError) as caught:
        resolve(Request(name="x", prompts="promts.txt"))
    assert caught.value.where == str(tmp_path / "promts.txt")
    assert str(tmp_path / "prompts.txt") in caught.value.hint
    with pytest.raises(ConfigError, match="no such prompt file"):
        resolve(Request(name="x", prompts="no/such/folder.txt"))
    assert not (tmp_path / "runs").exists()


def test_package_prompts_stay_as_they_are() -> None:
    uri = "package:craft_fast.tiny/assets/prompts/train.txt"
    assert resolve(Request(name="x", prompts=uri)).settings.prompts.file == uri


def test_budgets_are_settings() -> None:
    generate = resolve(Request(name="x", max_images=12, max_minutes=1.5)).settings.generate
    assert (generate.max_images, generate.max_minutes) == (12, 1.5)
    with pytest.raises(ConfigError, match="right"):
        resolve(Request(name="x", max_minutes=-1))


def test_the_cap_and_the_network_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    settings = resolve(Request(name="x", vram_gib=5.5, offline=True)).settings
    assert (settings.engine.vram_gib, settings.model.offline) == (5.5, True)
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    assert resolve(Request(name="x")).settings.engine.vram_gib is None
    _save(Path("runs/x"), "model.offline=true", "engine.vram_gib=8")
    assert resolve(Request(name="x")).settings.model.offline
    again = resolve(Request(name="x", offline=False, vram_gib=1e-5)).settings
    assert (again.model.offline, again.engine.vram_gib) == (False, 1e-5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_that_is_no_amount_is_a_setting_not_right(wrong: float) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Request(name="x", vram_gib=wrong))
    assert "engine.vram_gib: found" in caught.value.why


def test_prompts_come_in_one_way() -> None:
    with pytest.raises(UsageError):
        resolve(Request(name="x", prompts="a.txt", texts=["b"]))
    assert not Path("runs").exists()


def test_a_run_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UsageError) as caught:
        Request(name="x").existing_root()
    assert "craft-fast run --name x" in caught.value.hint
    for name in ("sea", "sky"):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "manifest.sqlite").touch()
    with pytest.raises(UsageError) as caught:
        Request(name="x").existing_root()
    assert "sea, sky" in caught.value.hint
    assert Request(name="sky").existing_root() == Path("runs/sky")


def test_the_command_for_the_same_run() -> None:
    assert Request(name="x").command("train") == "craft-fast train --name x"
    assert Request(name="x", runs=Path("/my runs")).command("run") == "craft-fast run --name x --runs '/my runs'"
