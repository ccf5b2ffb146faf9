"""``craft-fast rewards list`` and ``fetch``, with small files of a server on this machine in the models' places."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.config import OFFICIAL_REWARDS
from craft_fast.rewards import shelf
from craft_fast.rewards.catalog import OFFICIALS, Asset
from craft_fast.rewards.transfer import part_of
from tests.unit.file_server import Served, Server, running


def small(asset: Asset) -> tuple[Asset, bytes]:
    """The asset with content of a few kB in its place."""
    data = hashlib.sha256(asset.key.encode()).digest() * 100
    return replace(asset, size=len(data), exact=True, sha256=hashlib.sha256(data).hexdigest(), also=()), data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CRAFT_FAST_REWARDS", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        for name, official in list(OFFICIALS.items()):
            pairs = [small(asset) for asset in official.assets]
            monkeypatch.setitem(OFFICIALS, name, replace(official, assets=tuple(asset for asset, _ in pairs)))
            for asset, data in pairs:
                server.add(f"/{asset.repository}/resolve/{asset.revision}/{asset.file}", Served(data))
        yield server


def rewards(*args: str) -> Result:
    return CliRunner().invoke(app, ["rewards", *args], prog_name="craft-fast")


def result_of(done: Result, event: str = "result") -> dict[str, Any]:
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return next(found for found in events if found["event"] == event)


def test_the_list_fits_a_screen_and_names_every_model(hub: Server) -> None:
    done = rewards("list")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    assert [line.split()[0] for line in lines[1:-1:2]] == list(OFFICIAL_REWARDS)
    assert all("missing" in line for line in lines[1:-1:2])
    assert "hpsv2: not installed" in lines[1]
    assert "100 x cosine" in done.stdout
    assert "2.5 x cosine" in done.stdout
    assert str(shelf.shelf()) in lines[-1]
    assert hub.requests == []
    assert rewards("list", "--quiet").output == ""


def test_verbose_and_json_have_each_files_address_and_path(hub: Server) -> None:
    done = rewards("list", "--verbose")
    models = result_of(rewards("list", "--json"))["rewards"]
    assert [model["name"] for model in models] == list(OFFICIAL_REWARDS)
    for model in models:
        for file in model["files"]:
            assert file["path"] in done.stdout
            assert file["url"] in done.stdout
            assert file["state"] == "missing"
    mps = next(model for model in models if model["name"] == "mps")
    assert "re-upload" in mps["title"]
    assert (mps["held_out_advised"], mps["package"], mps["complete"]) == (True, None, False)


def test_fetch_brings_shared_files_once_and_the_list_sees_them(hub: Server) -> None:
    done = rewards("fetch", "hpsv2.1", "clipscore-l14", "hpsv2.1")
    assert done.exit_code == 0, done.output
    paths = sorted(path for path, _ in hub.requests)
    assert len(paths) == len(set(paths)) == 5
    models = {model["name"]: model for model in result_of(rewards("list", "--json"))["rewards"]}
    assert {name for name, model in models.items() if model["complete"]} == {"hpsv2.1", "clipscore-l14"}
    assert {file["state"] for file in models["hpsv2.1"]["files"]} == {"here"}
    assert "3.2 kB missing" in rewards("list").stdout
    again = rewards("fetch", "hpsv2.1", "--json")
    assert result_of(again)["files"] == []
    assert len(hub.requests) == 5


def test_json_says_what_came_and_how_far_it_is(hub: Server) -> None:
    done = rewards("fetch", "mps", "--json")
    assert done.exit_code == 0
    result = result_of(done)
    assert (result["rewards"], result["fetched"]) == (["mps"], True)
    assert [file["bytes"] for file in result["files"]] == [3200, 3200, 3200]
    assert all(Path(file["path"]).stat().st_size == 3200 for file in result["files"])
    progress = result_of(done, "progress")
    assert (progress["label"], progress["done"], progress["unit"]) == ("RE-N-Y/mpsv1 model.safetensors", 4, "kB")


def test_a_dry_run_only_tells(hub: Server) -> None:
    done = rewards("fetch", "--all", "--dry-run")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "15 files, about 48 kB; nothing was fetched"
    assert str(shelf.shelf() / "RE-N-Y--mpsv1" / "model.safetensors") in done.stdout
    assert f"{hub.address}/RE-N-Y/mpsv1/resolve/main/model.safetensors" in done.stdout
    assert hub.requests == []
    assert not shelf.shelf().exists()
    assert len(result_of(rewards("fetch", "--all", "--dry-run", "--json"))["files"]) == 15


def test_offline_is_exit_code_4_with_every_path(hub: Server) -> None:
    done = rewards("fetch", "image-reward", "--offline")
    assert done.exit_code == 4
    for asset in OFFICIALS["image-reward"].assets:
        assert f"put it at {shelf.place(asset)}\n" in done.stderr
    assert "craft-fast rewards fetch image-reward" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("pickscor",), "did you mean pickscore?"),
        ((), "No reward model is named"),
        (("mps", "--all"), "exclude each other"),
        (("mps", "--json", "--quiet"), "exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_exit_code_2(hub: Server, args: tuple[str, ...], said: str) -> None:
    done = rewards("fetch", *args)
    assert done.exit_code == 2
    assert said in done.stderr
    assert hub.requests == []


def test_a_wrong_file_is_exit_code_6_and_the_fix_is_told(hub: Server) -> None:
    hub.files["/RE-N-Y/mpsv1/resolve/main/model.safetensors"].data = b"x" * 3200
    done = rewards("fetch", "mps")
    assert done.exit_code == 6
    assert "wrong sha256" in done.stderr
    place = shelf.place(OFFICIALS["mps"].assets[0])
    assert list(place.parent.glob("model.*")) == []
    place.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"damaged: {place}: it is a pointer of Git LFS" in rewards("list").stdout
    done = rewards("fetch", "mps")
    assert done.exit_code == 6
    assert f"rm '{place}'" in done.stderr
    place.write_bytes(b"x" * 3200)  # of the right size, so that only its sha256 can tell
    hub.files["/RE-N-Y/mpsv1/resolve/main/model.safetensors"].data = small(OFFICIALS["mps"].assets[0])[1]
    assert rewards("fetch", "mps").exit_code == 6
    place.unlink()
    assert rewards("fetch", "mps").exit_code == 0


_SMALL_CATALOG = """
import sys
from dataclasses import replace
from craft_fast.rewards.catalog import OFFICIALS, Asset
OFFICIALS["mps"] = replace(OFFICIALS["mps"], assets=(Asset("weights", "own/model", "big.safetensors", 4_000_000),))
from craft_cli.main import main
sys.argv = ["craft-fast", "rewards", "fetch", "mps"]
main()
"""


def test_ctrl_c_keeps_what_came_and_the_same_command_continues(hub: Server, craft_env: dict[str, str]) -> None:
    data = bytes(range(200)) * 20_000
    url = "/own/model/resolve/main/big.safetensors"
    served = hub.add(url, Served(data, cuts=[150_000], pause_s=20))
    hub_env = {name: os.environ[name] for name in ("CRAFT_FAST_REWARDS", "HF_ENDPOINT", "HF_HUB_CACHE")}
    command = [sys.executable, "-c", _SMALL_CATALOG]
    env = {**craft_env, **hub_env, "HF_HUB_OFFLINE": "0"}
    running = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    place = shelf.shelf() / "own--model" / "big.safetensors"
    try:
        until = time.monotonic() + 30
        while not (part_of(place).is_file() and part_of(place).stat().st_size == 150_000):
            assert time.monotonic() < until, running.poll()
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        time.sleep(0.1)  # the signal is heard while the server says nothing; the next bytes end it
        hub.go_on.set()
        _, told = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, told
    assert "the same command continues" in told
    assert not place.exists()
    served.pause_s = 0
    assert subprocess.run(command, env=env, check=False, timeout=30).returncode == 0
    assert place.read_bytes() == data
    assert int((hub.ranges()[-1] or "").strip("bytes=-")) >= 150_000
