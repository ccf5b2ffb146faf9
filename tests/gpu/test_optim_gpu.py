"""The three optimizers on a GPU: graphs, no wait for the device, equal bits, and the memory that is saved."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from craft_fast.errors import ResourceError
from craft_fast.qlora.optim import FlatOptimizer, Kind, make_optimizer, optimizer_kind
from craft_kernels.adamw8bit.naive import random_bits, stochastic
from craft_kernels.dispatch import choose

pytestmark = pytest.mark.gpu

KINDS: list[Kind] = ["bitsandbytes", "flat", "fused_backward"]
LR = 1e-4
MIB = 2**20


class Tower(nn.Module):
    """Layers of 8 MiB in bfloat16 each, with biases and norms: small and odd tensors too."""

    def __init__(self, layers: int = 24, width: int = 2048, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.odd = nn.Parameter(torch.randn(5000) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):

            def unit(x: Tensor, norm: Any = norm, layer: Any = layer) -> Tensor:
                return x + F.silu(layer(norm(x)))

            x = checkpoint(unit, x, use_reentrant=False) if self.recompute else unit(x)
        return x * self.odd.float().square().mean().to(x.dtype)


def tower(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tower(**options).to("cuda", dtype)


def trained(model: nn.Module, kind: Kind, *, max_grad_norm: float = 1.0) -> Any:
    parameters = dict(sorted(model.named_parameters()))
    return make_optimizer(parameters, kind=kind, lr=LR, weight_decay=0.01, max_grad_norm=max_grad_norm, seed=1)


def batch(step: int, width: int = 2048) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x, target = (torch.randn(8, width, generator=draw).to("cuda", torch.bfloat16) for _ in range(2))
    return x, target


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x.to(next(model.parameters()).dtype)).float() - target.float()).square().mean()


def train(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step))
        optimizer.arm(LR, loss=loss)
        loss.backward()
        norms.append(optimizer.step(LR, loss=loss.detach()).clone())
    return norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Every wait of the host for the device is an error inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_choice_of_a_kind_on_a_gpu() -> None:
    flat = choose("auto", torch.empty(0, device="cuda")) == "triton"
    assert optimizer_kind("auto", method="qlora", device="cuda") == ("flat" if flat else "bitsandbytes")
    assert optimizer_kind("auto", method="full", device="cuda") == "fused_backward"


@pytest.mark.parametrize("kind", ["flat", "fused_backward"])
def test_a_step_waits_for_nothing(kind: Kind) -> None:
    model = tower(layers=3)
    optimizer = trained(model, kind)
    train(model, optimizer, range(2))  # kernels are compiled, and memory is there
    data = batch(2)
    with no_waiting():
        optimizer.zero_grad()
        loss = loss_of(model, *data)
        optimizer.arm(LR / 2, loss=loss, grad_scale=2.0)
        loss.backward()
        norm = optimizer.step(LR / 2, loss=loss.detach(), grad_scale=2.0)
    assert bool(norm.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_of_flat_is_the_eager_one(dtype: torch.dtype) -> None:
    """Forward, backward and ``apply`` in one graph; the rate changes, and a loss of NaN blocks, from outside."""
    models = tower(dtype, layers=3), tower(dtype, layers=3)
    graphed, eager = (trained(model, "flat") for model in models)
    assert isinstance(graphed, FlatOptimizer)
    x, target = batch(0)
    factor = torch.ones((), device="cuda")

    def body() -> Tensor:
        graphed.zero_grad()
        loss = loss_of(models[0], x, target)
        (loss * 8).backward()
        return graphed.apply(loss=loss.detach() * factor, grad_scale=8.0)

    def by_hand(step: int, rate: float, scale: float) -> Tensor:
        eager.zero_grad()
        loss = loss_of(models[1], *batch(step))
        (loss * 8).backward()
        return eager.step(rate, loss=loss.detach() * scale, grad_scale=8.0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.set_lr(LR)
        body()
        by_hand(0, LR, 1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = body()
    for step in range(1, 6):
        for static, fresh in zip((x, target), batch(step), strict=True):
            static.copy_(fresh)
        scale = math.nan if step == 3 else 1.0
        factor.fill_(scale)
        graphed.set_lr(LR / step)
        before = weights(models[0])
        graph.replay()
        want = by_hand(step, LR / step, scale)
        assert torch.allclose(norm, want, rtol=1e-5, equal_nan=True)
        now = weights(models[0])
        assert same(now, before) == (step == 3)
        # A graph's matrix products may be cut up otherwise: gradients differ in their last bits, and few roundings do.
        for name, value in weights(models[1]).items():
            unequal = (now[name] - value).abs() > (0.05 * LR if dtype == torch.float32 else 0.0)
            assert float(unequal.float().mean()) < 0.1, name
    assert graphed.optimizer.steps_done == 5


def test_the_random_bits_are_those_of_the_cpu() -> None:
    """The same Philox words on both; rounding is integer arithmetic, so nothing else can differ."""
    seed, step = torch.tensor(2**63 - 25), torch.tensor(7)
    here, there = random_bits(1 << 16, seed, step), random_bits(1 << 16, seed.cuda(), step.cuda())
    assert torch.equal(here, there.cpu())
    value = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
    assert torch.equal(stochastic(value, here), stochastic(value.cuda(), there).cpu())


@pytest.mark.parametrize("recompute", [False, True])
def test_fused_backward_keeps_a_few_gradients_at_most(recompute: bool) -> None:
    peaks: dict[str, int] = {}
    for kind in ("flat", "fused_backward"):
        model = tower(recompute=recompute)
        optimizer = trained(model, kind)
        train(model, optimizer, range(1))
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train(model, optimizer, range(1, 2))
        peaks[kind] = torch.cuda.max_memory_allocated()
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    # 24 gradients of 8 MiB less, but for three that may be alive at a time.
    assert peaks["flat"] - peaks["fused_backward"] > 20 * 8 * MIB


def test_fused_backward_needs_what_the_arithmetic_says() -> None:
    small = tower(layers=1)
    train(small, trained(small, "fused_backward"), range(1))  # cuBLAS takes its workspaces
    del small
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    model = tower()
    size = sum(p.numel() for p in model.parameters())
    optimizer = trained(model, "fused_backward")
    held = torch.cuda.memory_allocated() - start
    # bfloat16 weights, two bytes of codes, two scales of 4 bytes a block of 256; 1 % for what is small.
    assert held == pytest.approx(size * (2 + 2 + 2 * 4 / 256), rel=0.01)
    train(model, optimizer, range(2))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - start == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_and_a_resumed_one_have_the_same_bits(kind: Kind) -> None:
    model, other = tower(layers=3), tower(layers=3)
    one, two = trained(model, kind), trained(other, kind)
    train(model, one, range(2))
    train(other, two, range(2))
    assert same(weights(model), weights(other))
    saved, between = one.state_tensors(), weights(model)
    train(model, one, range(2, 4))
    third = tower(layers=3)
    third.load_state_dict(between)
    again = trained(third, kind)
    again.load_state_tensors(saved)
    train(third, again, range(2, 4))
    assert same(weights(model), weights(third))
    assert same(one.state_tensors(), again.state_tensors())


@pytest.mark.parametrize("kind", ["flat", "fused_backward"])
def test_they_learn_as_adamw_does(kind: Kind) -> None:
    """Float32 weights without a clip: 20 steps beside unquantised AdamW (bitsandbytes: see the op's README)."""
    model, exact = tower(torch.float32, layers=2), tower(torch.float32, layers=2)
    optimizer = trained(model, kind, max_grad_norm=1e9)
    truth = torch.optim.AdamW(exact.parameters(), lr=LR, weight_decay=0.01)
    train(model, optimizer, range(20))
    for step in range(20):
        truth.zero_grad()
        loss_of(exact, *batch(step)).backward()
        truth.step()
    start = tower(torch.float32, layers=2)
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(exact.parameters(), start.parameters(), strict=True)])
    apart = torch.cat([(a - b).detach().flatten() for a, b in zip(exact.parameters(), model.parameters(), strict=True)])
    assert float(apart.norm() / moved.norm()) < 0.25


def test_a_real_shortage_in_backward_is_said() -> None:
    model = tower()
    optimizer = trained(model, "fused_backward")
    train(model, optimizer, range(1))

    def greedy(_: Tensor) -> None:
        raised = torch.empty(2**50, dtype=torch.uint8, device="cuda")  # a pebibyte: the allocator itself says no
        del raised

    model.layers[5].weight.register_post_accumulate_grad_hook(greedy)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, range(1, 2))
    with pytest.raises(ResourceError) as caught:
        optimizer.zero_grad()
    assert "last checkpoint is whole" in caught.value.hint
