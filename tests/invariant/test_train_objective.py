"""The loss that training reports is design.md section 1 item 6; what must not matter does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from craft_fast.losses import draw_batch
from craft_fast.sdxl.schedule import alphas_cumprod
from craft_fast.sdxl.unet import pristine_unet
from craft_kernels.noise_and_target import counter_noise

GAMMA = 0.5


def loss_by_hand(run: Any, cached: Any, *, batch_size: int, gamma: float | None) -> float:
    """The first step's loss, straight from the equations, in float64 but for the network."""
    model = run.model
    schedule = alphas_cumprod(model).double()
    batch = draw_batch(
        cached.sample_ids, seed=run.seed, step=0, timesteps=1000, batch_size=batch_size, prompt_dropout=0.5
    )
    scale = model.vae_scale_factor
    assert batch.dropped.any()
    assert not batch.dropped.all()
    total = 0.0
    for i, row in enumerate(batch.rows.tolist()):
        t, x_0 = int(batch.timesteps[i]), cached.latents[row].double()
        noise = counter_noise(batch.noise_ids[i : i + 1], x_0.shape, seed=batch.noise_seed, step=0)[0].double()
        height_px, width_px = x_0.shape[1] * scale, x_0.shape[2] * scale
        a_t = float(schedule[t])
        snr = a_t / (1 - a_t)
        x_t = math.sqrt(a_t) * x_0 + math.sqrt(1 - a_t) * noise
        text = 3 if batch.dropped[i] else int(cached.prompt_index[row])
        conditions = {
            "text_embeds": cached.pooled_prompt_embeds[text][None],
            "time_ids": torch.tensor([[height_px, width_px, 0.0, 0.0, height_px, width_px]]),
        }
        with torch.no_grad():
            predicted = pristine_unet(model)(
                x_t.float()[None], t, cached.prompt_embeds[text][None], added_cond_kwargs=conditions
            ).sample[0]
        if model.prediction_type == "epsilon":
            target, lam = noise, 1.0 if gamma is None else min(snr, gamma) / snr
        else:
            target = math.sqrt(a_t) * noise - math.sqrt(1 - a_t) * x_0
            lam = 1.0 if gamma is None else min(snr, gamma) / (snr + 1)
        weight = float(cached.weights[row] / cached.weights.mean())
        total += weight * lam * float((predicted.double() - target).square().mean())
    return total / batch_size


@pytest.mark.parametrize("gamma", [None, GAMMA])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_first_loss_is_the_equation(trainer: Any, cached: Any, prediction_type: str, gamma: float | None) -> None:
    run = trainer(prediction_type=prediction_type)
    options = {"micro_batch_size": 4, "grad_accum_steps": 2, "prompt_dropout": 0.5, "min_snr_gamma": gamma}
    result = run(method="lora", steps=1, **options)
    expected = loss_by_hand(run, cached, batch_size=8, gamma=gamma)
    assert result.losses[0] == pytest.approx(expected, rel=1e-5)


def test_so_is_that_of_samples_of_several_sizes(trainer: Any, mixed: Any) -> None:
    """Each with the size of its own picture, whatever is beside it; weights over the whole set."""
    run = trainer()
    options = {"micro_batch_size": 4, "grad_accum_steps": 2, "prompt_dropout": 0.5, "min_snr_gamma": GAMMA}
    result = run(cached=mixed, method="lora", steps=1, **options)
    assert result.losses[0] == pytest.approx(loss_by_hand(run, mixed, batch_size=8, gamma=GAMMA), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernels_train_like_plain_torch(trainer: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The real loop with the Triton forms, here in Triton's interpreter: the same noise, losses and weights."""
    pytest.importorskip("triton")
    # The interpreter takes seconds a step: few layers, and three steps, of which the last sees two updates.
    options = {
        "micro_batch_size": 2,
        "grad_accum_steps": 2,
        "steps": 3,
        "min_snr_gamma": GAMMA,
        "target_modules": ["to_q"],
    }
    plain = trainer("plain", dtype=dtype)(**options)
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "triton")
    fused = trainer("fused", dtype=dtype)(**options)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5 if dtype == "float32" else 2e-3)
    moved = [name for name in plain.adapter if name.endswith("lora_B.weight")]
    agree = [torch.cosine_similarity(fused.adapter[n].flatten(), plain.adapter[n].flatten(), 0) for n in moved]
    assert min(agree) > 0.99


def test_training_learns(trainer: Any, cached: Any) -> None:
    """An untrained UNet predicts about 0, a loss of 1; noise is easy to find in pure noise."""
    result = trainer()(method="full", steps=40, learning_rate=3e-3, prompt_dropout=0.0)
    first, last = result.losses[:8], result.losses[-8:]
    assert sum(last) < 0.8 * sum(first)


def test_a_sample_of_weight_zero_has_no_say(trainer: Any, cached: Any) -> None:
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0])
    other = cached.latents.clone()
    other[2] += 1
    one = trainer("one")(cached=replace(cached, weights=weights))
    two = trainer("two")(cached=replace(cached, weights=weights, latents=other))
    control = trainer("control")(cached=replace(cached, latents=other))
    assert all(torch.equal(one.adapter[name], two.adapter[name]) for name in one.adapter)
    assert any(not torch.equal(one.adapter[name], control.adapter[name]) for name in one.adapter)


