"""``craft-fast bench sdxl`` as a user types it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.errors import ExitCode


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", "sdxl", *args], prog_name="craft-fast")


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case is timed once."""
    from craft_bench.sdxl import measure

    monkeypatch.setattr(measure, "QUICK", dataclasses.replace(measure.QUICK, fewest=1, most=1, seconds=0.0))


@pytest.mark.slow
def test_a_quick_run_on_a_cpu_gives_rows_and_tables(
    once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("steps", "--quick", "--device", "cpu", "--out", "rows")
    assert done.exit_code == 0, done.output
    assert "Traceback" not in done.stderr
    (path,) = (tmp_path / "rows").glob("sdxl-cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["reference", "ours", "ours", "ours", "ours"]
    for row in rows:
        assert f"{row['impl']} {row['case']}" in done.stdout
    assert "none of the 11 figures asked of a GPU was measured" in done.stdout
    assert f"rows: {path.relative_to(tmp_path)} (5 of this run, tiny size)" in done.stdout


def test_json_when_the_time_is_up(tmp_path: Path) -> None:
    done = invoke("generation", "--quick", "--device", "cpu", "--deadline", "0", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = next(event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "result")
    assert result["rows"] == []
    assert result["missing"] == ["generate B=4 euler graph vae=float32"]
    assert {figure["met"] for figure in result["figures"]} == {None}
    assert len(result["matmul_tflops"]) == 2
    quiet = invoke("generation", "--quick", "--device", "cpu", "--deadline", "0", "--out", str(tmp_path), "--quiet")
    assert quiet.stdout == ""


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path) -> None:
    for args, told in (
        (("stepps",), "bench sdxl steps"),
        (("--device", "tpu"), "auto, cpu, cuda"),
        (("--size", "huge"), "auto, full, tiny"),
    ):
        done = invoke(*args, "--out", str(tmp_path))
        assert done.exit_code == ExitCode.USAGE
        assert told in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_losses_that_differ_are_exit_code_7(once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_bench.sdxl import run as running
    from craft_bench.sdxl import stepping

    cases = running.step_cases
    monkeypatch.setattr(running, "step_cases", lambda *args, **options: cases(*args, **options)[:2])
    monkeypatch.setattr(stepping, "TOLERANCE", dict.fromkeys(stepping.TOLERANCE, -1.0))
    done = invoke("steps", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == ExitCode.QUALITY
    assert "no speed-up of it is shown" in done.output
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [(row["impl"], row["method"], row["versus"]) for row in rows if row["name"] == "step"] == [
        ("reference", "lora", None), ("ours", "lora", None),
    ]  # fmt: skip
