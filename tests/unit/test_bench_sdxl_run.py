"""Whole runs of ``bench sdxl`` on the tiny size: rows, losses beside the reference's, shortages, stops."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_bench.sdxl import headline, measure, ours, stepping
from craft_bench.sdxl.cases import GROUPS, OURS, REFERENCE, StepCase
from craft_bench.sdxl.headline import Headline, Recipe
from craft_bench.sdxl.problem import make_size
from craft_bench.sdxl.run import Options, Report, run
from craft_bench.sdxl.stepping import Reference, Work
from craft_bench.sdxl.worker import Request, measure_apart
from craft_fast.errors import Interrupted
from craft_fast.progress import Silent

CPU = torch.device("cpu")
LEAST = measure.Effort(losses=3, fewest=1, most=1, seconds=0.0, matmul=measure.QUICK.matmul)


def work(**changes: Any) -> Work:
    return Work(make_size("tiny"), CPU, torch.float32, dataclasses.replace(LEAST, **changes), matmul_tflops=0.05)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One quick run of everything, each case timed once; the losses are as many as ever."""
    options = Options(list(GROUPS), quick=True, device="cpu", out=tmp_path_factory.mktemp("rows"))
    once = dataclasses.replace(measure.QUICK, fewest=1, most=1, seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "QUICK", once)
        return run(options, progress=Silent())


@pytest.fixture(scope="module")
def reference() -> Reference:
    return stepping.measure_reference(StepCase("steps", 2, impl=REFERENCE), work())[1]


# ---- a whole run


@pytest.mark.slow
def test_rows_are_in_the_file_as_they_are_in_the_report(report: Report) -> None:
    assert report.rows == [json.loads(line) for line in report.path.read_text().splitlines()]
    assert {row["name"] for row in report.rows} == {"step", "generate", "stage"}
    assert not report.wrong + report.missing
    assert [row for row in report.rows if row["failed"]] == []
    for row in report.rows:
        assert (row["suite"], row["problem"], row["device"], row["dtype"]) == ("sdxl", "tiny", "cpu", "float32")
        if row["name"] != "stage":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["images_per_s"] == pytest.approx(row["size"] / row["p50_ms"] * 1e3)
    assert all(reached.verdict == "not measured" for reached in report.gates)


@pytest.mark.slow
def test_ours_trains_as_the_reference_does(report: Report) -> None:
    steps = [row for row in report.rows if row["name"] == "step"]
    (theirs,) = [row for row in steps if row["impl"] == REFERENCE]
    mine = [row for row in steps if row["impl"] == OURS and row["method"] == "lora"]
    assert len(mine) >= 2
    for row in mine:
        assert row["losses"] == pytest.approx(theirs["losses"], rel=2e-6)
        assert row["same"] is True
        assert row["adapter_difference"] < 1e-3
        assert row["versus"] == {"reference": pytest.approx(theirs["p50_ms"] / row["p50_ms"])}
    # Four bits are another base: near, and not the same.
    nf4 = next(row for row in steps if row["method"] == "qlora" and not row["nf4_convs"])
    assert nf4["same"] is None
    assert 1e-5 < nf4["loss_difference"] < 0.1


@pytest.mark.slow
def test_utilisation_counts_recomputation_once(report: Report) -> None:
    for row in report.rows:
        if row["name"] == "step" and row["impl"] == OURS:
            kept, units = row["kept_units"]
            assert row["mfu"] == pytest.approx(
                row["model_tflop"] * row["size"] / (row["p50_ms"] * 1e-3) / row["matmul_tflops"]
            )
            assert (row["hardware_tflop"] > row["model_tflop"]) == (kept < units)
            assert {"all": kept == 0, "none": kept == units, "auto": True}[row["recompute"]]


@pytest.mark.slow
def test_a_cap_makes_the_engine_choose(report: Report) -> None:
    (capped,) = [row for row in report.rows if row["name"] == "step" and row["cap_gib"] is not None]
    assert capped["method"] in ("lora", "qlora")
    assert capped["budget_gib"] <= capped["cap_gib"]
    assert len(capped["losses"]) == measure.QUICK.losses


@pytest.mark.slow
def test_the_headline_adds_up_and_says_what_was_measured(report: Report) -> None:
    stages = {row["case"]: row for row in report.rows if row["name"] == "stage"}
    assert list(stages) == ["train", "generate", "score", "encode", "evaluate", "total"]
    total = stages.pop("total")
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in stages.values()))
    assert {name for name, row in stages.items() if row["how"] == "measured"} == {"train", "score", "encode"}
    assert total["how"] == "extrapolated"
    image = next(row for row in report.rows if row["name"] == "generate")
    assert stages["generate"]["seconds"] == pytest.approx(Recipe().images * image["s_per_image"])


# ---- wrong, short, late, stopped


