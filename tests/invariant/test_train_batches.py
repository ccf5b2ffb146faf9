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


def test_out_of_memory_in_forward(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**SETTINGS)

    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == 2:
            raise torch.OutOfMemoryError("injected")
        return output

    sizes = inject(monkeypatch, spoil)
    run = trainer("short")
    result = run(**SETTINGS)
    assert sizes == [8, 8, 4, 4, 4, 4]
    assert largest_difference(result.losses, expected.losses) <= 1e-5
    assert result.micro_batch_size == 4
    assert [event["micro_batch_size"] for event in run.events("train_out_of_memory")] == [4]
    assert any("micro-batch is 4" in line for line in run.listener.warnings)


def test_out_of_memory_in_the_middle_of_accumulation(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that were done are done again: their gradients count once."""
    settings = {**SETTINGS, "micro_batch_size": 4, "grad_accum_steps": 2}
    expected = trainer("whole")(**settings)

    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == 4:  # the second part of the second step
            raise torch.OutOfMemoryError("injected")
        return output

    sizes = inject(monkeypatch, spoil)
    result = trainer("short")(**settings)
    assert sizes == [4, 4, 4, 4, *[2] * 8]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


def test_out_of_memory_in_backward(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trainer("whole")(**SETTINGS)

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == 1:
            output.register_hook(fail)
        return output

    sizes = inject(monkeypatch, spoil)
    result = trainer("short")(**SETTINGS)
    assert sizes == [8, *[4] * 6]
    assert largest_difference(result.losses, expected.losses) <= 1e-5


@pytest.mark.parametrize("fails_at", [1, 5])
def test_out_of_memory_in_the_optimizer(trainer: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Every parameter is updated exactly once, also those before and after the one that failed."""
    import bitsandbytes

    one_step = {**SETTINGS, "steps": 1}
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
    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == 1:
            raise torch.OutOfMemoryError("injected")
        return output

    sizes = inject(monkeypatch, spoil)
    run = trainer()
    run(stop_at=1, **SETTINGS)
    run(**SETTINGS)
    assert sizes == [8, *[4] * 6]


def test_memory_that_is_never_enough(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: int, output: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    sizes = inject(monkeypatch, spoil)
    run = trainer()
    with pytest.raises(ResourceError, match="micro-batch of one") as caught:
        run(**SETTINGS)
    assert sizes == [8, 4, 2, 1]
    assert caught.value.exit_code == ExitCode.RESOURCE
    assert "gradient_checkpointing" in caught.value.hint
