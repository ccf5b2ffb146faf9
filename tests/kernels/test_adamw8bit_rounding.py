"""Stochastic rounding of bfloat16 parameters in the 8-bit AdamW step: unbiased, repeatable, equal in every form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_kernels.adamw8bit import AdamW8bitState, FlatAdamW8bit, adamw8bit_, new_state
from craft_kernels.adamw8bit.naive import random_bits, stochastic

FORMS = ["torch", "triton"]
# bfloat16's largest number and the distance to the one below; float32's largest number.
LARGEST, GAP, LARGEST_32 = 2.0**128 - 2.0**120, 2.0**120, torch.finfo(torch.float32).max


def arguments(device: torch.device | str, *, seed: int | None = 5, sizes: tuple[int, int] = (8192, 4096)) -> Any:
    draw = torch.Generator().manual_seed(sum(sizes))
    params = (torch.randn(sum(sizes), generator=draw) * 0.02).to(device, torch.bfloat16)
    grads = torch.randn(sum(sizes), generator=draw).to(device, torch.bfloat16)
    return {
        "params": params,
        "grads": grads,
        "state": new_state(*sizes, device),
        "lr": torch.tensor(5e-5, dtype=torch.float64, device=device),
        "rounding_seed": None if seed is None else torch.tensor(seed, device=device),
    }


def numbers() -> Tensor:
    """float32 values of every size, with both signs."""
    draw = torch.Generator().manual_seed(1)
    spread = torch.randn(300, generator=draw) * 10.0 ** torch.randint(-37, 37, (300,), generator=draw)
    edges = torch.tensor([0.0, 1.0, 1.5, 0.02, 1e-45, 1e-40, 2.0**-126, 3e38, LARGEST, 65504.0, 1.00390625])
    values = torch.cat([spread.float(), edges])
    return torch.cat([values, -values])


# ---- the rounding itself


def test_over_all_random_bits_the_mean_is_the_value_itself() -> None:
    """No sampling: each of the 65,536 draws once, summed in float64, where that is exact."""
    every = torch.arange(65536, dtype=torch.int32)
    for value in numbers():
        rounded = stochastic(value.expand(65536), every)
        assert rounded.dtype == torch.bfloat16
        found = rounded.unique()
        assert len(found) <= 2
        if len(found) == 2:
            low, high = found.double().tolist()
            assert low < value < high
            assert float(found[0].nextafter(found[1])) == high  # neighbours
        assert float((rounded.double() / 65536).sum()) == float(value)


def test_numbers_of_bfloat16_stay_as_they_are() -> None:
    codes = torch.arange(65536, dtype=torch.int32)
    every = (codes << 16).view(torch.float32)
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        rounded = stochastic(every, torch.full_like(codes, bits)).float()
        real = ~every.isnan()
        assert torch.equal(rounded[real].view(torch.int32), every[real].view(torch.int32))
        assert bool(rounded[~real].isnan().all())


def test_the_sign_makes_no_difference() -> None:
    values, bits = numbers(), torch.randint(0, 65536, (622,), generator=torch.Generator().manual_seed(2)).int()
    assert torch.equal(stochastic(values, bits), -stochastic(-values, bits))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nothing_finite_becomes_infinite(sign: float) -> None:
    for value in (LARGEST, LARGEST - GAP / 2, LARGEST + GAP / 4, LARGEST_32):
        for bits in (0, 1, 0x8000, 0xFFFF):
            found = float(stochastic(torch.tensor([sign * value]), torch.tensor([bits], dtype=torch.int32)))
            assert math.isfinite(found)
            assert abs(found) in (LARGEST, LARGEST - GAP)
    for value in (math.inf, math.nan):
        for bits in (0, 0xFFFF):
            found = float(stochastic(torch.tensor([sign * value]), torch.tensor([bits], dtype=torch.int32)))
            assert found == sign * value or (math.isnan(found) and math.isnan(value))
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert bool(stochastic(payload, torch.full((3,), 0xFFFF, dtype=torch.int32)).isnan().all())


def test_the_bits_are_uniform_and_differ_by_seed_step_and_element() -> None:
    seed, step = torch.tensor(9), torch.tensor(1)
    size = 1 << 20
    bits = random_bits(size, seed, step)
    assert bits.dtype == torch.int32
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 65536
    # Chi-square of 65,536 values: mean 65,535, deviation 362.
    counts = torch.bincount(bits.long(), minlength=65536).double()
    assert abs(float(((counts - size / 65536) ** 2 / (size / 65536)).sum()) - 65535) < 5 * 362
    centred = (bits.double() - 32767.5) / 18918.6
    others = [random_bits(size, seed, torch.tensor(2)), random_bits(size, torch.tensor(10), step), bits.roll(1)]
    others += [random_bits(size, torch.tensor(9 + 2**32), step), bits.view(-1, 2).flip(1).flatten()]
    for other in others:
        assert abs(float((centred * (other.double() - 32767.5) / 18918.6).mean())) < 5 / math.sqrt(size)
    assert torch.equal(random_bits(size, seed, step), bits)
    assert torch.equal(random_bits(64, seed, step), bits[:64])  # an element's bits do not depend on how many there are


def test_the_bits_are_those_of_philox() -> None:
    """The published answer of Philox4x32-10 for a counter of zeros is that of element group 0 in step 0, seed 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    found = random_bits(8, torch.tensor(0), torch.tensor(0)).tolist()
    assert found == [half for word in words for half in (word & 0xFFFF, word >> 16)]


