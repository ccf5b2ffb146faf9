"""Updates inside of backward when memory runs out: what can be tried again, what cannot, and a trial without harm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast.errors import ResourceError
from craft_fast.qlora import fused_backward
from craft_fast.tiny.random_model import build_random_sdxl
from tests.unit import whole_unets
from tests.unit.whole_unets import LR, Watch, changed, large_names, loss_of, same, train, trained, weights


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    return partial(whole_unets.load, build_random_sdxl(tmp_path_factory.mktemp("sdxl")) / "unet")


class Shortage:
    """Raises out-of-memory when backward has finished the ``at``-th gradient, once; made before the optimizer."""

    def __init__(self, unet: Any, at: int) -> None:
        self.left = at
        for p in unet.parameters():
            if p.numel() % 4096 == 0:
                p.register_post_accumulate_grad_hook(self)

    def __call__(self, _: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")


def test_out_of_memory_in_the_middle_says_what_to_do(load: Callable[..., Any]) -> None:
    unet = load(torch.bfloat16)
    Shortage(unet, at=20)
    optimizer = trained(unet)
    before = weights(unet)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        train(unet, optimizer, range(1))
    assert len(changed(before, weights(unet))) == 19
    with pytest.raises(ResourceError) as caught:
        optimizer.zero_grad()
    assert "after 19 of 69" in caught.value.where
    assert "last checkpoint is whole" in caught.value.hint
    assert "same command" in caught.value.hint
    assert all(p.grad is None for p in unet.parameters())
    optimizer.zero_grad()  # said once


def test_out_of_memory_before_the_first_update_can_be_tried_again(load: Callable[..., Any]) -> None:
    unet, other = load(torch.bfloat16), load(torch.bfloat16)
    Shortage(unet, at=1)
    optimizer, calm = trained(unet), trained(other)
    with pytest.raises(torch.OutOfMemoryError):
        train(unet, optimizer, range(1))
    train(unet, optimizer, range(2))
    train(other, calm, range(2))
    assert same(weights(unet), weights(other))
    assert same(optimizer.state_tensors(), calm.state_tensors())


def test_out_of_memory_in_an_update_changes_nothing_of_it(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load(torch.bfloat16)
    optimizer = trained(unet)
    before, state = weights(unet), optimizer.state_tensors()
    real, calls = fused_backward.adamw8bit_, []

    def update(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(fused_backward, "adamw8bit_", update)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        train(unet, optimizer, range(1))
    assert not changed(before, weights(unet))
    optimizer.zero_grad()
    assert same(optimizer.state_tensors(), state)
    # In step() memory can be freed and the update done again, on gradients that were unscaled once.
    calls.clear()
    loss_of(unet, 0).mul(8.0).backward()
    freed: list[int] = []
    optimizer.step(LR, grad_scale=8.0, on_out_of_memory=lambda: freed.append(1))
    other = load(torch.bfloat16)
    train(other, trained(other), range(1))
    assert freed == [1]
    away = torch.cat([(a - b).flatten() for a, b in zip(unet.parameters(), other.parameters(), strict=True)])
    assert float((away != 0).float().mean()) < 0.01  # a power of two changes no gradient but the smallest


@pytest.mark.parametrize("at", [0, 30])
def test_a_dry_run_changes_nothing_and_frees_as_it_goes(load: Callable[..., Any], at: int) -> None:
    unet, other = load(torch.bfloat16), load(torch.bfloat16)
    Shortage(unet, at=at)
    watch = Watch(unet)
    optimizer = trained(unet)
    before, state = weights(unet), optimizer.state_tensors()
    if at:
        with pytest.raises(torch.OutOfMemoryError), optimizer.dry_run():
            train(unet, optimizer, range(1))
    else:
        with optimizer.dry_run():
            train(unet, optimizer, range(1))
        assert watch.seen == len(large_names(unet))
    assert watch.most <= 2
    assert not changed(before, weights(unet))
    assert same(optimizer.state_tensors(), state)
    assert all(p.grad is None for p in unet.parameters())
    calm = trained(other)
    train(unet, optimizer, range(2))
    train(other, calm, range(2))
    assert same(weights(unet), weights(other))
