"""The step's engine against plain torch: the same inputs, loss and gradients, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast.config import EngineSettings
from craft_fast.qlora import step as step_module
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.engine import decide
from craft_fast.qlora.inputs import MicroBatch
from craft_fast.qlora.optim import Kind, make_optimizer
from craft_fast.qlora.step import Stepper
from craft_fast.tiny.random_model import _unet
from craft_kernels.noise_and_target import noise_and_target
from craft_kernels.weighted_noise_loss import weighted_noise_loss
from tests.unit.training_sets import CPU, SIZES, T, batch, inputs

SCHEDULE = torch.linspace(0.99, 0.01, T)
LAMBDA = torch.linspace(0.5, 1.5, T)
TIME_IDS = {(h, w): torch.tensor([[8.0 * h, 8.0 * w, 0.0, 0.0, 8.0 * h, 8.0 * w]]) for h, w in SIZES}
SEED = 17
LR = 1e-3


@pytest.fixture(scope="module")
def base() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _unet()


def make(
    base: Any, *, kind: Kind = "flat", dtype: torch.dtype = torch.float32, method: Any = "lora", **options: Any
) -> tuple[Stepper, dict[str, Any]]:
    unet = copy.deepcopy(base)
    parameters = prepare_unet(
        unet, method=method, dtype=dtype, rank=4, lora_alpha=8.0, target_modules=["to_q", "to_out.0"], seed=5,
        fused_lora=True,
    )  # fmt: skip
    if method == "lora":  # from the start both factors have a gradient
        draw = torch.Generator().manual_seed(2)
        for name, p in parameters.items():
            if "lora_B" in name:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=draw))
    optimizer = make_optimizer(parameters, kind=kind, lr=LR, weight_decay=0.01, max_grad_norm=1.0, seed=5)
    common: dict[str, Any] = {
        "alphas_cumprod": SCHEDULE, "prediction_type": "epsilon", "timestep_weight": LAMBDA,
        "add_time_ids": {size: ids.to(dtype) for size, ids in TIME_IDS.items()}, "dtype": dtype, "device": CPU,
        "noise_seed": SEED, "record": True, "autocast": False,
    }  # fmt: skip
    return Stepper(unet, optimizer, **{**common, **options}), parameters


def by_hand(unet: Any, part: MicroBatch, *, step: int, divisor: int) -> Tensor:
    """Loss of one micro-batch, its gradient added to ``p.grad``; no buffer, no Replay."""
    noised, target = noise_and_target(
        part.latents, part.noise_ids, SCHEDULE, part.timesteps, seed=SEED, step=step, prediction_type="epsilon"
    )
    height, width = noised.shape[-2:]
    conditions = {"text_embeds": part.pooled_prompt_embeds, "time_ids": TIME_IDS[height, width].repeat(len(part), 1)}
    noise_pred = unet(noised, part.timesteps, part.prompt_embeds, added_cond_kwargs=conditions).sample
    loss, _ = weighted_noise_loss(
        noise_pred, target, part.weights, divisor=divisor, timesteps=part.timesteps, timestep_weight=LAMBDA
    )
    loss.backward()
    return loss.detach()


def gradients(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# ---- loss and gradients


@pytest.mark.parametrize("size", [5, 2])
def test_loss_and_gradients_to_the_bit(base: Any, size: int) -> None:
    stepper, parameters = make(base)
    reference, expected = make(base)
    for step in range(3):
        parts = inputs().select(batch(step)).split(size)
        reference.zero_grad()
        losses = [by_hand(reference.unet, part, step=step, divisor=5) for part in parts]
        loss, errors = stepper.gradients(parts, step=step, divisor=5)
        assert torch.equal(loss, torch.stack(losses).sum())
        assert same(gradients(parameters), gradients(expected))
        assert errors.shape == (5,)
        assert float(
            gradients(parameters)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"].norm()
        )


@pytest.mark.parametrize("size", [5, 2])
def test_samples_of_several_sizes_count_as_they_would_alone(base: Any, size: int) -> None:
    """The gradient of a batch is the mean of its samples' own, each made by itself without our engine."""
    stepper, parameters = make(base)
    reference, expected = make(base)
    data = inputs(mixed=True)
    for step in range(2):
        wanted = batch(step)
        parts = [part for found in data.by_size(wanted) for part in data.select(found).split(size)]
        assert len({part.latents.shape[2:] for part in parts}) > 1
        reference.zero_grad()
        singles = [data.select(wanted.take(torch.tensor([i]))) for i in range(5)]
        losses = [by_hand(reference.unet, single, step=step, divisor=1) / 5 for single in singles]
        loss, _ = stepper.gradients(parts, step=step, divisor=5)
        assert torch.allclose(loss, torch.stack(losses).sum(), rtol=1e-5)
        for name, gradient in gradients(parameters).items():
            mean = expected[name].grad / 5
            assert torch.allclose(gradient, mean, rtol=1e-3, atol=1e-5 * float(mean.abs().max())), name


