"""How a global batch is cut into micro-batches changes nothing; running out of memory skips nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from craft_fast.errors import ExitCode, ResourceError

FORWARD = UNet2DConditionModel.forward
SETTINGS: dict[str, Any] = {"steps": 3, "micro_batch_size": 8, "learning_rate": 1e-4}


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def inject(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> list[int]:
    """Put ``spoil(call, output)`` behind the UNet's real forward; returns the batch size of each call, as it grows."""
    sizes: list[int] = []

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        (output,) = FORWARD(self, sample, *args, **kwargs)
        return (spoil(len(sizes), output),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return sizes


def test_accumulation_is_invariant(trainer: Any) -> None:
    """1 x 8, 2 x 4 and 8 x 1 samples: equal losses to 1e-5 in float32."""
    results = [
        trainer(f"{size}")(**{**SETTINGS, "steps": 4, "micro_batch_size": size, "grad_accum_steps": 8 // size})
        for size in (8, 4, 1)
    ]
    assert len(set(results[0].losses)) == 4
    for other in results[1:]:
        assert largest_difference(results[0].losses, other.losses) <= 1e-5


def fail_at(*calls: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A real error of torch in the given calls of the UNet, counted from 1."""

    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call in calls:
            raise torch.OutOfMemoryError("injected")
        return output

    return spoil


# Nothing is left to compute again, so memory can come from a smaller micro-batch alone.
SPARED: dict[str, Any] = {**SETTINGS, "gradient_checkpointing": "all"}


def test_out_of_memory_computes_activations_again_first(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bit changes by it."""
    expected = trainer("whole")(**SETTINGS)
    sizes = inject(monkeypatch, fail_at(2))
    run = trainer("short")
    result = run(**SETTINGS)
    assert sizes == [8, 8, 8, 8]
    assert result.losses == expected.losses
    assert all(torch.equal(result.adapter[name], expected.adapter[name]) for name in expected.adapter)
    assert result.micro_batch_size == 8
    assert [event["at_step"] for event in run.events("train_out_of_memory")] == [2]
    assert any("computed again in backward" in line for line in run.listener.warnings)


def test_out_of_memory_twice_halves_the_micro_batch(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**SETTINGS)
    sizes = inject(monkeypatch, fail_at(2, 3))
    result = trainer("short")(**SETTINGS)
    assert sizes == [8, 8, 8, 4, 4, 4, 4]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


def test_out_of_memory_in_forward(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**SETTINGS)
    sizes = inject(monkeypatch, fail_at(2))
    run = trainer("short")
    result = run(**SPARED)
    assert sizes == [8, 8, 4, 4, 4, 4]
    assert largest_difference(result.losses, expected.losses) <= 1e-5
    assert result.micro_batch_size == 4
    assert [event["micro_batch_size"] for event in run.events("train_out_of_memory")] == [4]
    assert any("micro-batch is 4" in line for line in run.listener.warnings)


def test_out_of_memory_in_the_middle_of_accumulation(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that were done are done again: their gradients count once."""
    settings = {**SPARED, "micro_batch_size": 4, "grad_accum_steps": 2}
    expected = trainer("whole")(**settings)
    sizes = inject(monkeypatch, fail_at(4))  # the second part of the second step
    result = trainer("short")(**settings)
    assert sizes == [4, 4, 4, 4, *[2] * 8]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


def fail_in_backward(at: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == at:
            output.register_hook(fail)
        return output

    return spoil


def test_out_of_memory_in_backward(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**SETTINGS)
    sizes = inject(monkeypatch, fail_in_backward(1))
    result = trainer("short")(**SPARED)
    assert sizes == [8, *[4] * 6]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


@pytest.mark.parametrize("fails_at", [1, 5])
def test_out_of_memory_in_the_optimizer(trainer: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Every parameter is updated exactly once, also those before and after the one that failed."""
    import bitsandbytes

    one_step = {**SPARED, "steps": 1}
    expected = trainer("whole")(**one_step)
    update = bitsandbytes.optim.AdamW8bit.update_step
    calls = []

    def failing(self: Any, group: Any, p: Any, gindex: int, pindex: int) -> None:
        calls.append(pindex)
        if len(calls) == fails_at:
            self.state[p]["step"] += 1  # as bitsandbytes does before it allocates
            raise torch.OutOfMemoryError("injected")
        update(self, group, p, gindex, pindex)

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "update_step", failing)
    result = trainer("short")(**one_step)
    count = len(expected.adapter)
    assert calls == [*range(fails_at), *range(fails_at - 1, count)]
    assert result.micro_batch_size == 4
    for name, value in expected.adapter.items():
        assert torch.equal(value, result.adapter[name]), name


def test_a_smaller_micro_batch_is_kept_by_the_checkpoint(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = inject(monkeypatch, fail_at(1))
    run = trainer()
    run(stop_at=1, **SPARED)
    run(**SPARED)
    assert sizes == [8, *[4] * 6]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_memory_that_is_never_enough(trainer: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    sizes = inject(monkeypatch, fail_at(*range(1, 100)))
    run = trainer()
    with pytest.raises(ResourceError, match="micro-batch of one") as caught:
        run(method=method, **SETTINGS)
    assert sizes == [8, 8, 4, 2, 1]
    assert caught.value.exit_code == ExitCode.RESOURCE
    assert "train.nf4_convs" in caught.value.hint


def test_graphs_are_the_last_thing_to_go(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to be recording, which it can not be here: with one sample left there is that much less to need."""
    from craft_fast.qlora.step import Stepper

    made = Stepper.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.record = True

    monkeypatch.setattr(Stepper, "__init__", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    expected = trainer("whole")(**SETTINGS)
    sizes = inject(monkeypatch, fail_at(1, 2, 3, 4, 5))
    run = trainer("short")
    result = run(**SETTINGS)
    assert sizes[:6] == [8, 8, 4, 2, 1, 1]
    assert "without a CUDA graph" in run.listener.warnings[-1]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


def test_samples_are_drawn_ahead_without_memory(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortage while the next step's inputs are prepared is not the end of the step that is done."""
    from craft_fast.qlora.inputs import Inputs

    expected = trainer("whole")(**SETTINGS)
    select, calls = Inputs.select, []

    def failing(self: Any, batch: Any) -> Any:
        calls.append(batch.step)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return select(self, batch)

    monkeypatch.setattr(Inputs, "select", failing)
    result = trainer("short")(**SETTINGS)
    assert calls == [0, 1, 1, 2]
    assert result.losses == expected.losses
    assert result.micro_batch_size == 8


# ---- updates in backward


FULL: dict[str, Any] = {**SETTINGS, "method": "full", "steps": 4, "checkpoint_every": 1}


def test_a_dry_run_finds_what_fits_before_weights_change(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**{**FULL, "micro_batch_size": 4, "grad_accum_steps": 2})
    sizes = inject(monkeypatch, fail_at(1, 2))
    result = trainer("short")(**FULL)
    # Without and with recomputation 8 do not fit; two dry parts of 4, then what is trained.
    assert sizes == [8, 8, 4, 4, *[4] * 8]
    assert result.micro_batch_size == 4
    assert result.losses == expected.losses
    assert all(torch.equal(result.adapter[name], expected.adapter[name]) for name in expected.adapter)


def test_out_of_memory_between_updates_ends_the_run_and_it_continues(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights behind the failure have changed, those before it have not: only the checkpoint is whole."""
    expected = trainer("whole")(**FULL)
    run = trainer("broken")
    forward = UNet2DConditionModel.forward
    calls: list[int] = []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the third step, after the dry run
            handle = self.conv_in.register_full_backward_pre_hook(fail)
            try:
                return forward(self, *args, **kwargs)
            finally:
                handle.remove()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", failing)
    with pytest.raises(ResourceError, match="in the middle of a training step") as caught:
        run(**FULL)
    assert "last checkpoint" in caught.value.hint
    result = run(**FULL)
    assert result.losses == expected.losses
    assert all(torch.equal(result.adapter[name], expected.adapter[name]) for name in expected.adapter)
