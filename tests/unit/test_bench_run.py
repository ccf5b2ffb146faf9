"""Whole runs on ops made for the purpose: right, wrong, red, raising, interrupted, late."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_bench import registry
from craft_bench import run as running
from craft_bench.gates import GATES, Gate, judge
from craft_bench.registry import Case, Form, Problem
from craft_bench.run import Options, Report
from craft_bench.table import NO_SPEED_UP, gate_table, op_table
from craft_fast.errors import EnvironmentProblem, Interrupted
from craft_fast.progress import Silent

OP = "weighted_noise_loss"  # a name of the registry; what is measured here is a square


def broken(message: str) -> Callable[[], Form]:
    def make() -> Form:
        raise RuntimeError(message)

    return make


def made_case(name: str = "8x8", *, factor: float = 1.0, rival: Callable[[], Form] | None = None, **more: Any) -> Case:
    """Squares of 64 numbers; ``torch`` is our form, and ``factor`` what it multiplies too much."""

    def build(device: torch.device) -> Problem:
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def form(times: float) -> Form:
            return Form(lambda: (x.square() * times,), (x,), (torch.ones(8, 8),))

        def exact() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            return (x.detach().double().square(),), (2 * x.detach().double(),)

        forms = {"eager": lambda: form(1.0), "torch": lambda: form(factor), "library": rival or (lambda: form(1.0))}
        return Problem(exact, forms)

    settings: dict[str, Any] = {
        "dtype": "float32", "size": 64, "traffic": {"forward": 512, "both": 1024}, "memory": 10_000,
        "rivals": ("eager", "library"), "ours": ("torch",), "quick": True,
    }  # fmt: skip
    return Case(op=OP, name=name, build=build, **{**settings, **more})


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / f"test_{OP}.py").write_text("def test_one():\n    assert True\n")
    return folder


@pytest.fixture
def measured(tmp_path: Path, tests: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    monkeypatch.setattr(running.measure, "copy_gbps", lambda device, effort: 10.0)

    def run(*cases: Case, should_stop: Callable[[], bool] = lambda: False, **options: Any) -> Report:
        chosen = Options([OP], quick=True, device="cpu", out=tmp_path / "out", plots=False, **options)
        return running.run(
            chosen, progress=Silent(), should_stop=should_stop, load=lambda _: list(cases), tests=tests
        )  # fmt: skip

    return run


def rows_of(report: Report, impl: str) -> list[dict[str, Any]]:
    return [row for row in report.rows if row["impl"] == impl]


def test_rows_of_a_good_op(measured: Callable[..., Report]) -> None:
    report = measured(made_case())
    assert [row["impl"] for row in report.rows] == ["eager", "eager", "library", "library", "torch", "torch"]
    assert report.rows == [json.loads(line) for line in report.path.read_text().splitlines()]
    for row in report.rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)
        assert row["copy_fraction"] == pytest.approx(row["gbps"] / 10)
        assert row["floor_ms"] == pytest.approx(row["bytes"] / 1e7)
        assert (row["checked"], row["failed"], row["peak_gib"]) == ("tests", None, None)
    for ours in rows_of(report, "torch"):
        rivals = {r["impl"]: r["p50_ms"] for r in report.rows if r["mode"] == ours["mode"] and r["impl"] != "torch"}
        assert ours["versus"] == {impl: pytest.approx(p50 / ours["p50_ms"]) for impl, p50 in rivals.items()}
    assert all(row["versus"] is None for row in report.rows if row["impl"] != "torch")
    assert not report.red + report.wrong + report.missing


def test_a_red_op_gets_no_speed_up(measured: Callable[..., Report], tests: Path) -> None:
    (tests / f"test_{OP}.py").write_text("def test_one():\n    assert False\n")
    report = measured(made_case())
    assert report.red == [OP]
    assert len(report.rows) == 6
    assert all(row["versus"] is None for row in report.rows)
    cells = op_table(report.rows, report.verdicts[OP])
    assert all(line[-1] == NO_SPEED_UP for line in cells[1:])
    assert not any("vs " in cell for line in cells for cell in line)


def test_a_wrong_result_is_not_timed_even_where_the_tests_are_green(measured: Callable[..., Report]) -> None:
    report = measured(made_case(factor=1.01))
    (row,) = rows_of(report, "torch")
    assert "its result is wrong: output 0" in row["failed"]
    assert row["p50_ms"] is row["versus"] is None
    assert len(report.wrong) == 1
    assert len(rows_of(report, "eager")) == 2


def test_without_tests_the_self_check_is_the_gate(measured: Callable[..., Report], tests: Path) -> None:
    (tests / f"test_{OP}.py").unlink()
    report = measured(made_case())
    assert {row["checked"] for row in report.rows} == {"self-check"}
    assert all(row["versus"] for row in rows_of(report, "torch"))
    wrong = measured(made_case(factor=2.0))
    assert [row["p50_ms"] for row in rows_of(wrong, "torch")] == [None]


def test_a_rival_that_raises_is_a_row_and_the_run_goes_on(measured: Callable[..., Report]) -> None:
    report = measured(made_case("one", rival=broken("no kernel\nfor this")), made_case("two"))
    (row,) = [row for row in rows_of(report, "library") if row["case"] == "one"]
    assert row["failed"] == "RuntimeError: no kernel"
    assert [set(row["versus"]) for row in rows_of(report, "torch")] == [{"eager"}] * 2 + [{"eager", "library"}] * 2
    assert not report.wrong


def test_a_case_that_does_not_fit_is_left_out_with_the_reason(measured: Callable[..., Report]) -> None:
    report = measured(made_case("huge", memory=2**60), made_case("small"))
    huge = [row for row in report.rows if row["case"] == "huge"]
    assert {row["impl"] for row in huge} == {"eager", "library", "torch"}
    assert all("GiB are free" in row["failed"] for row in huge)
    assert len([row for row in report.rows if row["case"] == "small"]) == 6


def test_a_stop_keeps_the_rows_measured_so_far(measured: Callable[..., Report], tmp_path: Path) -> None:
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted) as told:
        measured(made_case(), should_stop=lambda: next(asked))
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert str(path) in told.value.hint
    assert [json.loads(line)["impl"] for line in path.read_text().splitlines()] == ["eager"] * 2 + ["library"] * 2


def test_no_case_begins_after_the_deadline_and_figures_cases_come_first(measured: Callable[..., Report]) -> None:
    plain, needed = made_case("plain"), dataclasses.replace(made_case("B=8 "), traffic={"both": 1024})
    report = measured(plain, needed, deadline_s=0.0)
    assert report.rows == []
    # Figures are about `both`; a case that lacks that mode is not needed for them.
    other = dataclasses.replace(plain, traffic={"forward": 512})
    report = measured(other, needed, deadline_s=0.0)
    assert report.missing == [needed.label, other.label]


def test_what_cannot_be_is_refused(measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="No case has the dtype"):
        measured(made_case(), dtype="float16")
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "torch")
    with pytest.raises(EnvironmentProblem, match="while one is forced"):
        measured(made_case())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="no CUDA device"):
        running._device("cuda")


def figure_rows(case: Case, **ours: Any) -> list[dict[str, Any]]:
    known = {"name": case.op, "case": case.name, "dtype": case.dtype, "mode": "both", "failed": None}
    return [{**known, "impl": "triton", "copy_fraction": None, "saved_gib": None, "versus": None, **ours}]


def test_a_figure_is_judged_by_its_worst_case() -> None:
    cases = registry.load_cases("weighted_noise_loss")
    ratios = {case.label: 1.5 + index for index, case in enumerate(cases)}
    ratios[cases[3].label], ratios[cases[4].label] = 0.9, 0.95
    rows = [
        row
        for case in cases[:8]
        for row in figure_rows(case, versus={"compile": ratios[case.label], "eager": 9.0}, copy_fraction=0.85)
    ]
    by_text = {reached.gate.text: reached for reached in judge(cases, rows)}
    slower = next(reached for text, reached in by_text.items() if "torch.compile" in text)
    assert (slower.measured, slower.met, slower.cases) == (0.9, False, (7, 8))
    assert slower.below == tuple(f"{case.name} {case.dtype}" for case in cases[3:5])
    copied = next(reached for text, reached in by_text.items() if "bandwidth" in text)
    assert (copied.measured, copied.met, copied.cases) == (0.85, True, (2, 4))
    assert any("2 of 4 cases" not in cell and "missed in 2" in cell for line in gate_table([slower]) for cell in line)


def test_a_figure_that_was_not_measured_or_not_verified_has_no_number() -> None:
    cases = registry.load_cases("weighted_noise_loss")
    for rows in ([], [row for case in cases for row in figure_rows(case, copy_fraction=0.99, versus=None)]):
        for reached in judge(cases, rows):
            assert (reached.measured, reached.met, reached.verdict) == (None, None, "not measured")
            assert gate_table([reached])[1][3] == "-"


def test_saved_memory_is_a_share_of_the_rivals() -> None:
    gate = Gate(OP, "less", "saved", 0.01, rival="peft")
    case = made_case(ours=("triton",))
    ours = figure_rows(case, saved_gib=0.25, versus={"peft": 2.0})
    theirs = [{**ours[0], "impl": "peft", "saved_gib": 1.0}]
    table = {(r["name"], r["case"], r["dtype"], r["mode"], r["impl"]): r for r in ours + theirs}
    from craft_bench import gates

    assert gates._judge(gate, [case], table).measured == 0.75
    assert {gate.metric for gate in GATES} == {"copy_fraction", "versus", "saved"}


def test_figures_become_rows_on_a_gpu_only(measured: Callable[..., Report]) -> None:
    report = measured(made_case("B=8 "))
    assert {reached.verdict for reached in report.gates} == {"not measured"}
    assert not [line for line in report.path.read_text().splitlines() if '"figure"' in line]
    gate = running._gate_row(dataclasses.replace(report.gates[0], measured=0.9, where="B=8"), {})
    assert (gate["asked"], gate["measured"], gate["met"]) == (report.gates[0].gate.least, 0.9, True)
