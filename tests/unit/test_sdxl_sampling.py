"""The SDXL parts against diffusers' own pipeline on the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from craft_fast import rng
from craft_fast.config import GenerateSettings
from craft_fast.errors import ConfigError, CraftError
from craft_fast.sdxl import schedule
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.sampling import make_scheduler, sample_latents
from craft_fast.sdxl.text import PromptEmbeds, add_time_ids, encode_prompts
from craft_fast.sdxl.vae import decode_latents, encode_images

PROMPTS = ["a red circle left of a blue square", "two green triangles, sharp, vivid", "a star"]


@pytest.fixture(scope="module")
def pipe(sdxl_folder: Path) -> Any:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_text_equals_the_pipeline(sdxl: SdxlModel, pipe: Any) -> None:
    ours, negative = encode_prompts(sdxl, PROMPTS), encode_prompts(sdxl, ["blurry"])
    theirs = pipe.encode_prompt(PROMPTS, negative_prompt=["blurry"] * 3)
    assert torch.equal(ours.prompt_embeds, theirs[0])
    assert torch.equal(ours.pooled_prompt_embeds, theirs[2])
    assert torch.allclose(negative.prompt_embeds.expand(3, -1, -1), theirs[1], atol=1e-6)
    assert torch.allclose(negative.pooled_prompt_embeds.expand(3, -1), theirs[3], atol=1e-6)


def test_the_empty_prompt_is_the_pipelines_unconditional(sdxl: SdxlModel, pipe: Any) -> None:
    empty, _, pooled, _ = pipe.encode_prompt([""])
    ours = encode_prompts(sdxl, ["a star", "", "a star"])
    assert not ours.prompt_embeds[1].any()
    assert not ours.pooled_prompt_embeds[1].any()
    assert torch.equal(ours.prompt_embeds[0], ours.prompt_embeds[2])
    sdxl.force_zeros_for_empty_prompt = False
    try:
        literal = encode_prompts(sdxl, [""])
    finally:
        sdxl.force_zeros_for_empty_prompt = True
    assert torch.allclose(literal.prompt_embeds, empty, atol=1e-6)
    assert torch.allclose(literal.pooled_prompt_embeds, pooled, atol=1e-6)


def test_a_prompt_that_is_cut_off_says_so(sdxl: SdxlModel) -> None:
    fits, cut = "star " * 30, "star " * 31
    assert encode_prompts(sdxl, [fits, cut]).truncated == [False, True]


def test_text_can_be_trained_on(sdxl: SdxlModel) -> None:
    weight = torch.ones(64, requires_grad=True)
    (encode_prompts(sdxl, ["a star"]).prompt_embeds * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_equals_the_pipeline(
    sdxl: SdxlModel, pipe: Any, scheduler: str, prediction_type: str, guidance: float
) -> None:
    settings = GenerateSettings(scheduler=scheduler, num_inference_steps=4, guidance_scale=guidance)  # type: ignore[arg-type]
    noise = torch.stack([rng.normal((4, 16, 16), seed) for seed in range(3)])
    sdxl.prediction_type = prediction_type
    try:
        ours = sample_latents(sdxl, encode_prompts(sdxl, PROMPTS), encode_prompts(sdxl, [""]), noise, settings=settings)
        pipe.scheduler = make_scheduler(sdxl, scheduler)
    finally:
        sdxl.prediction_type = "epsilon"
    theirs = pipe(PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=guidance, output_type="latent").images
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_samplers_and_prediction_types_differ(sdxl: SdxlModel) -> None:
    noise = rng.normal((1, 4, 16, 16), 0)
    embeds = encode_prompts(sdxl, PROMPTS[:1])

    def run(name: str) -> torch.Tensor:
        settings = GenerateSettings(scheduler=name, num_inference_steps=4, guidance_scale=1.0)  # type: ignore[arg-type]
        return sample_latents(sdxl, embeds, None, noise, settings=settings)

    results = [run(name) for name in ("dpmpp_2m", "euler", "ddim")]
    sdxl.prediction_type = "v_prediction"
    try:
        results.append(run("dpmpp_2m"))
    finally:
        sdxl.prediction_type = "epsilon"
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert (a - b).abs().max() > 1e-2


def test_guidance_one_runs_half_the_batch(sdxl: SdxlModel) -> None:
    batches: list[int] = []
    hook = sdxl.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    noise = rng.normal((2, 4, 16, 16), 0)
    embeds, empty = encode_prompts(sdxl, PROMPTS[:2]), encode_prompts(sdxl, [""])
    try:
        for guidance in (1.0, 2.0):
            settings = GenerateSettings(num_inference_steps=1, guidance_scale=guidance)
            sample_latents(sdxl, embeds, empty, noise, settings=settings)
    finally:
        hook.remove()
    assert batches == [2, 4]


def test_not_finite_latents_are_an_error(sdxl: SdxlModel) -> None:
    embeds = encode_prompts(sdxl, PROMPTS[:1])
    broken = PromptEmbeds(embeds.prompt_embeds * float("nan"), embeds.pooled_prompt_embeds, embeds.truncated)
    settings = GenerateSettings(num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(CraftError, match="NaN"):
        sample_latents(sdxl, broken, None, rng.normal((1, 4, 16, 16), 0), settings=settings)
    with pytest.raises(CraftError, match="NaN"):
        decode_latents(sdxl, torch.full((1, 4, 16, 16), float("nan")))


def test_decoding_equals_the_pipeline(sdxl: SdxlModel, pipe: Any) -> None:
    latents = rng.normal((3, 4, 16, 16), 5)
    ours = decode_latents(sdxl, latents)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    theirs = torch.from_numpy(pipe.image_processor.postprocess(decoded, output_type="np"))
    expected = (theirs * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 3, 64, 64)
    assert ours.float().std() > 1
    assert (ours.int() - expected.int()).abs().max() <= 1


def test_encoding_is_the_posteriors_mode_in_unet_space(sdxl: SdxlModel) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = encode_images(sdxl, images)
    with torch.no_grad():
        mode = sdxl.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert torch.allclose(latents, mode * sdxl.vae.config.scaling_factor, atol=1e-5)


def test_per_channel_latent_statistics_are_honoured(sdxl: SdxlModel) -> None:
    latents = rng.normal((1, 4, 16, 16), 1)
    plain = decode_latents(sdxl, latents)
    config = sdxl.vae.config
    sdxl.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0] * 4)
    try:
        mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
        # Latents that the statistics map onto the plain ones must give the plain picture.
        shifted = (latents / config.scaling_factor - mean) * config.scaling_factor / 2.0
        assert (decode_latents(sdxl, shifted).int() - plain.int()).abs().max() <= 1
    finally:
        sdxl.vae.register_to_config(latents_mean=None, latents_std=None)


def test_time_ids_are_the_pipelines(sdxl: SdxlModel, pipe: Any) -> None:
    theirs = pipe._get_add_time_ids((64, 48), (0, 0), (64, 48), torch.float32, 32)
    assert torch.equal(add_time_ids(64, 48, 3), theirs.expand(3, -1))


def test_sizes_that_do_not_fit_are_refused(sdxl: SdxlModel) -> None:
    assert sdxl.latent_shape(64, 48) == (4, 16, 12)
    with pytest.raises(ConfigError, match="multiples of 8"):
        sdxl.latent_shape(64, 52)


def test_bfloat16_stays_close_to_float32(sdxl: SdxlModel, sdxl_folder: Path) -> None:
    half = load_sdxl(sdxl_folder, device="cpu", dtype="bfloat16")
    noise = rng.normal((1, 4, 16, 16), 3)
    settings = GenerateSettings(num_inference_steps=4, guidance_scale=2.0)
    a, b = (
        sample_latents(m, encode_prompts(m, PROMPTS[:1]), encode_prompts(m, [""]), noise, settings=settings)
        for m in (sdxl, half)
    )
    assert b.dtype == torch.float32
    assert (a - b).abs().mean() < 0.05 * a.abs().mean()
    assert decode_latents(half, b).shape == (1, 3, 64, 64)


def test_noise_schedule_is_the_schedulers(sdxl: SdxlModel) -> None:
    scheduler = diffusers.DDPMScheduler.from_config(sdxl.scheduler.config)
    alpha_bar = schedule.alphas_cumprod(sdxl)
    x0, noise = rng.normal((4, 4, 2, 2), 0), rng.normal((4, 4, 2, 2), 1)
    timesteps = torch.tensor([0, 10, 500, 999])
    assert torch.allclose(
        schedule.add_noise(x0, noise, timesteps, alpha_bar), scheduler.add_noise(x0, noise, timesteps)
    )
    velocity = schedule.target(x0, noise, timesteps, alpha_bar, "v_prediction")
    assert torch.allclose(velocity, scheduler.get_velocity(x0, noise, timesteps))
    assert schedule.target(x0, noise, timesteps, alpha_bar, "epsilon") is noise
    with pytest.raises(ValueError, match="sample"):
        schedule.target(x0, noise, timesteps, alpha_bar, "sample")


def test_snr_by_hand() -> None:
    values = schedule.snr(torch.tensor([0.9, 0.5, 0.2]), torch.tensor([2, 0, 1]))
    assert torch.allclose(values, torch.tensor([0.25, 9.0, 1.0]))