def test_other_noise_is_found_out_and_gets_no_speed_up(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ours.Ours

    class Wrong(engine):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.stepper.noise_seed += 1

    monkeypatch.setattr(stepping, "Ours", Wrong)
    fields = stepping.measure_ours(StepCase("steps", 2), work(), reference)
    assert fields["same"] is False
    assert fields.get("versus") is None


def test_an_update_that_is_left_out_shows_in_the_adapter(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stepping.measure_ours(StepCase("steps", 2), work(), reference)
    assert whole["adapter_difference"] < 1e-3
    monkeypatch.setattr(ours, "LEARNING_RATE", 0.5e-4)
    half = stepping.measure_ours(StepCase("steps", 2), work(), reference)
    assert half["adapter_difference"] > 0.3
    assert half["same"] is False


def test_our_adapter_layer_and_recomputation_train_alike(reference: Reference) -> None:
    case = StepCase("steps", 2, recompute="all", lora="fused", optimizer="flat")
    fields = stepping.measure_ours(case, work(), reference)
    assert fields["same"] is True
    assert fields["chosen"]["engine.lora"] == "fused"
    assert fields["adapter_difference"] < 1e-3


def test_a_shortage_in_a_step_makes_all_units_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ours.Ours(StepCase("steps", 2, recompute="none"), make_size("tiny"), CPU, torch.float32)
    whole = engine.step(0)
    gradients, calls = engine.stepper.gradients, 0

    def short(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if engine.trainee.kept or calls > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(*args, **kwargs)

    monkeypatch.setattr(engine.stepper, "gradients", short)
    assert engine.step(1) != whole
    assert engine.fields()["kept_units"] == [0, len(engine.trainee.units)]
    assert "all activations recomputed from here on" in engine.fields()["notes"][-1]
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(2)


def test_a_shortage_is_a_row_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def broken(*_: object) -> None:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(stepping, "measure_reference", short)
    monkeypatch.setattr(stepping, "measure_ours", broken)
    found = run(Options(["steps"], quick=True, device="cpu", out=tmp_path), progress=Silent())
    assert [row["failed"] for row in found.rows][:2] == ["out of memory", "RuntimeError: no"]
    assert len(found.wrong) == len(found.rows) - 1
    assert all("RuntimeError: no" in line for line in found.wrong)


def test_a_deadline_leaves_cases_out(tmp_path: Path) -> None:
    options = Options(["steps", "generation", "headline"], quick=True, device="cpu", out=tmp_path, deadline_s=0)
    found = run(options, progress=Silent())
    assert len(found.missing) == 6
    assert {row["failed"] for row in found.rows if row["case"] != "total"} == {headline.LATE}
    assert "not known without train" in found.rows[-1]["failed"]


def test_a_stop_keeps_what_was_measured(tmp_path: Path) -> None:
    asked = iter(range(1000))
    options = Options(["steps"], quick=True, device="cpu", out=tmp_path)
    with pytest.raises(Interrupted) as stopped:
        run(options, progress=Silent(), should_stop=lambda: next(asked) > measure.QUICK.losses + measure.QUICK.most + 2)
    (path,) = tmp_path.glob("sdxl-cpu-*.jsonl")
    assert str(path) in stopped.value.hint
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["impl"] for row in rows] == [REFERENCE]


def test_training_that_does_not_fit_the_time_is_extrapolated() -> None:
    slow = Headline(work(losses=2), [], deadline=time.monotonic() + 0.5)
    fields = slow._train()
    assert fields["how"] in ("measured", "extrapolated")
    assert fields["seconds"] >= fields["measured_s"]
    passed = Headline(work(losses=2), [], deadline=time.monotonic() - 1)._train()
    assert passed["how"] == "extrapolated"
    assert passed["basis"].startswith("3 of 6 steps")
    assert passed["seconds"] > passed["measured_s"]


# ---- a process of its own


def test_another_process_can_be_stopped_or_run_late() -> None:
    request = Request(StepCase("caps", 1, cap_gib=0.02), "tiny", "cpu", True, 0.05)
    assert measure_apart(request, check=lambda: None, timeout_s=0.1)["failed"] == "took more than 0 s"

    def stop() -> None:
        raise Interrupted("Stopped")

    with pytest.raises(Interrupted):
        measure_apart(request, check=stop)


@pytest.mark.slow
def test_what_another_process_raises_is_told() -> None:
    request = Request(StepCase("caps", 0, cap_gib=0.02), "tiny", "cpu", True, 0.05)
    fields = measure_apart(request, check=lambda: None)
    assert set(fields) == {"failed"}
    assert fields["failed"] != stepping.OUT_OF_MEMORY


def test_missing_memory_is_known_by_what_it_came_from() -> None:
    error = RuntimeError("while recording")
    error.__cause__ = torch.OutOfMemoryError("CUDA")
    assert stepping.reason(error) == stepping.OUT_OF_MEMORY
    assert stepping.reason(RuntimeError("x\ny")) == "RuntimeError: x"
    assert stepping.reason(KeyError()) == "KeyError"
