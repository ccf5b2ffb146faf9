"""Results as a person reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from craft_cli.ui.summary import (
    check_data,
    check_lines,
    evaluation_lines,
    status_data,
    status_lines,
    summary_data,
    summary_lines,
)
from craft_fast.pipeline import RunSummary, StageStatus
from craft_fast.records import EvalRow, StageRow
from craft_fast.verify import Check

ROWS = [
    EvalRow("h", False, 0.25, 0.5, 0.75, 0.1, 0.4, 64),
    EvalRow("oracle", True, 0.3, 0.29999, 0.5, -0.1, 0.00001, 64),
]
STAGES = [StageRow("generate", "k", "done", 90.0, 1.5, {"images": 48}), StageRow("filter", "k", "done", 2.0, None)]
SUMMARY = RunSummary(
    Path("runs/x"), STAGES, accepted=10, wanted=12, images=48, acceptance={"all": 0.25, "h": 0.5}, evaluation=ROWS,
    lora=Path("runs/x/lora/craft.safetensors"), report=Path("runs/x/report.html"),
)  # fmt: skip


def test_evaluation_parts_held_out_from_training_rewards() -> None:
    assert evaluation_lines(ROWS) == [
        "",
        "held-out rewards    base   tuned  difference       95 % interval  win rate",
        "  oracle          0.3000  0.3000      0.0000  [-0.1000,  0.0000]     50.0%",
        "training rewards    base   tuned  difference       95 % interval  win rate",
        "  h               0.2500  0.5000     +0.2500  [+0.1000, +0.4000]     75.0%",
        "over 64 held-out prompts, equal seeds",
        "",
    ]


def test_rates_of_lazy_rewards_say_how_many_were_asked() -> None:
    stages = [StageRow("filter", "k", "done", 2.0, None, {"tried": 36, "asked": {"h": 9}})]
    assert summary_lines(replace(SUMMARY, stages=stages))[1] == "variants that pass: all 25%, h 50% of 9 asked"


def test_the_end_of_a_run() -> None:
    lines = summary_lines(SUMMARY)
    assert lines[:2] == ["10 samples accepted of 48 images (21%), 12 wanted", "variants that pass: all 25%, h 50%"]
    assert lines[-3:] == ["LoRA    runs/x/lora/craft.safetensors", "report  runs/x/report.html", "time    1:32"]


def test_a_stage_tells_its_own_part() -> None:
    assert summary_lines(SUMMARY, "generate") == ["generate  images 48", "time      1:30"]
    assert summary_lines(SUMMARY, "filter")[-1] == "time  2.0 s"
    assert not any("LoRA" in line for line in summary_lines(SUMMARY, "filter"))
    assert summary_lines(SUMMARY, "export")[0].startswith("LoRA")
    assert summary_lines(RunSummary(Path("runs/x")), None) == ["time  0.0 s"]


def test_the_end_of_a_run_for_a_script() -> None:
    data = summary_data(SUMMARY)
    assert (data["lora"], data["report_json"], data["seconds"]) == ("runs/x/lora/craft.safetensors", None, 92.0)
    assert data["evaluation"][0]["metric"] == "h"


def test_status() -> None:
    rows = [
        StageStatus("expand", "done", 1.0, 0.25, {"train": 24, "dropped": 0, "note": "x", "keys": {"h": "1"}}),
        StageStatus("generate", "running", 61.0),
        StageStatus("score", "stale", 3.0, 0.5),
        StageStatus("filter", "new"),
    ]
    assert status_lines(rows, "craft-fast run --name x") == [
        "stage     state        time      peak  figures",
        "expand    done        1.0 s  0.25 GiB  train 24",
        "generate  unfinished   1:01",
        "score     stale       3.0 s  0.50 GiB",
        "filter    new",
        "1 of 4 stages done, 1:05 so far",
        "next: craft-fast run --name x",
    ]
    assert status_data(rows, "c")["next"] == "c"
    assert status_data(rows[:1], "c")["next"] is None
    assert status_lines(rows[:1], "c")[-1] == "all done; nothing to type"


def test_checks() -> None:
    checks = [Check("manifest", True, "fine"), Check("a.png", False, "missing")]
    assert check_lines(checks) == ["ok      manifest  fine", "FAILED  a.png     missing", "1 of 2 checks failed"]
    assert check_lines(checks[:1])[-1] == "all 1 checks passed"
    assert (check_data(checks)["ok"], check_data(checks[:1])["ok"]) == (False, True)
