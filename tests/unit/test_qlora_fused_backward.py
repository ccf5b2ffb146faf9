"""Updates inside of backward: on a small SDXL UNet, against the same optimizer after backward, and when it breaks."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from craft_fast.errors import IntegrityError
from craft_fast.qlora.fused_backward import FusedBackwardAdamW8bit
from craft_fast.qlora.optim import FlatOptimizer, make_optimizer
from craft_fast.tiny.random_model import build_random_sdxl
from tests.unit import whole_unets
from tests.unit.whole_unets import LR, NO_CLIP, Watch, changed, large_names, loss_of, same, train, trained, weights


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    return partial(whole_unets.load, build_random_sdxl(tmp_path_factory.mktemp("sdxl")) / "unet")


# ---- what it is for


@pytest.mark.parametrize("recompute", [False, True])
def test_no_more_than_two_gradients_are_ever_alive(load: Callable[..., Any], recompute: bool) -> None:
    unet = load(torch.bfloat16, recompute=recompute)
    watch = Watch(unet)
    optimizer = trained(unet)
    before = weights(unet)
    train(unet, optimizer, range(2))
    largest = max(p.nbytes for p in unet.parameters())
    assert watch.seen == 2 * len(large_names(unet)) == 138
    assert watch.most <= 2
    assert watch.most_bytes <= 2 * largest
    assert all(p.grad is None for p in unet.parameters())
    assert len(changed(before, weights(unet))) > 200


def test_the_watch_sees_what_is_kept(load: Callable[..., Any]) -> None:
    unet = load(torch.bfloat16)
    watch = Watch(unet)
    optimizer = trained(unet)
    loss_of(unet, 0).backward()  # not armed
    assert watch.most == len(large_names(unet))
    optimizer.zero_grad()
    assert all(p.grad is None for p in unet.parameters())


# ---- it is the same optimizer


@pytest.mark.parametrize(("micro_batches", "recompute"), [(1, False), (1, True), (2, False)])
def test_it_goes_the_way_of_flat_to_the_bit(load: Callable[..., Any], micro_batches: int, recompute: bool) -> None:
    """In float32 and without a clip there is no difference at all: not in weights, not in the state."""
    unet, other = load(recompute=recompute), load()
    fused, flat = trained(unet), trained(other, kind="flat")
    assert isinstance(fused, FusedBackwardAdamW8bit)
    assert isinstance(flat, FlatOptimizer)
    found = train(unet, fused, range(3), micro_batches=micro_batches)
    want = train(other, flat, range(3), micro_batches=micro_batches)
    assert same(weights(unet), weights(other))
    assert same(fused.state_tensors(), flat.state_tensors())
    assert torch.allclose(torch.stack(found), torch.stack(want), rtol=1e-5)


def test_in_bfloat16_it_stays_close_to_float32(load: Callable[..., Any]) -> None:
    unet, exact, start = load(torch.bfloat16), load(torch.bfloat16).float(), load(torch.bfloat16)
    train(unet, trained(unet), range(5))
    train(exact, trained(exact), range(5))
    before, now, want = (torch.cat([p.flatten() for p in weights(m).values()]).double() for m in (start, unet, exact))
    moved, apart = want - before, now - want
    assert float(moved.norm()) > 0
    # Rounding at random adds noise of no direction: what was learned is there in full.
    assert float((now - before) @ moved / moved.square().sum()) == pytest.approx(1.0, abs=0.05)
    assert float(apart.mean().abs()) < 1e-2 * float(moved.abs().mean())


def test_without_arm_all_happens_in_step(load: Callable[..., Any]) -> None:
    unet, other = load(torch.bfloat16), load(torch.bfloat16)
    one, two = trained(unet, max_grad_norm=0.1), trained(other, max_grad_norm=0.1)
    train(unet, one, range(2))
    for step in range(2):
        loss = loss_of(other, step * 10)
        loss.backward()
        two.step(LR, loss=loss)
        assert all(p.grad is None for p in other.parameters())
    assert same(weights(unet), weights(other))


def test_the_clip_is_by_tensor_and_the_norm_is_of_all(load: Callable[..., Any]) -> None:
    clip = 1e-2
    unet, other = load(), load()
    optimizer = trained(unet, max_grad_norm=clip)
    found = train(unet, optimizer, range(1))[0]
    loss_of(other, 0).backward()
    norms = {name: float(p.grad.double().norm()) for name, p in other.named_parameters()}
    assert float(found) == pytest.approx(math.sqrt(sum(value**2 for value in norms.values())), rel=1e-5)
    state = optimizer.state_tensors()
    for name in large_names(unet):
        # The first moment after one step is 0.1 g, g scaled to the allowed norm at most.
        m = state["qmap1"][state[f"{name}.state1"].int()].view(-1, 256) * state[f"{name}.absmax1"][:, None]
        assert float(m.double().norm()) == pytest.approx(0.1 * min(norms[name], clip), rel=0.02), name
    assert max(norms.values()) > clip > min(norms[name] for name in large_names(unet))


def test_a_scaled_loss_makes_no_difference(load: Callable[..., Any]) -> None:
    unet, other = load(), load()
    one, two = trained(unet), trained(other)
    want = train(unet, one, range(1))[0]
    loss = loss_of(other, 0) * 1024
    two.arm(LR, loss=loss, grad_scale=1024.0)
    loss.backward()
    assert torch.allclose(two.step(LR, grad_scale=1024.0), want, rtol=1e-6)
    away = max(float((a - b).abs().max()) for a, b in zip(weights(unet).values(), weights(other).values(), strict=True))
    assert away <= 0.05 * LR


# ---- a run that was stopped goes on with the same bits


def test_a_resumed_run_repeats_every_bit(load: Callable[..., Any]) -> None:
    unet, other, third = load(torch.bfloat16), load(torch.bfloat16), load(torch.bfloat16)
    optimizer = trained(unet, seed=4)
    train(unet, optimizer, range(2))
    saved, between = optimizer.state_tensors(), weights(unet)
    want = train(unet, optimizer, range(2, 4))
    for model, seed in ((other, 4), (third, 5)):
        model.load_state_dict(between)
        again = trained(model, seed=seed)
        again.load_state_tensors(saved)
        found = train(model, again, range(2, 4))
        assert same(weights(model), weights(unet)) == (seed == 4)
        if seed == 4:
            assert torch.equal(torch.stack(found), torch.stack(want))
            assert same(again.state_tensors(), optimizer.state_tensors())


def test_name_and_seed_decide_on_the_random_bits() -> None:
    found = []
    for seed in (0, 0, 1):
        params = {name: nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for name in ("a", "b")}
        optimizer = make_optimizer(
            params, kind="fused_backward", lr=LR, weight_decay=0.0, max_grad_norm=NO_CLIP, seed=seed
        )
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step(LR)
        found.append(weights(nn.ParameterDict(params)))
    assert same(found[0], found[1])
    for one, two in ((found[0]["a"], found[0]["b"]), (found[0]["a"], found[2]["a"]), (found[0]["b"], found[2]["b"])):
        assert 0.05 < float((one != two).float().mean()) < 0.5


# ---- what is not finite


@pytest.mark.parametrize("name", ["conv_norm_out.weight", "up_blocks.0.resnets.0.conv1.weight"])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(load: Callable[..., Any], name: str) -> None:
    unet = load(torch.bfloat16)
    optimizer = trained(unet)
    train(unet, optimizer, range(1))
    before, state = weights(unet), optimizer.state_tensors()
    spoil = dict(unet.named_parameters())[name].register_hook(lambda grad: grad * math.nan)
    assert not bool(train(unet, optimizer, range(1, 2))[0].isfinite())
    spoil.remove()
    now = weights(unet)
    large = set(large_names(unet))
    # Those outside of the large ones count as one tensor.
    alone = {name} if name in large else {other for other in before if other not in large}
    assert not (changed(before, now) & alone)
    assert len(changed(before, now) & large) > 0.9 * len(large)
    after = optimizer.state_tensors()
    assert all(torch.equal(after[key], value) for key, value in state.items() if key.rpartition(".")[0] in alone)
    assert bool(train(unet, optimizer, range(2, 3))[0].isfinite())
    assert all(bool(p.isfinite().all()) for p in unet.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_blocks_all_of_them(load: Callable[..., Any], bad: float) -> None:
    unet = load(torch.bfloat16)
    optimizer = trained(unet)
    before, state = weights(unet), optimizer.state_tensors()
    loss = loss_of(unet, 0)  # its own gradients are finite: the flag alone blocks
    optimizer.arm(LR, loss=torch.tensor(bad))
    loss.backward()
    assert not bool(optimizer.step(LR).isfinite())
    assert not changed(before, weights(unet))
    assert same(optimizer.state_tensors(), state)
    assert bool(train(unet, optimizer, range(1))[0].isfinite())
    assert changed(before, weights(unet))


# ---- use and misuse


def test_large_parameters_keep_their_memory_and_all_become_contiguous() -> None:
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(64, 64, 3, 3, generator=draw).to(memory_format=torch.channels_last)
    params = {"conv": nn.Parameter(image.clone()), "linear": nn.Parameter(torch.randn(64, 64, generator=draw))}
    address = params["linear"].data_ptr()
    optimizer = make_optimizer(params, kind="fused_backward", lr=LR, weight_decay=0.0, max_grad_norm=NO_CLIP)
    assert params["conv"].is_contiguous()
    assert torch.equal(params["conv"], image)
    assert params["linear"].data_ptr() == address
    params["conv"].grad = image.clone()  # a gradient of another layout
    assert not params["conv"].grad.is_contiguous()
    optimizer.step(LR)
    assert torch.allclose(params["conv"], image - LR * image.sign(), atol=1e-6)


def test_gone_with_its_state_when_nobody_holds_it(load: Callable[..., Any]) -> None:
    unet = load()
    optimizer = trained(unet)
    train(unet, optimizer, range(1))
    state = weakref.ref(optimizer._large[0].state.code1.untyped_storage())
    del optimizer
    gc.collect()
    assert state() is None
    loss_of(unet, 0).backward()  # the hooks that are left do nothing
    assert all(p.grad is not None for p in unet.parameters())


def test_arm_and_step_belong_together(load: Callable[..., Any]) -> None:
    unet = load()
    optimizer = trained(unet)
    train(unet, optimizer, range(1))
    optimizer.arm(LR)
    with pytest.raises(ValueError, match=r"arm\(\) comes once before each step\(\)"):
        optimizer.arm(LR)
    with pytest.raises(ValueError, match=r"step\(\) must be given arm\(\)'s \(lr, grad_scale\) \(0.001, 1.0\), got"):
        optimizer.step(2 * LR)
    before = weights(unet)
    assert float(optimizer.step(LR)) == 0.0  # no backward, so no gradient, and no norm of an earlier step
    assert not changed(before, weights(unet))
    for bad in (math.nan, math.inf, -LR):
        with pytest.raises(ValueError, match="lr must be finite and at least 0, got"):
            optimizer.arm(bad)


def test_a_second_backward_after_arm_is_refused(load: Callable[..., Any]) -> None:
    unet = load()
    optimizer = trained(unet)
    optimizer.arm(LR)
    loss_of(unet, 0).backward()
    with pytest.raises(RuntimeError, match=r"gradient of '.+' came twice after arm\(\)"):
        loss_of(unet, 1).backward()


def test_a_parameter_that_is_not_contiguous_any_more_is_named() -> None:
    params = {"conv": nn.Parameter(torch.ones(64, 64, 3, 3))}
    optimizer = make_optimizer(params, kind="fused_backward", lr=LR, weight_decay=0.0, max_grad_norm=NO_CLIP)
    params["conv"].data = params["conv"].data.to(memory_format=torch.channels_last)
    params["conv"].grad = torch.ones(64, 64, 3, 3)
    with pytest.raises(ValueError, match="parameter 'conv' must stay contiguous"):
        optimizer.step(LR)


def test_a_state_of_negative_steps_is_refused(load: Callable[..., Any]) -> None:
    optimizer = trained(load())
    saved = optimizer.state_tensors()
    for name in ("conv_in.bias", "up_blocks.0.resnets.0.conv1.weight"):
        with pytest.raises(IntegrityError) as caught:
            optimizer.load_state_tensors({**saved, f"{name}.step": torch.tensor(-1)})
        assert f"{name}.step" in caught.value.why
