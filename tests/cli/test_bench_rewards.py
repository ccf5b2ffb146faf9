"""``craft-fast bench rewards`` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.errors import ExitCode

QUICK = ("--quick", "--device", "cpu", "--batch", "2")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", "rewards", *args], prog_name="craft-fast")


def test_a_dry_run_on_a_cpu_gives_rows_and_tables(tmp_path: Path) -> None:
    done = invoke("hpsv2.1", *QUICK, "--size", "tiny", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("rewards-cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["impl"], row["mode"]) for row in rows] == [
        ("transformers", "compare"), ("transformers", "score"), ("ours", "score"), ("ours", "network"),
    ]  # fmt: skip
    assert re.search(r"^hpsv2.1 +ours float32 +B=2 score +[\d.]+ .*[\d.]+x$", done.stdout, re.MULTILINE)
    assert re.search(r"^hpsv2.1 +transformers float32 +6 +\d", done.stdout, re.MULTILINE)
    assert "none of the 3 figures asked of a GPU was measured" in done.stdout
    assert f"rows: {path} (4 of this run, tiny size)" in done.stdout


def test_json_when_the_time_is_up(tmp_path: Path) -> None:
    done = invoke("mps", *QUICK, "--deadline", "0", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = next(event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "result")
    assert (result["rows"], result["missing"]) == ([], ["mps"])
    assert {figure["met"] for figure in result["figures"]} == {None}
    assert invoke("mps", *QUICK, "--deadline", "0", "--out", str(tmp_path), "--quiet").stdout == ""


def test_scores_that_differ_are_exit_code_7_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_bench.rewards import compare

    monkeypatch.setitem(compare.ALLOWED_OF_SPREAD, "bfloat16", 1e-9)
    done = invoke("aesthetic-v2", *QUICK, "--dtype", "bfloat16", "--out", str(tmp_path))
    assert done.exit_code == ExitCode.QUALITY
    assert "no time of it is shown" in done.stderr
    assert re.search(r"^aesthetic-v2 +ours bfloat16 +B=2 score +failed", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["hps"], "it is one of hpsv2.1"),
        (["--batch", "1,x"], "--batch 1,16,64"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--size", "huge"], "auto, full, tiny"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(typed: list[str], told: str, tmp_path: Path) -> None:
    done = invoke(*typed, "--out", str(tmp_path))
    assert done.exit_code == ExitCode.USAGE
    assert told in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path))
    done = invoke("hpsv2.1", *QUICK, "--package", "--out", str(tmp_path / "rows"))
    assert done.exit_code == ExitCode.ENVIRONMENT
    assert "craft-fast rewards install hpsv2" in done.stderr