def test_no_more_than_some_shapes_are_recorded(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those met first have buffers; the others run as they are, and every bit stays."""
    data, results = inputs(mixed=True), []
    for limit in (8, 2):
        monkeypatch.setattr(step_module, "MAX_RECORDED", limit)
        stepper, parameters = make(base)
        found = []
        for step in range(3):
            parts = [data.select(part) for part in data.by_size(batch(step))]
            found.append(stepper.gradients(parts, step=step, divisor=5)[0])
            stepper.update(LR)
        results.append((len(stepper._passes), torch.stack(found), parameters))
    (many, losses, one), (few, others, other) = results
    assert many > few == 2
    assert torch.equal(losses, others)
    assert same(one, other)


def test_gradients_of_an_earlier_call_are_dropped(base: Any) -> None:
    stepper, parameters = make(base)
    parts = inputs().select(batch()).split(2)
    stepper.gradients(parts, step=0, divisor=5)
    once = gradients(parameters)
    stepper.gradients(parts, step=0, divisor=5)
    assert same(gradients(parameters), once)


def test_a_call_that_ran_out_of_memory_can_be_made_again(base: Any) -> None:
    stepper, parameters = make(base)
    parts = inputs().select(batch()).split(2)
    expected, _ = stepper.gradients(parts, step=0, divisor=5)
    whole = gradients(parameters)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    handle = stepper.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.gradients(parts, step=0, divisor=5)
    handle.remove()
    assert not same(gradients(parameters), whole)
    stepper.release()
    loss, _ = stepper.gradients(parts, step=0, divisor=5)
    assert torch.equal(loss, expected)
    assert same(gradients(parameters), whole)


def test_noise_goes_by_step_and_not_by_call(base: Any) -> None:
    stepper, _ = make(base)
    parts = inputs().select(batch()).split(5)
    first, again, other = (float(stepper.gradients(parts, step=step, divisor=5)[0]) for step in (0, 0, 1))
    assert first == again != other


# ---- updates


@pytest.mark.parametrize("kind", ["flat", "bitsandbytes"])
def test_update_is_the_optimizer_s_own(base: Any, kind: Kind) -> None:
    stepper, parameters = make(base, kind=kind)
    reference, expected = make(base, kind=kind)
    for step in range(3):
        parts = inputs().select(batch(step)).split(5)
        stepper.gradients(parts, step=step, divisor=5)
        norm = stepper.update(LR * (step + 1))
        reference.zero_grad()
        loss = by_hand(reference.unet, parts[0], step=step, divisor=5)
        assert torch.equal(norm, reference.optimizer.step(LR * (step + 1), loss=loss))
        assert same(parameters, expected)


@pytest.mark.parametrize("kind", ["flat", "bitsandbytes", "fused_backward"])
@pytest.mark.parametrize("where", ["weight", "gradient", "loss", "loss alone"])
def test_nothing_is_applied_that_is_not_finite(
    base: Any, kind: Kind, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device refuses by itself, before anyone reads loss or norm."""
    method = "full" if kind == "fused_backward" else "lora"
    stepper, parameters = make(base, kind=kind, method=method)
    if where == "weight":
        weight = stepper.unet.conv_in.weight if method == "lora" else parameters["conv_in.weight"]
        weight.data.view(-1)[3] = float("nan")
    handle = None
    if where == "gradient":
        # Of the output: all gradients are spoilt, the loss is not.
        def spoil(module: Any, args: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: gradient * float("nan"))

        handle = stepper.unet.conv_out.register_forward_hook(spoil)
    part = inputs().select(batch())
    if where == "loss":
        part.weights[1] = float("inf")
    if where == "loss alone":  # it overflows in a sum of which every term has a gradient

        def overflow(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            loss, errors = weighted_noise_loss(*args, **kwargs)
            return loss + float("inf"), errors

        monkeypatch.setattr(step_module, "weighted_noise_loss", overflow)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    loss, _ = stepper.gradients([part], step=0, divisor=5, lr=LR)
    norm = stepper.update(LR)
    monkeypatch.undo()
    assert bool(loss.isfinite()) == (where == "gradient")
    assert not bool(norm.isfinite() & loss.isfinite())
    assert all(torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, p in parameters.items())
    if handle is not None:
        handle.remove()
    if where != "weight":  # and the next step is none the worse
        stepper.gradients([inputs().select(batch(1))], step=1, divisor=5, lr=LR)
        assert bool(stepper.update(LR).isfinite())
        assert any(not torch.equal(p, before[name]) for name, p in parameters.items())


def test_updates_in_backward_and_behind_it(base: Any) -> None:
    """With the rate told beforehand parameters change in backward; without it in ``update``, the same way."""
    early, first = make(base, kind="fused_backward", method="full")
    late, second = make(base, kind="fused_backward", method="full")
    for step in range(2):
        parts = inputs().select(batch(step)).split(3)
        before = {name: p.detach().clone() for name, p in first.items()}
        losses = [
            early.gradients(parts, step=step, divisor=5, lr=LR)[0],
            late.gradients(parts, step=step, divisor=5)[0],
        ]
        assert torch.equal(*losses)
        assert sum(not torch.equal(p, before[name]) for name, p in first.items()) > 50
        assert all(torch.equal(p, before[name]) for name, p in second.items())
        early.update(LR)
        late.update(LR)
        assert same(first, second)


@pytest.mark.parametrize("kind", ["flat", "bitsandbytes"])
def test_the_loss_scale_of_float16_is_divided_out(base: Any, kind: Kind) -> None:
    stepper, _ = make(base, kind=kind, dtype=torch.float16)
    reference, _ = make(base, kind=kind)
    assert stepper.scale == 1024.0
    assert reference.scale == 1.0
    norms = []
    for one, dtype in ((stepper, torch.float16), (reference, torch.float32)):
        one.gradients([inputs(dtype).select(batch())], step=0, divisor=5)
        norms.append(float(one.update(LR)))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_an_update_without_memory_is_tried_again(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper, parameters = make(base)
    other, expected = make(base)
    for one in (stepper, other):
        one.gradients([inputs().select(batch())], step=0, divisor=5)
    inner: Any = stepper.optimizer
    step, calls = inner.optimizer.step, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return step(*args, **kwargs)

    monkeypatch.setattr(inner.optimizer, "step", failing)
    norm = stepper.update(LR, on_out_of_memory=stepper.release)
    assert len(calls) == 2
    assert torch.equal(norm, other.update(LR))
    assert same(parameters, expected)


def test_release_changes_no_bit(base: Any) -> None:
    results = []
    for releases in (False, True):
        stepper, parameters = make(base)
        for step in range(3):
            stepper.gradients(inputs().select(batch(step)).split(3), step=step, divisor=5)
            if releases:
                stepper.release()
            stepper.update(LR)
        results.append({name: p.detach().clone() for name, p in parameters.items()})
    assert same(*results)


def test_settled_once_nothing_is_new(base: Any) -> None:
    stepper, _ = make(base)
    seen = []
    for step in range(8):
        if step == 5:
            stepper.release()
        stepper.gradients([inputs().select(batch(step))], step=step, divisor=5)
        seen.append(stepper.settled)
    assert seen == [False, False, False, False, True, False, False, False]


def test_a_shape_that_is_new_is_not_settled(base: Any) -> None:
    stepper, _ = make(base)
    data, seen = inputs(mixed=True), []
    several = [data.select(part) for part in data.by_size(batch())]
    for step in range(10):
        stepper.gradients(several[:1] if step < 6 else several, step=step, divisor=5)
        seen.append(stepper.settled)
    assert seen == [*[False] * 4, True, True, *[False] * 3, True]


# ---- choices


@pytest.mark.parametrize(
    ("engine", "method", "device", "dtype", "expected"),
    [
        ({}, "qlora", "cpu", torch.float32, ("fused", "bitsandbytes", False, False)),
        ({}, "qlora", "cpu", torch.bfloat16, ("fused", "bitsandbytes", False, False)),
        ({"lora": "fused", "optimizer": "flat"}, "lora", "cpu", torch.bfloat16, ("fused", "flat", False, False)),
        ({"lora": "fused", "autocast": True}, "lora", "cpu", torch.float16, ("fused", "bitsandbytes", True, False)),
        ({"autocast": True}, "lora", "cpu", torch.float32, ("fused", "bitsandbytes", False, False)),
        ({}, "full", "cpu", torch.bfloat16, ("fused", "fused_backward", False, False)),
        ({"optimizer": "flat"}, "lora", "cuda", torch.bfloat16, ("fused", "flat", False, True)),
        ({"optimizer": "flat", "graph": False}, "lora", "cuda", torch.bfloat16, ("fused", "flat", False, False)),
        ({"lora": "peft", "optimizer": "bitsandbytes"}, "qlora", "cuda", torch.bfloat16,
         ("peft", "bitsandbytes", True, True)),
        ({}, "full", "cuda", torch.bfloat16, ("fused", "fused_backward", False, False)),
    ],
)  # fmt: skip
def test_what_is_decided(
    engine: dict[str, Any], method: str, device: str, dtype: torch.dtype, expected: tuple[Any, ...]
) -> None:
    choices = decide(EngineSettings(**engine), method=method, device=torch.device(device), dtype=dtype)
    assert (choices.lora, choices.optimizer, choices.autocast, choices.graph) == expected
    assert choices.attention == "sdpa"
    assert not choices.compile
    assert set(choices.record()) == {
        f"engine.{name}" for name in ("lora", "optimizer", "autocast", "graph", "compile", "attention")
    }


def test_several_sizes_are_not_compiled() -> None:
    engine = EngineSettings(compile=True)
    given: dict[str, Any] = {"method": "lora", "device": CPU, "dtype": torch.float32}
    assert decide(engine, **given).compile
    assert not decide(engine, **given, several_sizes=True).compile
