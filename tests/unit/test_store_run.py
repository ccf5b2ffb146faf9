"""Run folders: the one-writer lock, the log, digests, and where things are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craft_fast.errors import CraftError, EnvironmentProblem, ExitCode, UsageError
from craft_fast.records import FileRef
from craft_fast.store import atomic, digest
from craft_fast.store.run import open_run, read_log, resolve_uri

HOLDER = """
import sys
from pathlib import Path
from craft_fast.store.run import open_run
with open_run(Path(sys.argv[1]), create=True):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_told_the_owners_pid(tmp_path: Path) -> None:
    root = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(CraftError, match="Another process") as caught, open_run(root, create=True):
            pass
        assert caught.value.exit_code == ExitCode.FAILED
        assert str(owner.pid) in caught.value.why
        with open_run(root, read_only=True) as run:
            assert run.manifest.stages() == []
        owner.kill()
        owner.wait()
    with open_run(root) as run:
        run.manifest.set_meta("a", "1")
    assert (root / ".lock").read_text().strip() == str(os.getpid())


def test_a_missing_run_is_a_usage_error_and_makes_nothing(tmp_path: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(UsageError), open_run(tmp_path / "no", read_only=read_only):
            pass
    assert not (tmp_path / "no").exists()


def test_the_log_survives_half_a_line_and_odd_values(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with open_run(root, create=True) as run:
        run.log("one", loss=float("nan"), where=Path("x"), nested={"a": [float("inf")]})
    with open(root / "log.jsonl", "a") as file:
        file.write('{"event": "ha')
    with open_run(root) as run:
        run.log("two", text="é\n<script>")
        events = read_log(run)
    assert [event["event"] for event in events] == ["one", "two"]
    assert events[0]["loss"] == "nan"
    assert events[0]["nested"] == {"a": ["inf"]}
    assert events[1]["text"] == "é\n<script>"
    lines = (root / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == events[1]


def test_opening_for_writing_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with open_run(root, create=True):
        pass
    leftover = root / f".x.1-1{atomic.TEMP_SUFFIX}"
    leftover.write_bytes(b"half")
    with open_run(root, read_only=True):
        assert leftover.exists()
    with open_run(root):
        assert not leftover.exists()


def test_paths_stay_inside_and_refs_are_relative(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        with pytest.raises(CraftError, match="leave"):
            run.path("..", "x")
        written = atomic.write_bytes(run.path("candidates", "a"), b"abc")
        assert run.ref(run.path("candidates", "a")) == FileRef("candidates/a", written.sha256, 3)


def test_resolve_uri(tmp_path: Path) -> None:
    assert resolve_uri(str(tmp_path)) == tmp_path.resolve()
    assert resolve_uri("stabilityai/stable-diffusion-xl-base-1.0") == "stabilityai/stable-diffusion-xl-base-1.0"
    inside = resolve_uri("package:craft_fast.store/atomic.py")
    assert isinstance(inside, Path)
    assert inside.is_file()
    missing = [
        "package:craft_fast.store/no",
        "package:no_such_package/x",
        "./no",
        "/no/such",
        "a/b/c",
        "prompts/no.txt",
    ]
    for uri in missing:
        with pytest.raises(EnvironmentProblem):
            resolve_uri(uri)


def test_folder_digest_follows_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.json").write_text("{}")
    (tmp_path / "w.safetensors").write_bytes(b"123")
    (tmp_path / "README.md").write_text("one")
    first = digest.digest_folder(tmp_path)
    (tmp_path / "README.md").write_text("two")
    assert digest.digest_folder(tmp_path) == first
    (tmp_path / "w.safetensors").write_bytes(b"1234")
    second = digest.digest_folder(tmp_path)
    (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    assert len({first, second, digest.digest_folder(tmp_path)}) == 3
    with pytest.raises(EnvironmentProblem):
        digest.digest_folder(tmp_path / "no")


def test_json_digest_is_canonical() -> None:
    assert digest.digest_json({"b": (1, 2), "a": "é"}) == digest.digest_json({"a": "é", "b": [1, 2]})
    assert digest.digest_json({"a": 1}) != digest.digest_json({"a": 1.5})
