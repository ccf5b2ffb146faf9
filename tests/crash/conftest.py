"""A tiny random model, its settings, a launcher that kills, and the checks of what a kill leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards
from craft_fast.verify import verify_run

PROMPTS = [
    "red circle",
    "blue square",
    "green star",
    "yellow heart left of red circle",
    "black triangle",
    "pink square",
]
HELDOUT = ["orange circle", "purple star", "brown heart", "cyan diamond"]
# Clocks and pids differ between any two runs; everything else must not.
TIMED_FILES = {"manifest.sqlite", "manifest.sqlite-wal", "manifest.sqlite-shm", "log.jsonl", ".lock"}
TIMED_FILES |= {"report.html", "report.json"}


class Launcher:
    """The process that forks the runs; see ``launcher.py``."""

    def __init__(self) -> None:
        script = str(Path(__file__).parent / "launcher.py")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True)
        assert self._read() == {"ready": True}

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def run(
        self, argv: list[str], output: Path, *, kill_after: float | None = None, sabotage: str | None = None
    ) -> tuple[int, float]:
        """Exit code (or minus the signal) and seconds of one command."""
        order = {"argv": argv, "output": str(output), "kill_after": kill_after, "sabotage": sabotage}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        return int(answer["code"]), float(answer["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class World:
    """One settings file and the launcher; ``reference`` is the state after an undisturbed run."""

    folder: Path
    launcher: Launcher
    reference: State | None = None
    reference_s: float = 0.0

    def argv(self, name: str, *more: str) -> list[str]:
        config = str(self.folder / "settings.yaml")
        return ["run", "--name", name, "--runs", str(self.folder / "runs"), "--config", config, "--quiet", *more]

    def root(self, name: str) -> Path:
        return self.folder / "runs" / name

    def output(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def run(self, name: str, *more: str, kill_after: float | None = None, sabotage: str | None = None) -> int:
        """One command on a run; -9 when it was killed."""
        output = self.folder / f"{name}.out"
        code, _ = self.launcher.run(self.argv(name, *more), output, kill_after=kill_after, sabotage=sabotage)
        return code

    def make_reference(self) -> None:
        """An undisturbed run, to compare others with."""
        code, self.reference_s = self.launcher.run(self.argv("reference"), self.folder / "reference.out")
        assert code == 0, self.output("reference")
        assert self.bad_checks("reference") == []
        self.reference = read_state(self.root("reference"))

    def begin(self, name: str, *, until: str) -> None:
        """A run that is done up to a stage: a copy of one that was made once, and no process has it open."""
        made = f"until-{until}"
        if not self.root(made).exists():
            assert self.run(made, "--until", until) == 0, self.output(made)
        shutil.copytree(self.root(made), self.root(name))

    def differences(self, name: str) -> list[str]:
        """In what a finished run differs from the undisturbed one; empty when in nothing."""
        assert self.reference is not None
        return differences(read_state(self.root(name)), self.reference)

    def bad_checks(self, name: str) -> list[str]:
        """What ``verify`` finds wrong with a run, at any moment of its life."""
        if not (self.root(name) / "manifest.sqlite").exists():
            return []
        return [f"{check.what}: {check.detail}" for check in verify_run(self.root(name)) if not check.ok]

    def tables(self, name: str) -> dict[str, list[tuple[Any, ...]]]:
        """Rows of a run by table; no tables where it was killed before they were made."""
        return read_tables(self.root(name)) if (self.root(name) / "manifest.sqlite").exists() else {}

    def stage(self, name: str) -> str:
        """The stage that a run was killed in."""
        rows = self.tables(name).get("stages")
        if rows is None:
            return "start"
        return next((row[0] for row in rows if row[2] == "running"), "between")

    def work_done(self, name: str) -> list[tuple[Any, ...]]:
        """Rows that no kill may take away: candidates, scores, verdicts, samples, pictures."""
        tables = self.tables(name)
        kept = [row for row in tables.get("files", ()) if row[0] != "checkpoint"]
        return kept + [
            row for table in ("candidates", "scores", "selections", "samples") for row in tables.get(table, ())
        ]


@dataclass
class State:
    """What a run's folder holds, without clocks: rows by table, sha256 by file."""

    tables: dict[str, list[tuple[Any, ...]]]
    files: dict[str, str]


def read_state(root: Path) -> State:
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in TIMED_FILES and "tensorboard" not in path.parts
    }
    return State(read_tables(root), files)


def read_tables(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    with sqlite3.connect(root / "manifest.sqlite") as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        tables: dict[str, list[tuple[Any, ...]]] = {}
        for name in names:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({name})")]
            # The numbers themselves may have gaps; their order is what counts.
            kept = [column for column in columns if column not in ("ord", "seconds", "peak_gib")]
            order = "ord" if "ord" in columns else ", ".join(kept)
            tables[name] = list(db.execute(f"SELECT {', '.join(kept)} FROM {name} ORDER BY {order}"))
    db.close()
    return tables


def differences(found: State, wanted: State) -> list[str]:
    """In what a finished run differs from the undisturbed one; empty when in nothing."""
    said = [f"table {name}" for name in wanted.tables if found.tables.get(name) != wanted.tables[name]]
    said += [f"file {name}" for name in sorted(found.files.keys() ^ wanted.files.keys())]
    both = found.files.keys() & wanted.files.keys()
    return said + [f"content of {name}" for name in sorted(both) if found.files[name] != wanted.files[name]]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Random model and rewards, the launcher, and the state after an undisturbed run named ``reference``."""
    folder = tmp_path_factory.mktemp("crash")
    build_random_sdxl(folder / "sdxl")
    build_random_rewards(folder / "rewards")
    (folder / "train.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "heldout.txt").write_text("\n".join(HELDOUT) + "\n")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings(folder)))
    launcher = Launcher()
    made = World(folder, launcher)
    try:
        made.make_reference()
        yield made
    finally:
        launcher.close()


def settings(folder: Path) -> dict[str, Any]:
    return {
        "seed": 3,
        "model": {"path": str(folder / "sdxl"), "device": "cpu", "dtype": "float32"},
        "prompts": {"file": str(folder / "train.txt"), "heldout_file": str(folder / "heldout.txt"), "vocabulary": None},
        "expand": {"variants": 2, "templates": ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"], "slots": {}},
        "generate": {"num_inference_steps": 2, "batch_size": 3},
        "rewards": {
            "h": {"kind": "clip", "path": str(folder / "rewards/h")},
            "p": None,
            "a": None,
            "image_reward": {"kind": "image_reward", "path": str(folder / "rewards/image_reward"), "held_out": True},
            "oracle_alignment": None,
            "oracle_clean": None,
            "oracle": None,
        },
        "filter": {"rewards": ["h"], "target_samples": 5, "block_groups": 2},
        "train": {
            "rank": 4,
            "steps": 6,
            "warmup_steps": 2,
            "micro_batch_size": 4,
            "checkpoint_every": 2,
            "sample_every": 3,
            "sample_prompts": 2,
            "weighting": "uniform",
        },
        "evaluate": {"prompts": 2, "bootstrap_samples": 100},
        "report": {"grid_prompts": 2},
    }
