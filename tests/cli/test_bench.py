"""``craft-fast bench kernels`` as a user types it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from craft_bench.registry import OPS
from craft_cli.main import app
from craft_fast.errors import ExitCode

QUICK = ("bench", "kernels", "nf4_dequantize", "--quick", "--device", "cpu", "--out", "rows")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="craft-fast")


@pytest.mark.slow
def test_a_quick_run_on_a_cpu_gives_rows_a_table_and_a_plot(craft: Callable[..., Any], tmp_path: Path) -> None:
    done = craft(*QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (path,) = (tmp_path / "rows").glob("kernels-cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["impl"] for row in rows} == {"eager", "compile", "bitsandbytes", "triton"}
    assert {row["failed"] for row in rows if row["impl"] == "triton"} == {"does not run on cpu"}
    assert all(row["p50_ms"] > 0 for row in rows if row["impl"] != "triton")
    assert [png.name for png in path.parent.glob("*.png")] == [f"{path.stem}-nf4_dequantize.png"]
    assert re.search(r"^640x640 +bfloat16 +forward +[\d.]+ \(\d+ %\)", done.stdout, re.MULTILINE)
    assert "triton: does not run on cpu" in done.stdout
    assert "none of the 2 figures asked of a GPU was measured" in done.stdout
    assert "speed-up" not in done.stdout


def test_json_and_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red_op: None) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("bench", "kernels", "geglu", "--quick", "--device", "cpu", "--no-plots", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    result = next(event for event in events if event["event"] == "result")
    assert [row["case"] for row in result["rows"]] == ["one"] * 2
    assert result["verified"]["geglu"]["green"] is False
    assert Path(result["file"]).parent == Path("bench/results")
    assert events[-1]["event"] == "error"
    assert events[-1]["exit_code"] == done.exit_code == ExitCode.QUALITY
    quiet = invoke("bench", "kernels", "geglu", "--quick", "--device", "cpu", "--no-plots", "--quiet")
    assert quiet.stdout == ""


@pytest.fixture
def red_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An op of which a form of ours runs here, quick to measure, whose tests fail."""
    import torch

    from craft_bench import registry, verify
    from craft_bench import run as running
    from craft_bench.registry import Case, Form, Problem

    folder = tmp_path / "checkout" / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_geglu.py").write_text("def test_gradient():\n    assert False\n")

    def build(device: torch.device) -> Problem:
        x = torch.ones(4)
        return Problem(
            lambda: ((x.double(),), ()), dict.fromkeys(("eager", "torch"), lambda: Form(lambda: (x.clone(),)))
        )

    case = Case(
        op="geglu", name="one", dtype="float32", size=4, traffic={"forward": 32}, memory=32, build=build,
        rivals=("eager",), ours=("torch",), quick=True,
    )  # fmt: skip
    monkeypatch.setattr(running.run, "__kwdefaults__", {**running.run.__kwdefaults__, "load": lambda _: [case]})
    monkeypatch.setattr(running, "tests_folder", lambda: folder)
    monkeypatch.setattr(running.measure, "copy_gbps", lambda device, effort: 10.0)
    assert registry.OPS
    assert verify.tests_folder() != folder


def test_red_tests_are_exit_code_7_and_no_speed_up(red_op: None, tmp_path: Path) -> None:
    done = invoke("bench", "kernels", "geglu", "--quick", "--device", "cpu", "--no-plots", "--out", str(tmp_path / "o"))
    assert done.exit_code == ExitCode.QUALITY
    assert "tests RED: 1 of 1 failed: test_gradient" in done.stdout
    assert "tests red: no speed-up shown" in done.stdout
    assert "vs eager" not in done.stdout
    assert "Tests of an op are red" in done.stderr
    (log,) = (tmp_path / "o").glob("*-tests.log")
    assert str(log) in done.stderr
    assert "assert False" in log.read_text()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["geglue"], "geglu"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--dtype", "int8"], "float32, bfloat16, float16"),
        (["--json", "--quiet"], "exclude each other"),
        (["--deadline", "-1"], "deadline"),
        (["--no-verify"], "--no-verify"),
    ],
)
def test_what_cannot_be_carried_out_is_a_usage_error(typed: list[str], said: str) -> None:
    done = invoke("bench", "kernels", *typed)
    assert done.exit_code == ExitCode.USAGE
    assert said in done.stderr


def test_a_forced_form_is_refused(craft: Callable[..., Any], tmp_path: Path) -> None:
    done = craft(*QUICK, cwd=tmp_path, env={"CRAFT_KERNELS_IMPL": "torch"})
    assert done.returncode == ExitCode.ENVIRONMENT
    assert "unset CRAFT_KERNELS_IMPL" in done.stderr
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("command", [["bench"], ["bench", "kernels"]])
def test_examples_parse(command: list[str]) -> None:
    text = invoke(*command, "--help").stdout
    examples = re.findall(r"^ {2,4}(craft-fast .*)$", text, flags=re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        program, *args = shlex.split(example)
        assert program == "craft-fast"
        assert args[: len(command)] == command
        assert invoke(*args, "--help").exit_code == 0


def test_help_and_a_wrong_op_load_no_torch(craft_env: dict[str, str], tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom craft_cli.main import app\n"
        "for args in (['bench', 'kernels', '--help'], ['bench', 'kernels', 'x']):\n"
        "    try: app(prog_name='craft-fast', args=args)\n    except SystemExit: pass\n"
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=craft_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_ops_are_completed() -> None:
    from craft_cli.commands.bench import _complete_ops

    assert _complete_ops("") == list(OPS)
    assert _complete_ops("g") == ["group_norm_silu", "geglu"]
