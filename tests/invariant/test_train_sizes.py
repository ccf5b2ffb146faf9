"""Samples of several sizes in one batch: each counts as it would alone, and a stopped run ends in the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from craft_fast.cache import CachedSet

SIZES = [(8, 8), (4, 12), (8, 8), (12, 4), (4, 12), (8, 8)]


@pytest.fixture
def mixed(cached: CachedSet) -> CachedSet:
    draw = torch.Generator().manual_seed(9)
    return dataclasses.replace(cached, latents=tuple(torch.randn(4, h, w, generator=draw) for h, w in SIZES))


def losses(trainer: Any, name: str, cached: CachedSet, **settings: Any) -> list[float]:
    """Losses of three steps that change nothing: the rate is next to nothing."""
    options = {"steps": 3, "learning_rate": 1e-30, "prompt_dropout": 0.3, "method": "lora", **settings}
    return list(trainer(name)(cached=cached, **options).losses)


def alone(cached: CachedSet, row: int) -> CachedSet:
    """The set with one sample's weight alone: all others weigh nothing."""
    weights = torch.zeros_like(cached.weights)
    weights[row] = cached.weights[row]
    return dataclasses.replace(cached, weights=weights)


def test_a_step_s_loss_is_the_sum_of_what_each_sample_gives_alone(trainer: Any, mixed: CachedSet) -> None:
    whole = losses(trainer, "whole", mixed, micro_batch_size=6, steps=1)
    parts = []
    for row in range(6):
        found = losses(trainer, f"alone-{row}", alone(mixed, row), micro_batch_size=6, steps=1)
        # Weights are over their mean size, which is another with one sample alone.
        share = float(mixed.weights[row] / mixed.weights.mean()) / 6
        parts.append(found[0] * share)
    assert sum(parts) == pytest.approx(whole[0], rel=1e-5)
    assert len(set(parts)) == 6


def test_how_a_batch_is_cut_changes_rounding_alone(trainer: Any, mixed: CachedSet) -> None:
    whole = losses(trainer, "whole", mixed, micro_batch_size=6)
    cut = losses(trainer, "cut", mixed, micro_batch_size=1, grad_accum_steps=6)
    assert cut == pytest.approx(whole, rel=1e-5)


def test_equal_sizes_are_trained_as_one_tensor_is(trainer: Any, cached: CachedSet) -> None:
    same = dataclasses.replace(cached, latents=tuple(cached.latents))
    one, other = trainer("tensor")(steps=3), trainer("rows")(cached=same, steps=3)
    assert one.losses == other.losses
    assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_stopped_run_ends_like_an_unbroken_one(trainer: Any, mixed: CachedSet, method: str) -> None:
    expected = trainer("whole")(cached=mixed, steps=4, method=method)
    broken = trainer("stopped")
    broken(cached=mixed, steps=4, method=method, stop_at=2)
    found = broken(cached=mixed, steps=4, method=method)
    assert found.losses == expected.losses
    assert all(torch.equal(found.adapter[name], expected.adapter[name]) for name in expected.adapter)


def test_every_size_is_told_to_the_unet_as_its_own(
    trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import craft_fast.train as train_module

    seen: dict[tuple[int, ...], list[float]] = {}

    class Watched(train_module.Stepper):
        def _forward_backward(self, *args: Any, noised: torch.Tensor, **tensors: Any) -> Any:
            seen[tuple(noised.shape[-2:])] = self.add_time_ids[noised.shape[-2], noised.shape[-1]][0].tolist()
            return super()._forward_backward(*args, noised=noised, **tensors)

    monkeypatch.setattr(train_module, "Stepper", Watched)
    run = trainer("seen")
    run(cached=mixed, steps=2, micro_batch_size=6)
    scale = run.model.vae_scale_factor
    assert seen == {(h, w): [h * scale, w * scale, 0.0, 0.0, h * scale, w * scale] for h, w in set(SIZES)}
