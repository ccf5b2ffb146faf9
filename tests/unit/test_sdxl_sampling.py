"""The SDXL parts against diffusers' own pipeline on the same random weights."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from craft_fast import rng
from craft_fast.config import GenerateSettings
from craft_fast.errors import ConfigError, CraftError, ResourceError
from craft_fast.sdxl import schedule
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.sampling import Denoiser, guided_steps, make_scheduler, sample_latents
from craft_fast.sdxl.text import PromptEmbeds, add_time_ids, encode_prompts
from craft_fast.sdxl.vae import Concessions, decode_latents, encode_images

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


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        ([0.0, 1.0], 4, "GGGG"),
        ([0.25, 0.75], 4, ".GG."),
        ([0.2, 0.5], 5, ".GG.."),  # 1/5 is in, as 0.2 <= 0.2; 3/5 is not
        ([0.0, 0.0], 3, "..."),
        ([0.5, 0.5], 4, "...."),
        ([0.9, 1.0], 10, ".........G"),
    ],
)
def test_the_guidance_interval_by_hand(interval: list[float], steps: int, expected: str) -> None:
    settings = GenerateSettings(guidance_scale=3.0, guidance_interval=interval)
    assert "".join("G" if act else "." for act in guided_steps(settings, steps)) == expected
    assert not any(guided_steps(settings.model_copy(update={"guidance_scale": 1.0}), steps))


@pytest.mark.parametrize("interval", [[0.5, 0.4], [-0.1, 0.5], [0.0, 1.1]])
def test_what_is_no_guidance_interval_is_refused(interval: list[float]) -> None:
    with pytest.raises(ConfigError, match="interval"):
        guided_steps(GenerateSettings(guidance_interval=interval), 4)


def test_outside_of_the_guidance_interval_half_is_run(sdxl: SdxlModel) -> None:
    batches: list[int] = []
    hook = sdxl.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    noise = rng.normal((2, 4, 16, 16), 0)
    embeds, empty = encode_prompts(sdxl, PROMPTS[:2]), encode_prompts(sdxl, [""])

    def sample(**changes: Any) -> torch.Tensor:
        settings = GenerateSettings(num_inference_steps=4, scheduler="euler", **{"guidance_scale": 4.0, **changes})
        return sample_latents(sdxl, embeds, empty, noise, settings=settings)

    try:
        middle = sample(guidance_interval=[0.25, 0.75])
    finally:
        hook.remove()
    assert batches == [2, 4, 4, 2]
    whole, never = sample(), sample(guidance_scale=1.0)
    assert torch.equal(sample(guidance_interval=[0.0, 0.0]), never)
    assert (middle - whole).abs().max() > 1e-2
    assert (middle - never).abs().max() > 1e-2


def test_the_interval_is_the_guided_steps_of_the_pipeline(sdxl: SdxlModel, pipe: Any) -> None:
    # diffusers' pipeline can be told to guide less from a step on: its callback may set the scale between steps.
    settings = GenerateSettings(
        num_inference_steps=4, scheduler="euler", guidance_scale=4.0, guidance_interval=[0.0, 0.5]
    )
    noise = torch.stack([rng.normal((4, 16, 16), seed) for seed in range(3)])
    ours = sample_latents(sdxl, encode_prompts(sdxl, PROMPTS), encode_prompts(sdxl, [""]), noise, settings=settings)

    def stop_guiding(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline._guidance_scale = 1.0
            values = {name: value.chunk(2)[1] for name, value in values.items()}
        return values

    pipe.scheduler = make_scheduler(sdxl, "euler")
    theirs = pipe(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=4.0, output_type="latent",
        callback_on_step_end=stop_guiding,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.fixture
def zero_snr(tmp_path: Path, sdxl_folder: Path) -> SdxlModel:
    """The model with the schedule and prediction of those that start from pure noise."""
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "zero"))
    path = folder / "scheduler" / "scheduler_config.json"
    told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    return load_sdxl(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_zero_terminal_snr_equals_the_pipeline(zero_snr: SdxlModel, scheduler: str, guidance: float) -> None:
    settings = GenerateSettings(scheduler=scheduler, num_inference_steps=5, guidance_scale=guidance)  # type: ignore[arg-type]
    noise = torch.stack([rng.normal((4, 16, 16), seed) for seed in range(3)])
    embeds, empty = encode_prompts(zero_snr, PROMPTS), encode_prompts(zero_snr, [""])
    ours = sample_latents(zero_snr, embeds, empty, noise, settings=settings)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(zero_snr.path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(zero_snr, scheduler)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    # Without its guidance_rescale, which nobody asked for.
    theirs = pipeline(
        PROMPTS, latents=noise, num_inference_steps=5, guidance_scale=guidance, guidance_rescale=0.0,
        output_type="latent",
    ).images  # fmt: skip
    assert bool(torch.isfinite(ours).all())
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert int(pipeline.scheduler.timesteps[0]) == 999  # starts where there is no signal


def test_ddim_cannot_start_from_pure_noise_by_its_noise(zero_snr: SdxlModel) -> None:
    zero_snr.prediction_type = "epsilon"
    with pytest.raises(ConfigError, match="DDIM") as caught:
        make_scheduler(zero_snr, "ddim")
    assert "generate.scheduler=euler" in caught.value.hint


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim"])
def test_steps_ask_nothing_of_the_device(sdxl: SdxlModel, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A scheduler that looks its timesteps up on a GPU waits for it in each step. Ours keeps them on the CPU, and does
    # not search for the first one.
    cls = type(make_scheduler(sdxl, scheduler))
    devices: list[Any] = []
    set_timesteps = cls.set_timesteps

    def spy(self: Any, steps: int, device: Any = None) -> None:
        devices.append(device)
        set_timesteps(self, steps, device=device)

    def search(*_: Any, **options: Any) -> int:
        raise AssertionError("searched for a timestep")

    monkeypatch.setattr(cls, "set_timesteps", spy)
    monkeypatch.setattr(cls, "index_for_timestep", search, raising=False)
    settings = GenerateSettings(scheduler=scheduler, num_inference_steps=3, guidance_scale=1.0)  # type: ignore[arg-type]
    sample_latents(sdxl, encode_prompts(sdxl, PROMPTS[:1]), None, rng.normal((1, 4, 16, 16), 0), settings=settings)
    assert devices == [None]


# ---- memory


class TooMany:
    """Lets the UNet have at most so many rows, as a GPU does; and says which batches came."""

    def __init__(self, unet: Any, rows: int) -> None:
        self.rows, self.batches = rows, []  # type: ignore[var-annotated]
        self.hook = unet.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        self.batches.append(args[0].shape[0])
        if args[0].shape[0] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore")


def test_a_batch_that_does_not_fit_is_halved_for_good(sdxl: SdxlModel) -> None:
    settings = GenerateSettings(num_inference_steps=1, guidance_scale=2.0, batch_size=8)
    embeds, empty = encode_prompts(sdxl, [f"a star {i}" for i in range(8)]), encode_prompts(sdxl, [""])
    with Denoiser(sdxl, settings) as whole:
        expected = whole.draw(embeds, empty, range(8))
    concessions, said = Concessions(), []  # type: ignore[var-annotated]
    limit = TooMany(sdxl.unet, rows=5)
    try:
        with Denoiser(sdxl, settings, concessions=concessions, warn=said.append) as denoiser:
            found = denoiser.draw(embeds, empty, range(8))
            assert limit.batches == [16, 8, 4, 4, 4, 4]
            denoiser.draw(embeds.select([0, 1, 2]), empty, range(3))
            assert limit.batches[6:] == [4, 2]
        with Denoiser(sdxl, settings, concessions=concessions, warn=said.append) as later:
            later.draw(embeds.select([0, 1]), empty, range(2))
    finally:
        limit.hook.remove()
    assert limit.batches[8:] == [4]
    assert concessions.images_at_once == 2
    # Every image is there, in its place, with its own noise.
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [line.split(" images")[0] for line in said] == ["8", "4"]
    assert "9.00 GiB" in said[1]
    assert "last bits" in said[1]
    assert "--set generate.batch_size=2" in said[1]


def test_one_image_that_does_not_fit_is_the_end(sdxl: SdxlModel) -> None:
    settings = GenerateSettings(num_inference_steps=1, guidance_scale=2.0, batch_size=3)
    embeds, empty = encode_prompts(sdxl, PROMPTS), encode_prompts(sdxl, [""])
    limit = TooMany(sdxl.unet, rows=1)
    try:
        with Denoiser(sdxl, settings) as denoiser, pytest.raises(ResourceError) as caught:
            denoiser.draw(embeds, empty, range(3))
    finally:
        limit.hook.remove()
    assert limit.batches == [6, 2]
    assert "engine.resident=never" in caught.value.hint
    assert "9.00 GiB" in caught.value.why
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_what_failed_is_freed_before_the_next_try(sdxl: SdxlModel) -> None:
    settings = GenerateSettings(num_inference_steps=1, guidance_scale=2.0, batch_size=2)
    embeds, empty = encode_prompts(sdxl, PROMPTS[:2]), encode_prompts(sdxl, [""])
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail_once(module: Any, args: Any) -> None:
        if not held:
            held.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        alive.append(held[0]() is not None)

    hook = sdxl.unet.register_forward_pre_hook(fail_once)
    try:
        with Denoiser(sdxl, settings) as denoiser:
            denoiser.draw(embeds, empty, range(2))
    finally:
        hook.remove()
    assert alive == [False, False]


def test_one_replay_for_each_shape_and_none_after_it(sdxl: SdxlModel) -> None:
    settings = GenerateSettings(num_inference_steps=4, guidance_scale=2.0, guidance_interval=[0.0, 0.5], batch_size=2)
    embeds, empty = encode_prompts(sdxl, PROMPTS), encode_prompts(sdxl, [""])
    with Denoiser(sdxl, settings) as denoiser:
        denoiser.draw(embeds, empty, range(3))
        denoiser.draw(embeds, empty, range(3))
        assert sorted(denoiser._replays) == [(1, False), (1, True), (2, False), (2, True)]
        assert not any(replay.record for replay in denoiser._replays.values())  # a CPU has no graphs
    assert denoiser._replays == {}
    assert denoiser.unet is None


def test_guidance_without_a_negative_is_a_mistake(sdxl: SdxlModel) -> None:
    settings = GenerateSettings(num_inference_steps=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="negative"):
        sample_latents(sdxl, encode_prompts(sdxl, PROMPTS[:1]), None, rng.normal((1, 4, 16, 16), 0), settings=settings)


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
