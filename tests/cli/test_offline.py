"""``--offline``: no socket is opened, whatever the settings name, and the error says which files to get.

Each command is a process of its own whose sockets are watched: an attempt to look up or reach another machine is
written down and fails, as without a network.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
from typer.testing import CliRunner

import craft_fast.tiny
from craft_cli.main import app

ASSETS = Path(craft_fast.tiny.__path__[0]) / "assets"
CPU = ("--set", "model.device=cpu")
WATCH = """
import os, socket

def _refuse(*args, **kwargs):
    with open(os.environ["WATCHED"], "a") as file:
        print(args, file=file)
    raise OSError("no network in this test")

socket.getaddrinfo = socket.create_connection = _refuse
socket.socket.connect = socket.socket.connect_ex = _refuse
"""
Watched = Callable[..., tuple[Any, str]]


@pytest.fixture
def watched(tmp_path: Path, craft: Callable[..., Any], craft_env: dict[str, str]) -> Watched:
    """``watched("run", ...)``: the finished process, and what it tried to reach."""
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    log = folder / "log"

    def call(*args: str, **env: str) -> tuple[Any, str]:
        log.write_text("")
        path = os.pathsep.join([str(folder), craft_env["PYTHONPATH"]])
        hub = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        done = craft(*args, cwd=tmp_path, env={"PYTHONPATH": path, "WATCHED": str(log), **hub, **env})
        return done, log.read_text()

    return call


def put_into_hub_cache(home: Path, hub_id: str, folder: Path) -> None:
    """As ``hf download`` would leave it."""
    repo = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)


@pytest.mark.parametrize(
    ("overrides", "hub_id"),
    [
        (["model.path=nobody/sdxl"], "nobody/sdxl"),
        (["model.vae=nobody/vae"], "nobody/vae"),
        (["rewards.h.path=nobody/judge"], "nobody/judge"),
        (["expand.kind=transformers", "expand.model=nobody/lm"], "nobody/lm"),
    ],
)
def test_what_is_not_here_is_an_error_that_says_how_to_get_it(
    overrides: list[str], hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process the hub's client is loaded already, so that its environment variable comes too late."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    tried: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    for place, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(place, name, refuse)
    options = [word for one in overrides for word in ("--set", one)]
    done = CliRunner().invoke(app, ["run", *CPU, *options, "--until", "expand", "--offline"], prog_name="craft-fast")
    assert done.exit_code == 4, done.output
    assert tried == []
    assert f"hf download {hub_id} " in done.stderr


def test_without_the_option_the_hub_is_asked(watched: Watched) -> None:
    """Shows that the watch sees what it must."""
    done, tried = watched("run", *CPU, "--set", "rewards.h.path=nobody/judge", "--until", "expand", "--offline")
    assert (done.returncode, tried) == (4, "")
    # The run keeps what it was told, until it is told otherwise.
    assert watched("expand", *CPU)[1] == ""
    assert "huggingface.co" in watched("expand", *CPU, "--online")[1]


def test_what_the_hubs_cache_holds_is_used(watched: Watched, tmp_path: Path) -> None:
    put_into_hub_cache(tmp_path / "hf", "me/sdxl", ASSETS / "sdxl")
    put_into_hub_cache(tmp_path / "hf", "me/judge", ASSETS / "rewards" / "h")
    options = ("--set", "model.path=me/sdxl", "--set", "rewards.h.path=me/judge", *CPU)
    done, tried = watched("doctor", *options, "--offline", "--json")
    assert (done.returncode, tried) == (0, ""), done.stdout + done.stderr
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert "models--me--sdxl/snapshots" in checks["model"]["found"]
    assert "models--me--judge/snapshots" in checks["reward h"]["found"]
    small = ("--set", "generate.num_inference_steps=1", "--max-images", "8", "--set", "filter.block_groups=2")
    done, tried = watched("run", *options, *small, "--until", "score", "--offline")
    assert (done.returncode, tried) == (0, ""), done.stdout + done.stderr
    with sqlite3.connect(tmp_path / "runs/tiny/manifest.sqlite") as manifest:
        tables = [row[0] for row in manifest.execute("select name from sqlite_master where type = 'table'")]
        assert "scores" in tables
        assert manifest.execute("select count(*) from scores").fetchone()[0] > 0


def test_the_doctor_asks_no_network_at_all(watched: Watched) -> None:
    done, tried = watched("doctor", "--preset", "sdxl-8gb")
    assert "a run fetches it first" in done.stdout
    assert tried == ""
