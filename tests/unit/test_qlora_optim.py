"""8-bit AdamW behind one interface: each kind's step, the state's journey between them, and a shortage of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_fast.errors import IntegrityError, ResourceError
from craft_fast.qlora.optim import (
    BitsAndBytesOptimizer,
    FlatOptimizer,
    Kind,
    Optimizer,
    make_optimizer,
    optimizer_kind,
    persist,
)
from craft_fast.quiet import import_bitsandbytes

SHAPES = {"small": (10, 20), "large": (64, 65), "edge": (4096,), "odd": (4097,), "matrix": (2, 64, 64)}
KINDS: list[Kind] = ["bitsandbytes", "flat", "fused_backward"]
LR = 0.01


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}


def give(params: Mapping[str, nn.Parameter], seed: int, *, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = (torch.randn(p.shape, generator=draw) * scale).to(p.dtype)


def step(params: Mapping[str, nn.Parameter], optimizer: Optimizer, seed: int) -> Tensor:
    give(params, seed)
    norm = optimizer.step(LR)
    optimizer.zero_grad()
    return norm


def fresh(
    kind: Kind = "bitsandbytes", *, dtype: torch.dtype = torch.float32, max_grad_norm: float = 1e9, seed: int = 0
) -> tuple[dict[str, nn.Parameter], Any]:
    params = parameters(dtype)
    made = make_optimizer(params, kind=kind, lr=LR, weight_decay=0.1, max_grad_norm=max_grad_norm, seed=seed)
    return params, made


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


# ---- what each kind does in a step


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e9])
def test_it_is_bitsandbytes_own_step_after_torch_own_clip(max_grad_norm: float) -> None:
    bnb = import_bitsandbytes()
    params, optimizer = fresh(max_grad_norm=max_grad_norm)
    theirs = parameters()
    other = bnb.optim.AdamW8bit(list(theirs.values()), lr=LR, weight_decay=0.1)
    for seed in range(3):
        give(theirs, seed)
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_grad_norm)
        other.step()
        assert torch.equal(step(params, optimizer, seed), norm)
    assert isinstance(optimizer.optimizer, bnb.optim.AdamW8bit)
    assert same(params, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_go_the_same_way(kind: Kind) -> None:
    """Without a clip, ten steps that move a parameter by 10 learning rates, against AdamW in float64."""
    params, optimizer = fresh(kind)
    exact = {name: nn.Parameter(p.detach().double()) for name, p in parameters().items()}
    truth = torch.optim.AdamW(exact.values(), lr=LR, weight_decay=0.1)
    for seed in range(10):
        give(params, seed)
        for name, p in exact.items():
            p.grad = params[name].grad.double()
        truth.step()
        optimizer.step(LR)
        optimizer.zero_grad()
    start = parameters()
    away = torch.cat([(params[name].double() - p).detach().flatten() for name, p in exact.items()]) / LR
    moved = torch.cat([(start[name].double() - p).detach().flatten() for name, p in exact.items()]) / LR
    assert float(moved.square().mean().sqrt()) > 2.0
    assert float(away.square().mean().sqrt()) < 0.1  # measured 0.049 for each


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_of_each_step_is_the_one_given(kind: Kind) -> None:
    params, optimizer = fresh(kind)
    for rate in (1e-3, 0.0, 1e-4):
        before = copies(params)
        give(params, 1)
        optimizer.step(rate)
        optimizer.zero_grad()
        moved = max(float((p.detach() - before[name]).abs().max()) for name, p in params.items())
        assert moved <= rate * 1.6
        assert moved >= rate * 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_makes_no_difference(kind: Kind) -> None:
    params, optimizer = fresh(kind, max_grad_norm=1.0)
    others, other = fresh(kind, max_grad_norm=1.0)
    for seed in range(2):
        give(params, seed)
        give(others, seed, scale=1024.0)
        norms = optimizer.step(LR), other.step(LR, grad_scale=1024.0)
        assert torch.equal(*norms)
        assert float(norms[0]) == pytest.approx(math.sqrt(sum(p.numel() for p in params.values())), rel=0.02)
        assert norms[0].dtype == torch.float32
        assert norms[0].shape == ()
        optimizer.zero_grad()
        other.zero_grad()
    assert same(params, others)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_blocks_the_update(kind: Kind, bad: float) -> None:
    params, optimizer = fresh(kind)
    step(params, optimizer, 0)
    before, state = copies(params), optimizer.state_tensors()
    give(params, 1)
    optimizer.step(LR, loss=torch.tensor(bad, dtype=torch.float64))
    optimizer.zero_grad()
    assert same(params, before)
    assert same(optimizer.state_tensors(), state)
    give(params, 1)
    optimizer.step(LR, loss=torch.tensor(3.0))
    assert not any(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_never_used(kind: Kind) -> None:
    params, optimizer = fresh(kind)
    step(params, optimizer, 0)
    before, state = copies(params), optimizer.state_tensors()
    give(params, 1)
    assert params["matrix"].grad is not None
    params["matrix"].grad[1, 2, 3] = math.nan
    assert not bool(optimizer.step(LR, loss=torch.tensor(1.0)).isfinite())
    optimizer.zero_grad()
    now = optimizer.state_tensors()
    touched = {name for name in params if not torch.equal(params[name], before[name])}
    # By tensor where updates happen in backward: "edge" is the other parameter that is updated by itself.
    assert touched == ({"small", "large", "edge", "odd"} if kind == "fused_backward" else set())
    for name, value in state.items():
        if name.split(".")[0] not in touched:
            assert torch.equal(value, now[name]), name
    assert bool(step(params, optimizer, 2).isfinite())
    assert all(bool(p.isfinite().all()) for p in params.values())


def test_flat_waits_for_nothing_and_its_parts_are_its_step() -> None:
    """A recorded graph replays ``apply`` alone: rate and loss are tensors by then."""
    params, optimizer = fresh("flat", max_grad_norm=1.0)
    others, other = fresh("flat", max_grad_norm=1.0)
    assert isinstance(optimizer, FlatOptimizer)
    for seed, rate in enumerate((LR, LR / 7)):
        for given in (params, others):
            draw = torch.Generator().manual_seed(seed)
            for p in given.values():
                assert p.grad is not None
                p.grad.copy_(torch.randn(p.shape, generator=draw) * 2)
        optimizer.set_lr(rate)
        first = optimizer.apply(loss=torch.tensor(1.0), grad_scale=2.0)
        assert torch.equal(first, other.step(rate, loss=torch.tensor(1.0), grad_scale=2.0))
        optimizer.zero_grad()
        other.zero_grad()
    assert same(params, others)
    assert all(p.grad is not None and not p.grad.any() for p in params.values())
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step(math.nan)


def test_bfloat16_parameters_move_by_less_than_they_can_hold() -> None:
    """At 1.0 bfloat16 numbers lie 0.0078 apart; 200 updates of 1e-4 are 0.02, which rounding to nearest loses."""
    moved = {}
    for kind in KINDS:
        params = {"matrix": nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))}
        optimizer = make_optimizer(params, kind=kind, lr=1e-4, weight_decay=0.0, max_grad_norm=1e9, seed=3)
        for _ in range(200):
            params["matrix"].grad = torch.ones(64, 64, dtype=torch.bfloat16)
            optimizer.step(1e-4)
            optimizer.zero_grad()
        moved[kind] = 1.0 - float(params["matrix"].detach().double().mean())
    assert moved["bitsandbytes"] == 0.0
    # One element's 200 draws have a deviation of 0.007 at most, so the mean of 4,096 one of 1.1e-4.
    assert moved["flat"] == pytest.approx(0.02, abs=5e-4)
    assert moved["fused_backward"] == pytest.approx(0.02, abs=5e-4)


# ---- the state


def test_small_tensors_stay_in_32_bits() -> None:
    for kind in KINDS:
        _, optimizer = fresh(kind)
        tensors = optimizer.state_tensors()
        dtypes = {name: tensors[f"{name}.state1"].dtype for name in SHAPES}
        assert dtypes == {name: torch.float32 if name == "small" else torch.uint8 for name in SHAPES}
        assert tensors["odd.absmax1"].shape == (17,)
        assert tensors["qmap1"].shape == tensors["qmap2"].shape == (256,)
        assert "small.absmax1" not in tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_restored_state_goes_on_bit_for_bit(kind: Kind, dtype: torch.dtype) -> None:
    params, optimizer = fresh(kind, dtype=dtype, max_grad_norm=5.0)
    for seed in range(3):
        step(params, optimizer, seed)
    state, weights = optimizer.state_tensors(), copies(params)
    other, restored = fresh(kind, dtype=dtype, max_grad_norm=5.0)
    forgetful, without = fresh(kind, dtype=dtype, max_grad_norm=5.0)
    restored.load_state_tensors(state)
    with torch.no_grad():
        for name, value in weights.items():
            other[name].copy_(value)
            forgetful[name].copy_(value)
    for seed in range(3, 6):
        assert torch.equal(step(params, optimizer, seed), step(other, restored, seed))
        step(forgetful, without, seed)
    assert same(params, other)
    assert not any(torch.equal(params[name], forgetful[name]) for name in params)
    assert same(optimizer.state_tensors(), restored.state_tensors())


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_state_of_one_kind_goes_on_in_each_other(source: Kind, target: Kind) -> None:
    params, optimizer = fresh(source)
    for seed in range(5):
        step(params, optimizer, seed)
    saved = optimizer.state_tensors()
    others, other = fresh(target)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    other.load_state_tensors(saved)
    back = other.state_tensors()
    assert same(back, saved)
    assert all(value.device.type == "cpu" and value.dtype == saved[name].dtype for name, value in back.items())
    for seed in range(5, 10):
        step(params, optimizer, seed)
        step(others, other, seed)
    away = torch.cat([(params[name] - p).detach().flatten() for name, p in others.items()]) / LR
    assert float(away.square().mean().sqrt()) < (1e-9 if source == target else 0.01)  # measured 0.0016


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_are_copies(kind: Kind) -> None:
    params, optimizer = fresh(kind)
    step(params, optimizer, 0)
    state = optimizer.state_tensors()
    before = copies(state)
    step(params, optimizer, 1)
    assert same(state, before)


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_does_not_fit_is_refused_whole(kind: Kind) -> None:
    params, optimizer = fresh(kind)
    step(params, optimizer, 0)
    good = optimizer.state_tensors()
    _, target = fresh(kind)
    untouched = target.state_tensors()
    for bad in (
        {name: tensor for name, tensor in good.items() if name != "large.absmax2"},
        {**good, "stranger.state1": torch.zeros(2)},
        {**good, "edge.state1": good["edge.state1"].float()},
        {**good, "odd.state2": good["odd.state2"][:-1]},
        {**good, "qmap1": good["qmap1"] * 2},
        {**good, **dict.fromkeys([f"{name}.step" for name in SHAPES], torch.tensor(-1))},
    ):
        with pytest.raises(IntegrityError) as caught:
            target.load_state_tensors(bad, where="step-7")
        assert caught.value.where == "step-7"
        assert "differences" in caught.value.why
    assert same(target.state_tensors(), untouched)


def test_parameters_with_different_numbers_of_steps() -> None:
    params, optimizer = fresh()
    give(params, 0)
    params["small"].grad = None
    optimizer.step(LR)
    saved = optimizer.state_tensors()
    for kind in ("flat", "fused_backward"):
        _, target = fresh(kind)
        before = target.state_tensors()
        with pytest.raises(IntegrityError, match="does not fit") as caught:
            target.load_state_tensors(saved)
        assert "not all the same" in caught.value.why
        assert same(target.state_tensors(), before)
    saved["small.step"], saved["edge.step"] = torch.tensor(1), torch.tensor(5)
    _, target = fresh("fused_backward")
    target.load_state_tensors(saved)  # those that are updated by themselves count by themselves
    assert same(target.state_tensors(), saved)


# ---- memory runs out


def failing(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, fails: set[int]) -> list[int]:
    real = getattr(owner, name)
    calls: list[int] = []

    def attempt(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) in fails:
            if name == "update_step":
                owner.state[args[1]]["step"] += 1  # bitsandbytes counts before it allocates
            raise torch.OutOfMemoryError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, attempt)
    return calls


@pytest.mark.parametrize("kind", ["bitsandbytes", "flat"])
def test_out_of_memory_updates_each_parameter_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = fresh(kind)
    other, unlucky = fresh(kind)
    name = "update_step" if kind == "bitsandbytes" else "step"
    calls = failing(unlucky.optimizer, name, monkeypatch, {2, 3, 6} if kind == "bitsandbytes" else {1, 2, 3})
    freed: list[int] = []
    give(params, 0, scale=8.0)
    optimizer.step(LR, grad_scale=8.0)
    give(other, 0, scale=8.0)
    unlucky.step(LR, grad_scale=8.0, on_out_of_memory=lambda: freed.append(1))
    assert len(freed) == 3
    assert len(calls) == (8 if kind == "bitsandbytes" else 4)
    assert same(params, other)
    assert same(optimizer.state_tensors(), unlucky.state_tensors())


def test_memory_that_is_never_enough_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = fresh()
    calls = failing(optimizer.optimizer, "update_step", monkeypatch, set(range(2, 100)))
    with pytest.raises(ResourceError) as caught:
        step(params, optimizer, 0)
    assert caught.value.where == "large"
    assert len(calls) == 5


def test_other_errors_are_not_tried_again() -> None:
    with pytest.raises(StopIteration):
        persist(iter(()).__next__, lambda: pytest.fail("tried again"), "here")


# ---- parameters without a gradient, and the choice of a kind


@pytest.mark.parametrize("kind", ["bitsandbytes", "fused_backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_without_a_gradient_are_left_alone(kind: Kind, name: str) -> None:
    params, optimizer = fresh(kind)
    step(params, optimizer, 0)
    before, state = copies(params), optimizer.state_tensors()
    give(params, 1)
    params[name].grad = None
    optimizer.step(LR)
    now = optimizer.state_tensors()
    for other in SHAPES:
        assert torch.equal(params[other], before[other]) == (other == name), other
    for key in ("state1", "state2"):
        assert torch.equal(now[f"{name}.{key}"], state[f"{name}.{key}"])
    # The small ones of fused_backward share one counter.
    shared = kind == "fused_backward" and name in ("small", "large", "odd")
    assert int(now[f"{name}.step"]) == (2 if shared else 1)


def test_the_choice_of_a_kind() -> None:
    assert optimizer_kind("auto", method="lora", device="cpu") == "bitsandbytes"
    assert optimizer_kind("auto", method="full", device="cpu") == "fused_backward"
    assert optimizer_kind("flat", method="full", device="cpu") == "flat"
    assert optimizer_kind("bitsandbytes", method="qlora", device="cpu") == "bitsandbytes"
    assert isinstance(fresh("bitsandbytes")[1], BitsAndBytesOptimizer)
    facts = {kind: (fresh(kind)[1].capturable, fresh(kind)[1].updates_in_backward) for kind in KINDS}
    assert facts == {"bitsandbytes": (False, False), "flat": (True, False), "fused_backward": (False, True)}
    with pytest.raises(ValueError, match="kind must be one of"):
        make_optimizer(parameters(), kind="sgd", lr=LR, weight_decay=0.1, max_grad_norm=1.0)  # type: ignore[arg-type]
