"""What is not finite never reaches a weight: in a latent, an embedding, a loss or a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from craft_fast.checkpoint import latest
from craft_fast.errors import CraftError, ExitCode, IntegrityError
from craft_fast.qlora.lora import lora_state_dict
from craft_fast.store.run import open_run

FORWARD = UNet2DConditionModel.forward


def spoil_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Make the loss, or only its gradient, NaN in the given steps (from 1; one micro-batch a step)."""
    calls = iter(range(1, 10**6))

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (output,) = FORWARD(self, sample, *args, **kwargs)
        if next(calls) in steps:
            if what == "loss":
                factor = torch.ones(len(output), 1, 1, 1)
                factor[1] = float("nan")
                output = output * factor
            else:
                output.register_hook(lambda gradient: gradient * float("inf"))
        return (output,)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)


@pytest.mark.parametrize("where", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_value_in_the_training_set(trainer: Any, cached: Any, where: str, value: float) -> None:
    tensor = getattr(cached, where).clone()
    tensor[2].view(-1)[7] = value
    run = trainer()
    with pytest.raises(IntegrityError) as caught:
        run(cached=replace(cached, **{where: tensor}))
    assert "sample-2" in caught.value.where if where == "latents" else "2" in caught.value.where
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert run.events("train_step") == []


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_step_updates_nothing(trainer: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    spoil_steps(monkeypatch, {2}, what)
    weights: list[dict[str, torch.Tensor]] = []
    run = trainer()
    result = run(sample_every=1, samples=lambda step, unet: weights.append(lora_state_dict(unet)))
    assert [loss is None for loss in result.losses] == [False, True, False, False]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert all(bool(value.isfinite().all()) for value in result.adapter.values())
    (event,) = run.events("train_skipped")
    assert event["at_step"] == 2
    assert len(event["samples"]) == (1 if what == "loss" else 0)  # the neighbours' losses are not spoilt
    assert any("Step 2" in line and "nothing was updated" in line for line in run.listener.warnings)


def test_skips_with_good_steps_between_go_on(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, {1, 2, 4, 5}, "loss")
    result = trainer()(steps=6)
    assert [loss is None for loss in result.losses] == [True, True, False, True, True, False]


def test_three_in_a_row_end_the_run(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, {3, 4, 5}, "gradient")
    run = trainer()
    with pytest.raises(CraftError, match="3 training steps in a row") as caught:
        run(steps=8, checkpoint_every=2)
    assert caught.value.exit_code == ExitCode.FAILED
    with open_run(run.root) as opened:
        found = latest(opened, "5" * 64)
    assert found is not None
    assert found.step == 4
    assert found.meta["skips_in_a_row"] == 2