def test_a_negative_weight_pushes_away(trainer: Any, cached: Any) -> None:
    up = trainer("up")(steps=1, cached=replace(cached, weights=torch.ones(6)))
    down = trainer("down")(steps=1, cached=replace(cached, weights=-torch.ones(6)))
    assert down.losses[0] == -up.losses[0]
    moved = [name for name in up.adapter if name.endswith("lora_B.weight")]
    # B starts at zero and Adam's first step is the gradient's sign: the two results are each other's mirror.
    assert all(torch.equal(up.adapter[name], -down.adapter[name]) for name in moved)
    assert any(bool(up.adapter[name].any()) for name in moved)


def test_full_prompt_dropout_reads_only_the_empty_prompt(trainer: Any, cached: Any) -> None:
    other = cached.prompt_embeds.clone()
    other[:3] += 1
    one = trainer("one")(steps=2, prompt_dropout=1.0)
    two = trainer("two")(steps=2, prompt_dropout=1.0, cached=replace(cached, prompt_embeds=other))
    control = trainer("control")(steps=2, prompt_dropout=0.0, cached=replace(cached, prompt_embeds=other))
    assert one.losses == two.losses
    assert one.losses != control.losses


def test_draws_do_not_depend_on_the_other_samples(cached: Any) -> None:
    common: dict[str, Any] = {"seed": 4, "step": 2, "timesteps": 1000, "prompt_dropout": 0.5}
    whole = draw_batch(cached.sample_ids, batch_size=6, **common)
    part = draw_batch(cached.sample_ids[:4], batch_size=4, **common)
    for i, row in enumerate(part.rows.tolist()):
        j = whole.rows.tolist().index(row)
        assert part.noise_ids[i] == whole.noise_ids[j]
        assert part.timesteps[i] == whole.timesteps[j]
        assert part.dropped[i] == whole.dropped[j]


def test_every_draw_of_a_sample_has_its_own_noise(cached: Any) -> None:
    """Another step, another seed, and a second place in the same step: never the same noise twice."""
    common: dict[str, Any] = {"timesteps": 1000, "batch_size": 8, "prompt_dropout": 0.0}
    seen = set()
    for seed, step in ((4, 0), (4, 1), (5, 0)):
        batch = draw_batch(cached.sample_ids[:3], seed=seed, step=step, **common)
        noise = counter_noise(batch.noise_ids, (4, 2, 2), seed=batch.noise_seed, step=batch.step)
        seen |= {tuple(row.tolist()) for row in noise.flatten(1)}
    assert len(seen) == 24


def test_sampling_does_not_disturb_training(trainer: Any) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def samples(step: int, unet: Any) -> None:
        seen.append((step, torch.is_grad_enabled(), unet.training))
        text = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
        unet(torch.randn(1, 4, 8, 8), 5, torch.zeros(1, 32, 64), added_cond_kwargs=text)

    quiet = trainer("quiet")(steps=5)
    drawn = trainer("drawn")(steps=5, sample_every=2, samples=samples)
    assert seen == [(2, False, False), (4, False, False)]
    assert quiet.losses == drawn.losses
    assert all(torch.equal(quiet.adapter[name], drawn.adapter[name]) for name in quiet.adapter)


def test_sampling_without_memory_does_not_end_the_run(trainer: Any) -> None:
    def samples(step: int, unet: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    run = trainer()
    assert run(steps=2, sample_every=1, samples=samples).finished
    assert sum("sample images" in line for line in run.listener.warnings) == 2


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_gradient_checkpointing_changes_only_memory(trainer: Any, method: str) -> None:
    plain = trainer("plain")(method=method, steps=3)
    spared = trainer("spared")(method=method, steps=3, gradient_checkpointing=True)
    assert max(abs(a - b) for a, b in zip(plain.losses, spared.losses, strict=True)) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_with_a_float32_adapter(trainer: Any, dtype: str) -> None:
    reference = trainer("reference")(steps=3)
    result = trainer("half", dtype=dtype)(steps=3)
    assert {value.dtype for value in result.adapter.values()} == {torch.float32}
    assert result.losses == pytest.approx(reference.losses, rel=0.02)
    moved = [name for name in result.adapter if name.endswith("lora_B.weight")]
    agree = [torch.cosine_similarity(result.adapter[n].flatten(), reference.adapter[n].flatten(), 0) for n in moved]
    assert min(agree) > 0.8


def test_base_stays_as_it_was(trainer: Any, sdxl_folder: Any) -> None:
    from safetensors.torch import load_file

    run = trainer()
    run(method="lora", steps=2)
    stored = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    now = {name.replace(".base_layer", ""): p for name, p in run.model.unet.named_parameters() if "lora_" not in name}
    assert now.keys() == stored.keys()
    assert all(torch.equal(now[name], stored[name]) for name in stored)
    assert not any(p.requires_grad for p in now.values())


def test_tensorboard_has_each_step_once(trainer: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer()
    run(stop_at=2)
    result = run()
    board = EventAccumulator(str(run.root / "tensorboard")).Reload()
    events = board.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx(result.losses)
