"""``craft-fast rewards install`` and ``verify``, as typed; the packages themselves are tried in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.store.atomic import write_json
from tests.unit.official_rewards import write_official
from tests.unit.stand_in import finish, make_stand_in


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed, nothing was fetched."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickscore")
    write_official(folder, "pickscore")
    write_json(folder / "reward.json", {"family": "clip", "score_scale": "logit_scale"})
    return folder


def rewards(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["rewards", *args], prog_name="craft-fast")
    assert done.exit_code == code, done.output
    return done


def last(done: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_dry_run_prints_what_would_run(cache: Path) -> None:
    venv, pip = rewards("install", "hpsv2", "--torch", "2.14.1", "--dry-run").stdout.splitlines()
    folder = venv.split()[-1]
    assert " -m venv " in venv
    assert Path(folder).parent == cache / "craft-fast" / "packages"
    assert pip.startswith(f"{folder}/bin/python -m pip install ")
    assert "hpsv2x==1.2.0" in pip
    assert pip.endswith("torch==2.14.1 torchvision==0.29.1")
    assert not cache.exists()
    told = last(rewards("install", "image-reward", "--dry-run", "--json"))
    assert told["installed"] is False
    assert {"image-reward==1.5", "transformers==4.54.1", "timm==0.6.13"} <= set(told["requirements"])
    here = torch.__version__.partition("+")[0]
    assert f"torch=={here}" in told["requirements"], "the release in use here, unless told"


def test_what_is_there_is_not_made_again(cache: Path) -> None:
    told = last(rewards("install", "hpsv2", "--dry-run", "--json"))
    make_stand_in(Path(told["folder"]))
    finish(Path(told["folder"]))
    again = last(rewards("install", "hpsv2", "--json"))
    assert again["folder"] == told["folder"]
    assert again["versions"]["hpsv2x"] == "1.2.0"
    old = cache / "craft-fast" / "packages" / "hpsv2-old"
    finish(make_stand_in(old))
    said = rewards("install", "hpsv2").stdout
    assert "hpsv2x 1.2.0 (torch 2.14.1)" in said
    assert f"rm -r {old}" in said


def test_wrong_words_are_refused() -> None:
    assert "known are hpsv2, image-reward" in rewards("install", "hps", code=2).output
    assert "--torch 2.14.1" in rewards("install", "hpsv2", "--torch", "1.13", code=2).output
    rewards("install", "hpsv2", "--torch", "2.14.1", "--system-site-packages", code=2)
    assert "--path needs one NAME" in rewards("verify", "--path", ".", code=2).output
    assert "--dtype" in rewards("verify", "--dtype", "int8", code=2).output


def test_verify_holds_a_folder_against_plain_transformers(pickscore: Path) -> None:
    done = rewards("verify", "mine", "--path", str(pickscore), "--json", "--tolerance", "1e-5")
    found = last(done)
    assert found["ok"] is True
    assert found["missing"] == []
    (one,) = found["compared"]
    assert one["reward"] == "mine"
    assert one["largest"] <= one["allowed"] < 1e-3
    assert [half["dtype"] for half in one["deviations"]] == ["float16", "bfloat16"]
    assert one["deviations"][0]["largest"] > one["largest"]
    said = rewards("verify", "mine", "--path", str(pickscore), "--dtype", "none", "-p", "a cat").stdout
    assert "transformers" in said
    assert "float16" not in said


def test_beyond_the_tolerance_is_exit_code_7(pickscore: Path) -> None:
    done = rewards("verify", "mine", "--path", str(pickscore), "--tolerance", "0", "--dtype", "none", code=7)
    assert "TOO FAR" in done.output
    assert "does not score as its reference does" in done.output
    assert "craft-fast rewards fetch" in done.output


def test_pictures_of_ones_own_are_taken(pickscore: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "p").mkdir()
    Image.new("RGBA", (300, 200), (200, 30, 40, 128)).save(tmp_path / "p" / "one.png")
    done = rewards(
        "verify", "mine", "--path", str(pickscore), "--images", "p", "-p", "a", "-p", "b", "--dtype", "none", "--json"
    )
    assert last(done)["compared"][0]["pairs"] == 2
    rewards("verify", "mine", "--path", str(pickscore), "--images", "nowhere", code=2)


def test_what_is_missing_is_named_with_the_next_command() -> None:
    done = rewards("verify", "--dtype", "none", code=4)
    assert "No reward could be compared" in done.output
    for name in ("hpsv2.1", "pickscore", "mps", "clipscore-b32"):
        assert f"craft-fast rewards fetch {name}" in done.output
    named = CliRunner().invoke(app, ["rewards", "verify", "hpsv2.1", "--json"], prog_name="craft-fast")
    assert named.exit_code == 4
    events = [json.loads(line) for line in named.stdout.splitlines()]
    result = next(event for event in events if event["event"] == "result")
    assert [one["reward"] for one in result["missing"]] == ["hpsv2.1"]
    assert "rewards fetch hpsv2.1" in result["missing"][0]["fix"]
    assert "did you mean hpsv2.1" in rewards("verify", "hpsv21", code=2).output