# ---- the step


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -3])
def test_triton_equals_torch_to_the_bit(device: torch.device, seed: int) -> None:
    given, other = arguments(device, seed=seed), arguments(device, seed=seed)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, LARGEST, -LARGEST, 1e-39, 2.0**-126])
    for one in (given, other):
        one["params"][: len(special)] = special.to(device, torch.bfloat16)
        one["state"].step.fill_(2**31 - 2)
    for _ in range(4):
        adamw8bit_(**given, impl="torch")
        adamw8bit_(**other, impl="triton")
        if device.type == "cpu":
            assert torch.equal(other["params"].view(torch.int16), given["params"].view(torch.int16))
        else:  # a root of the GPU may be a unit of float32 off: one element in 65,536 / 2 then rounds otherwise
            assert float((other["params"].view(torch.int16) != given["params"].view(torch.int16)).float().mean()) < 1e-3
        for name, want, found in zip(AdamW8bitState._fields, given["state"], other["state"], strict=True):
            assert name == "grad_norm" or torch.equal(found, want), name
        other["params"].copy_(given["params"])
        for one in (given, other):
            one["grads"].mul_(-0.5)


@pytest.mark.parametrize("form", FORMS)
def test_the_moments_do_not_know_of_the_rounding(form: str, device: torch.device) -> None:
    given, nearest = arguments(device), arguments(device, seed=None)
    adamw8bit_(**given, impl=form)
    adamw8bit_(**nearest, impl=form)
    for name, want, found in zip(AdamW8bitState._fields, nearest["state"], given["state"], strict=True):
        assert torch.equal(found, want), name
    apart = (given["params"].view(torch.int16).int() - nearest["params"].view(torch.int16).int()).abs()
    assert int(apart.max()) == 1
    assert float(apart.float().mean()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_many_draws_is_the_unrounded_step(form: str, device: torch.device) -> None:
    exact = arguments(device, seed=None)
    exact["params"], exact["grads"] = exact["params"].float(), exact["grads"].float()
    adamw8bit_(**exact, impl="torch")
    draws = 400 if form == "torch" else 20
    total, squares = (torch.zeros_like(exact["params"], dtype=torch.float64) for _ in range(2))
    for seed in range(draws):
        given = arguments(device, seed=1000 + seed)
        adamw8bit_(**given, impl=form)
        error = given["params"].double() - exact["params"].double()
        total += error
        squares += error.square()
    # All elements together, then each of 12,288 by itself.
    assert abs(float(total.sum())) < 4 * float(squares.sum().sqrt())
    if form == "torch":
        value = exact["params"].double()
        spacing = 2.0 ** (value.abs().log2().floor() - 7)
        fraction = (value / spacing).frac().abs()
        sigma = (fraction * (1 - fraction) * draws).sqrt() * spacing
        assert bool((total.abs() <= 5.5 * sigma + 1.01 * spacing).all())


@pytest.mark.parametrize("form", FORMS)
def test_it_repeats_and_goes_on_from_step_to_step(form: str, device: torch.device) -> None:
    runs = [arguments(device, seed=seed) for seed in (5, 5, 6)]
    for _ in range(2):
        for given in runs:
            adamw8bit_(**given, impl=form)
    assert torch.equal(runs[0]["params"], runs[1]["params"])
    assert not torch.equal(runs[0]["params"], runs[2]["params"])
    # The same update of the same numbers in another step meets other bits.
    one, two = arguments(device), arguments(device)
    two["state"].step.fill_(1)
    for given in (one, two):
        adamw8bit_(**given, betas=(0.0, 0.0), impl=form)
    assert not torch.equal(one["params"], two["params"])


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_not_finite_still_changes_nothing(form: str, device: torch.device) -> None:
    given = arguments(device)
    before = given["params"].clone()
    given["grads"][7] = math.nan
    adamw8bit_(**given, impl=form)
    assert torch.equal(given["params"], before)
    assert int(given["state"].step) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_that_is_not_a_number_stays_none(form: str, device: torch.device) -> None:
    """A GPU's NaN is 0x7FFFFFFF: adding random bits to that one would make it a number near zero."""
    given = arguments(device)
    bad = torch.tensor([math.nan, -math.nan, math.inf, -math.inf] * 64, device=device, dtype=torch.bfloat16)
    given["params"][: len(bad)] = bad
    for _ in range(3):
        adamw8bit_(**given, weight_decay=0.0, impl=form)
    found = given["params"][: len(bad)]
    assert torch.equal(found.isnan(), bad.isnan())
    assert torch.equal(found[~bad.isnan()], bad[~bad.isnan()])


def test_many_tiny_updates_move_the_weights_as_in_float32() -> None:
    """At 0.02 bfloat16 numbers lie 1.2e-4 apart: an update of 5e-5 is below half of that, and lost to rounding."""
    steps, size = 400, 4096
    moved = {}
    for name, dtype, seed in (("float32", torch.float32, None), ("nearest", torch.bfloat16, None),
                              ("random", torch.bfloat16, 3)):  # fmt: skip
        param = nn.Parameter(torch.full((size,), -0.02).bfloat16().to(dtype))
        start = param.detach().double().clone()
        optimizer = FlatAdamW8bit({"p": param}, lr=5e-5, weight_decay=0.0, rounding_seed=seed)
        for _ in range(steps):
            param.grad.fill_(1.0)
            optimizer.step()
        moved[name] = float((param.detach().double() - start).mean())
    assert moved["float32"] == pytest.approx(-steps * 5e-5, rel=1e-3)
    assert moved["nearest"] == 0.0
    # The weights become -0.04, where numbers lie 2.4e-4 apart: a walk of 400 steps errs by at most 400^0.5 / 2 of
    # them, 2.4e-3, for one weight, and by 3.8e-5 in the mean of 4,096.
    assert moved["random"] == pytest.approx(moved["float32"], abs=4 * 3.8e-5)


def test_flat_resumes_with_the_same_bits() -> None:
    def fresh() -> tuple[dict[str, nn.Parameter], FlatAdamW8bit]:
        draw = torch.Generator().manual_seed(0)
        shapes = {"a": (64, 80), "b": (7,), "c": (5000,)}
        params = {n: nn.Parameter((torch.randn(s, generator=draw) * 0.02).bfloat16()) for n, s in shapes.items()}
        return params, FlatAdamW8bit(params, lr=5e-5, rounding_seed=11)

    def go(params: dict[str, nn.Parameter], optimizer: FlatAdamW8bit, steps: range) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for p in params.values():
                p.grad.copy_(torch.randn(p.shape, generator=draw))
            optimizer.step()

    params, optimizer = fresh()
    go(params, optimizer, range(3))
    saved, weights = optimizer.state_tensors(), {name: p.detach().clone() for name, p in params.items()}
    others, other = fresh()
    other.load_state_tensors(saved)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(weights[name])
    go(params, optimizer, range(3, 6))
    go(others, other, range(3, 6))
    assert all(torch.equal(p, others[name]) for name, p in params.items())
    assert not any(torch.equal(p, weights[name]) for name, p in params.items())


def test_parameters_that_are_skipped_stay_with_their_moments() -> None:
    draw = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(size, generator=draw)) for name, size in (("a", 5000), ("b", 9), ("c", 9))}
    optimizer = FlatAdamW8bit(params)
    optimizer.grads.fill_(1.0)
    optimizer.step()
    before, state = {n: p.detach().clone() for n, p in params.items()}, optimizer.state_tensors()
    optimizer.step(skip=["a", "c"])
    now = optimizer.state_tensors()
    assert {name for name, p in params.items() if not torch.equal(p, before[name])} == {"b"}
    changed = {name for name, value in state.items() if not torch.equal(now[name], value)}
    assert changed == {"b.state1", "b.state2", "a.step", "b.step", "c.step"}


