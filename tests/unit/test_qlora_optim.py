"""AdamW8bit: the state's journey through tensors, and a step that a shortage of memory can not tear."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from craft_fast.errors import IntegrityError, ResourceError
from craft_fast.qlora.nf4 import import_bitsandbytes
from craft_fast.qlora.optim import apply_update, load_optimizer_tensors, make_optimizer, optimizer_tensors

SHAPES = {"small": (10, 20), "large": (64, 65), "edge": (4096,), "odd": (4097,)}


def parameters() -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def step(params: dict[str, torch.nn.Parameter], optimizer: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=draw)
    apply_update(optimizer, on_out_of_memory=lambda: None)


def fresh() -> tuple[dict[str, torch.nn.Parameter], Any]:
    params = parameters()
    return params, make_optimizer(params, lr=0.01, weight_decay=0.1)


def test_it_is_bitsandbytes_own_step() -> None:
    bnb = import_bitsandbytes()
    params, optimizer = fresh()
    theirs = parameters()
    other = bnb.optim.AdamW8bit(list(theirs.values()), lr=0.01, weight_decay=0.1)
    for seed in range(3):
        step(params, optimizer, seed)
        for name, p in theirs.items():
            p.grad = params[name].grad.clone()
        other.step()
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    assert all(torch.equal(params[name], theirs[name]) for name in params)


def test_small_tensors_stay_in_32_bits() -> None:
    _, optimizer = fresh()
    tensors = optimizer_tensors(optimizer)
    dtypes = {name: tensors[f"{name}.state1"].dtype for name in SHAPES}
    assert dtypes == {"small": torch.float32, "large": torch.uint8, "edge": torch.uint8, "odd": torch.uint8}
    assert tensors["odd.absmax1"].shape == (17,)
    assert tensors["qmap1"].shape == tensors["qmap2"].shape == (256,)
    assert "small.absmax1" not in tensors


def test_restored_state_goes_on_bit_for_bit() -> None:
    params, optimizer = fresh()
    for seed in range(3):
        step(params, optimizer, seed)
    state, weights = optimizer_tensors(optimizer), {name: p.detach().clone() for name, p in params.items()}
    other, restored = fresh()
    load_optimizer_tensors(restored, state)
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(weights[name])
    forgetful = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    without = make_optimizer(forgetful, lr=0.01, weight_decay=0.1)
    for seed in range(3, 6):
        step(params, optimizer, seed)
        step(other, restored, seed)
        step(forgetful, without, seed)
    assert all(torch.equal(params[name], other[name]) for name in params)
    assert not any(torch.equal(params[name], forgetful[name]) for name in params)
    one, two = optimizer_tensors(optimizer), optimizer_tensors(restored)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_saved_tensors_are_copies() -> None:
    params, optimizer = fresh()
    step(params, optimizer, 0)
    state = optimizer_tensors(optimizer)
    before = {name: tensor.clone() for name, tensor in state.items()}
    step(params, optimizer, 1)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_state_that_does_not_fit_is_refused_whole() -> None:
    params, optimizer = fresh()
    step(params, optimizer, 0)
    good = optimizer_tensors(optimizer)
    _, target = fresh()
    untouched = optimizer_tensors(target)
    for bad in (
        {name: tensor for name, tensor in good.items() if name != "large.absmax2"},
        {**good, "stranger.state1": torch.zeros(2)},
        {**good, "large.state1": good["large.state1"].float()},
        {**good, "qmap1": good["qmap1"] * 2},
    ):
        with pytest.raises(IntegrityError):
            load_optimizer_tensors(target, bad)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in optimizer_tensors(target).items())


def failing(optimizer: Any, monkeypatch: pytest.MonkeyPatch, fails: set[int]) -> list[int]:
    update = optimizer.update_step
    calls: list[int] = []

    def update_step(group: Any, p: Any, gindex: int, pindex: int) -> None:
        calls.append(pindex)
        if len(calls) in fails:
            optimizer.state[p]["step"] += 1
            raise torch.OutOfMemoryError("injected")
        update(group, p, gindex, pindex)

    monkeypatch.setattr(optimizer, "update_step", update_step)
    return calls


def test_out_of_memory_updates_each_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = fresh()
    other, unlucky = fresh()
    calls = failing(unlucky, monkeypatch, {2, 3, 6})
    step(params, optimizer, 0)
    step(other, unlucky, 0)
    assert calls == [0, 1, 1, 1, 2, 3, 3]
    assert all(torch.equal(params[name], other[name]) for name in params)
    one, two = optimizer_tensors(optimizer), optimizer_tensors(unlucky)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_memory_that_is_never_enough_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = fresh()
    failing(optimizer, monkeypatch, set(range(2, 100)))
    with pytest.raises(ResourceError) as caught:
        step(params, optimizer, 0)
    assert caught.value.where == "large"


def test_parameters_without_a_gradient_are_left_alone() -> None:
    params, optimizer = fresh()
    before = params["small"].detach().clone()
    for name, p in params.items():
        p.grad = None if name == "small" else torch.ones_like(p)
    apply_update(optimizer, on_out_of_memory=lambda: None)
    assert torch.equal(params["small"], before)
    assert optimizer_tensors(optimizer)["small.step"] == 0
