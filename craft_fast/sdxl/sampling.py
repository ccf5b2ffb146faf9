"""Denoising: noise to final latents, equal to ``StableDiffusionXLPipeline`` with the same scheduler and latents.

Shapes: B images, latents [B, 4, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_fast.config import GenerateSettings
from craft_fast.errors import CraftError, ResourceError
from craft_fast.rng import normal
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.text import PromptEmbeds, add_time_ids, encode_prompts
from craft_fast.sdxl.vae import decode_latents


def make_scheduler(model: SdxlModel, name: str) -> Any:
    """A fresh sampler with the model's own noise schedule and prediction type.

    Args:
        model: the SDXL.
        name: ``dpmpp_2m``, ``euler`` or ``ddim``.
    """
    import diffusers

    common = {"prediction_type": model.prediction_type}
    config = model.scheduler.config
    if name == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler.from_config(config, **common)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(config, **common)
    if name == "ddim":
        # DDIM's defaults are for pixels; latents exceed [-1, 1] and must not be clipped.
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, **common)
    raise ValueError(f"scheduler is {name!r}; allowed: dpmpp_2m, euler, ddim")


@torch.inference_mode()
def sample_latents(
    model: SdxlModel,
    embeds: PromptEmbeds,
    negative: PromptEmbeds | None,
    noise: torch.Tensor,
    *,
    settings: GenerateSettings,
    unet: Any = None,
) -> torch.Tensor:
    """Denoise with classifier-free guidance, both halves in one forward; guidance 1 costs one half.

    Latents stay in float32 between steps whatever the UNet's dtype is.

    Args:
        model: the SDXL.
        embeds: of B prompts.
        negative: of 1 or B prompts to steer away from; None with guidance 1 only.
        noise: float32 [B, 4, h, w], standard normal.
        settings: scheduler, steps, guidance, image size.
        unet: used instead of ``model.unet``.

    Returns:
        float32 [B, 4, h, w] on the model's device, UNet space.

    Raises:
        CraftError: the result holds NaN or infinity.
    """
    unet = model.unet if unet is None else unet
    batch = noise.shape[0]
    guided = settings.guidance_scale > 1.0
    prompt_embeds, pooled = _conditioning(embeds, negative if guided else None, batch)
    time_ids = add_time_ids(
        settings.height_px, settings.width_px, prompt_embeds.shape[0], device=model.device, dtype=prompt_embeds.dtype
    )
    scheduler = make_scheduler(model, settings.scheduler)
    scheduler.set_timesteps(settings.num_inference_steps, device=model.device)
    latents: torch.Tensor = noise.to(model.device, torch.float32) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        noise_pred = unet(
            inputs.to(prompt_embeds.dtype),
            timestep,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0].float()
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + settings.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
    if not bool(torch.isfinite(latents).all()):
        raise CraftError(
            "Sampling returned NaN or infinity",
            where=str(model.path / "unet"),
            why=f"the UNet ran in {model.dtype}, guidance {settings.guidance_scale}",
            hint="--set model.dtype=bfloat16 or float32; after training, a lower train.learning_rate",
        )
    return latents


@dataclass(frozen=True)
class Drawn:
    """Finished pictures, on the CPU.

    Attributes:
        latents: float32 [B, 4, h, w], UNet space.
        images: uint8 [B, 3, H, W].
        truncated: per prompt, whether its end was cut off.
    """

    latents: torch.Tensor
    images: torch.Tensor
    truncated: list[bool]


def draw(
    model: SdxlModel,
    prompts: Sequence[str],
    noise_seeds: Sequence[int],
    *,
    settings: GenerateSettings,
    unet: Any = None,
) -> Drawn:
    """Prompts to pictures, at most ``settings.batch_size`` at a time; the initial noise is a function of its seed.

    Args:
        model: the SDXL.
        prompts: B texts.
        noise_seeds: B seeds.
        settings: how to denoise.
        unet: used instead of ``model.unet``.

    Raises:
        ResourceError: the batch does not fit the device.
        CraftError: NaN or infinity came out.
    """
    shape = model.latent_shape(settings.height_px, settings.width_px)
    latents, images = [], []
    try:
        embeds = encode_prompts(model, prompts)
        negative = encode_prompts(model, [settings.negative_prompt])
        for start in range(0, len(prompts), settings.batch_size):
            rows = range(start, min(start + settings.batch_size, len(prompts)))
            noise = torch.stack([normal(shape, noise_seeds[row]) for row in rows])
            part = sample_latents(model, embeds.select(rows), negative, noise, settings=settings, unet=unet)
            images.append(decode_latents(model, part))
            latents.append(part.cpu())
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "Not enough GPU memory to make pictures",
            where=f"generate.batch_size={settings.batch_size}",
            why=str(error).splitlines()[0],
            hint=f"--set generate.batch_size={max(1, settings.batch_size // 2)}",
        ) from error
    return Drawn(torch.cat(latents), torch.cat(images), embeds.truncated)


def _conditioning(embeds: PromptEmbeds, negative: PromptEmbeds | None, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    if len(embeds) != batch:
        raise ValueError(f"{len(embeds)} prompts for {batch} latents")
    if negative is None:
        return embeds.prompt_embeds, embeds.pooled_prompt_embeds
    negative_embeds = negative.prompt_embeds.expand(batch, -1, -1)
    negative_pooled = negative.pooled_prompt_embeds.expand(batch, -1)
    return (
        torch.cat([negative_embeds, embeds.prompt_embeds]),
        torch.cat([negative_pooled, embeds.pooled_prompt_embeds]),
    )