def test_the_registration_is_sound_with_a_seed(device: torch.device) -> None:
    given = arguments(device, sizes=(4096, 4096))
    args = (given["params"], given["grads"], *given["state"], given["lr"], 0.9, 0.999, 1e-8, 1e-2, 1.0)
    torch.library.opcheck(torch.ops.craft_kernels.adamw8bit_.default, (*args, given["rounding_seed"]))


def test_what_cannot_be_rounded_at_random_is_refused() -> None:
    given = arguments("cpu")
    for dtype in (torch.float16, torch.float32):
        other = {**given, "params": given["params"].to(dtype), "grads": given["grads"].to(dtype)}
        with pytest.raises(ValueError, match=r"params.dtype with rounding_seed must be one of torch.bfloat16, got"):
            adamw8bit_(**other)
        with pytest.raises(ValueError, match=r"params' dtype with rounding_seed must be one of torch.bfloat16, got"):
            FlatAdamW8bit({"a": nn.Parameter(torch.ones(3, dtype=dtype))}, rounding_seed=1)
    with pytest.raises(ValueError, match=r"rounding_seed must be int64 \[\], got int32"):
        adamw8bit_(**{**given, "rounding_seed": torch.tensor(1, dtype=torch.int32)})
    with pytest.raises(ValueError, match="rounding_seed must be on cpu like params, got meta"):
        adamw8bit_(**{**given, "rounding_seed": torch.tensor(1, device="meta")})
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"rounding_seed must be in \[0, 2\^63\), got {bad}"):
            FlatAdamW8bit({"a": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}, rounding_seed=bad)


@pytest.mark.gpu
def test_a_replayed_cuda_graph_draws_new_bits_each_time(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    graphed, eager = arguments(device), arguments(device)
    for given in (graphed, eager):
        adamw8bit_(**given, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw8bit_(**graphed, impl="triton")
    for _ in range(4):
        graph.replay()
        adamw8bit_(**eager, impl="triton")
        assert torch.equal(graphed["params"], eager["params"])
    assert int(graphed["state"].step) == 5
