"""A run that was stopped anywhere ends as the run that was not, bit for bit (design.md sections 4 and 5).

Six samples in batches of four: an epoch ends after step 3 and in the middle of the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.qlora.optim import BitsAndBytesOptimizer
from craft_fast.store.safe_load import load_safetensors

STEPS = 7
# B of ff.net.0.proj has 512 x 16 elements and is kept in 8 bits; the other tensors have fewer than 4,096 and are not.
MIXED = {"rank": 16, "target_modules": ["to_q", "ff.net.0.proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora", **MIXED},
    "lora": {"method": "lora", **MIXED},
    "full": {"method": "full"},
    "fused, flat": {"method": "qlora", **MIXED, "engine": {"lora": "fused", "optimizer": "flat"}},
}


def common(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "checkpoint_every": 3, **more}


def final_files(root: Path) -> dict[str, bytes]:
    folder = root / "checkpoints" / f"step-{STEPS:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(one: Any, other: Any) -> None:
    assert one.losses == other.losses
    assert one.adapter.keys() == other.adapter.keys()
    for name in one.adapter:
        assert torch.equal(one.adapter[name], other.adapter[name]), name


@pytest.mark.parametrize(
    ("method", "stops"), [("qlora", [1, 3, 5, 6]), ("lora", [2]), ("full", [2]), ("fused, flat", [4])]
)
def test_stopped_run_ends_like_an_unbroken_one(trainer: Any, method: str, stops: Any) -> None:
    whole = trainer("whole")
    expected = whole(**common(**METHODS[method]))
    assert expected.finished
    assert len(expected.losses) == STEPS
    for stop in stops:
        broken = trainer(f"stopped-{stop}")
        part = broken(stop_at=stop, **common(**METHODS[method]))
        assert not part.finished
        assert part.step == stop
        assert part.losses == expected.losses[:stop]
        assert_same(broken(**common(**METHODS[method])), expected)
        assert final_files(broken.root) == final_files(whole.root)
        assert [event["step"] for event in broken.events("train_step")] == list(range(1, STEPS + 1))


def test_optimizer_state_holds_both_widths(trainer: Any) -> None:
    run = trainer()
    run(**common(**METHODS["qlora"]))
    state = load_safetensors(run.root / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors")
    kinds = {tensor.dtype for name, tensor in state.items() if name.endswith(".state1")}
    assert kinds == {torch.uint8, torch.float32}
    assert {"qmap1", "qmap2"} < state.keys()
    assert all(int(tensor) == STEPS for name, tensor in state.items() if name.endswith(".step"))


def test_killed_run_goes_on_from_its_last_checkpoint(trainer: Any, killed: Any, listener: Any) -> None:
    expected = trainer("whole")(**common())
    broken = trainer("killed", listener=listener(die_after=5))
    with pytest.raises(killed):
        broken(**common())
    assert sorted(path.name for path in (broken.root / "checkpoints").iterdir()) == ["step-000003"]
    broken.listener = listener()
    assert_same(broken(**common()), expected)
    events = broken.events("train_step")
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))  # 4 and 5 were done twice, logged once
    assert [event["loss"] for event in events] == expected.losses


def test_lost_log_is_written_again_from_the_checkpoint(trainer: Any) -> None:
    run = trainer()
    run(stop_at=4, **common())
    (run.root / "log.jsonl").unlink()
    result = run(**common())
    assert [event["loss"] for event in run.events("train_step")] == result.losses


def test_finished_run_is_not_trained_again(trainer: Any) -> None:
    run = trainer()
    first = run(**common())
    run.model = None  # the second call must not need it
    assert_same(run(**common()), first)
    assert len(run.events("train_step")) == STEPS


def test_damaged_checkpoint_is_passed_over(trainer: Any) -> None:
    expected = trainer("whole")(**common())
    broken = trainer("damaged")
    broken(stop_at=6, **common())
    newest = broken.root / "checkpoints" / "step-000006" / "adapter.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 0x10
    newest.write_bytes(bytes(data))
    assert_same(broken(**common()), expected)
    assert any("step-000006 is damaged" in line for line in broken.listener.warnings)


def test_lost_optimizer_state_shows(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison above can fail."""
    expected = trainer("whole")(**common())
    broken = trainer("forgetful")
    broken(stop_at=4, **common())
    monkeypatch.setattr(BitsAndBytesOptimizer, "load_state_tensors", lambda *_, **__: None)
    result = broken(**common())
    assert result.losses[:4] == expected.losses[:4]
    assert any(not torch.equal(result.adapter[name], expected.adapter[name]) for name in expected.adapter)


def test_another_library_version_is_said(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer()
    run(stop_at=2, **common())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    run(stop_at=3, **common())
    assert any("Not bit-identical" in line and "77" in line for line in run.listener.warnings)


def test_another_engine_is_said(trainer: Any) -> None:
    run = trainer()
    run(stop_at=2, **common())
    run(stop_at=3, **common())
    assert not any("Not bit-identical" in line for line in run.listener.warnings)
    run(stop_at=4, **common(engine={"lora": "peft"}))
    (warning,) = [line for line in run.listener.warnings if "Not bit-identical" in line]
    assert "'engine.lora': 'peft'" in warning
    assert "optimizer" not in warning


def test_a_state_of_one_optimizer_continues_in_another(trainer: Any) -> None:
    expected = trainer("whole")(**common(**METHODS["lora"]))
    run = trainer("changed")
    run(stop_at=3, **common(**METHODS["lora"]))
    result = run(**common(**METHODS["lora"], engine={"optimizer": "flat"}))
    assert result.losses == pytest.approx(expected.losses, rel=1e-4)
    assert any("'engine.optimizer': 'flat'" in line for line in run.listener.warnings)


def test_checkpoint_holds_history_and_environment(trainer: Any) -> None:
    run = trainer()
    result = run(stop_at=2, **common())
    state = json.loads((run.root / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["losses"] == result.losses
    assert state["torch"] == torch.__version__
    assert state["micro_batch_size"] == 4
