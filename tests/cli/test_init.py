"""``init`` writes settings that read back, never over a file of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.settings_io import load_settings


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_written_settings_read_back_equal(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", "sea.yaml", "--preset", "sdxl", "--set", "train.rank=32"])
    assert done.exit_code == 0, done.output
    settings = load_settings(config=tmp_path / "sea.yaml")
    assert settings == load_settings("sdxl", None, ["train.rank=32"])
    assert settings.train.rank == 32
    comments = [line for line in (tmp_path / "sea.yaml").read_text().splitlines() if line.lstrip().startswith("#")]
    assert len(comments) > 50
    assert "craft-fast run --config sea.yaml" in done.stdout


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    mine = tmp_path / "craft.yaml"
    mine.write_text("mine")
    refused = CliRunner().invoke(app, ["init"])
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert mine.read_text() == "mine"
    assert CliRunner().invoke(app, ["init", "--force"]).exit_code == 0
    assert "seed:" in mine.read_text()


def test_a_folder_is_refused_with_the_file_to_write(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert done.exit_code == 2
    assert f"craft-fast init {tmp_path}/craft.yaml" in done.stderr


def test_wrong_settings_write_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", "--set", "train.rnk=3", "--set", "train.steps=many"])
    assert done.exit_code == 3
    assert "train.rank" in done.stderr
    assert "train.steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_and_quiet(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", "deep/er/a.yaml", "--json"])
    assert json.loads(done.stdout)["path"] == "deep/er/a.yaml"
    done = CliRunner().invoke(app, ["init", "b.yaml", "--quiet"])
    assert done.output == ""
    assert (tmp_path / "b.yaml").exists()
    assert CliRunner().invoke(app, ["init", "c.yaml", "--quiet", "--json"]).exit_code == 2
