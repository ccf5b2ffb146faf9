"""Denoising: noise to final latents, equal to ``StableDiffusionXLPipeline`` with the same scheduler and latents.

Shapes: B images, latents [B, 4, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from craft_fast.config import GenerateSettings
from craft_fast.errors import ConfigError, CraftError, ResourceError
from craft_fast.rng import normal
from craft_fast.sdxl.attention import set_attention
from craft_fast.sdxl.graph import Replay, compile_blocks
from craft_fast.sdxl.load import SdxlModel, free_memory
from craft_fast.sdxl.text import PromptEmbeds, add_time_ids
from craft_fast.sdxl.vae import Concessions


def make_scheduler(model: SdxlModel, name: str) -> Any:
    """A fresh sampler with the model's own noise schedule and prediction type.

    Args:
        model: the SDXL.
        name: ``dpmpp_2m``, ``euler`` or ``ddim``.

    Raises:
        ConfigError: DDIM divides by the signal, which a noise model with zero terminal SNR starts without.
    """
    import diffusers

    common = {"prediction_type": model.prediction_type}
    config = model.scheduler.config
    if name == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler.from_config(config, **common)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(config, **common)
    if name == "ddim":
        if config.get("rescale_betas_zero_snr") and model.prediction_type == "epsilon":
            raise ConfigError(
                "DDIM cannot start from pure noise with a model that predicts the noise",
                where="generate.scheduler",
                why="the model's schedule has zero terminal SNR and its prediction_type is epsilon",
                hint="--set generate.scheduler=euler; such models mostly have model.prediction_type=v_prediction",
            )
        # DDIM's defaults are for pixels; latents exceed [-1, 1] and must not be clipped.
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, **common)
    raise ValueError(f"scheduler is {name!r}; allowed: dpmpp_2m, euler, ddim")


def guided_steps(settings: GenerateSettings, steps: int) -> list[bool]:
    """Whether guidance acts, for each of ``steps``: ``low <= i / steps < high`` (arXiv 2404.07724, by step index).

    Args:
        settings: guidance scale, of which 1 is none, and the interval.
        steps: the scheduler's number of steps.

    Raises:
        ConfigError: not two shares, the first the smaller.
    """
    low, high = settings.guidance_interval
    if not 0.0 <= low <= high <= 1.0:
        raise ConfigError(
            "The guidance interval is not one",
            where="generate.guidance_interval",
            why=f"found [{low}, {high}]; allowed: two shares from 0 to 1, the first not above the second",
        )
    return [settings.guidance_scale > 1.0 and low <= i / steps < high for i in range(steps)]


class Denoiser:
    """One UNet as a sampler uses it: batch after batch, by its graphs, in the largest batches that fit.

    The UNet's forward and the arithmetic of guidance are one ``Replay`` for each number of images, guided or not;
    the scheduler's step is outside and waits for nothing on the device. To be closed: graphs hold memory.

    Args:
        model: the SDXL.
        settings: scheduler, steps, guidance, image size, batch.
        unet: used instead of ``model.unet``.
        concessions: of this run; changed when memory runs out.
        warn: told of that.
        record: graphs as ``engine.graph`` says, or none.
    """

    def __init__(
        self,
        model: SdxlModel,
        settings: GenerateSettings,
        *,
        unet: Any = None,
        concessions: Concessions | None = None,
        warn: Callable[[str], None] = lambda message: None,
        record: bool = True,
    ) -> None:
        self.model, self.settings, self.warn = model, settings, warn
        self.unet = model.unet if unet is None else unet
        self.concessions = concessions or Concessions()
        self.record = record and model.engine.graph and model.device.type == "cuda" and not self.concessions.no_graphs
        self._replays: dict[tuple[int, bool], Replay[torch.Tensor]] = {}
        # One memory for all graphs: what one of them gives is used up before another one runs.
        self._pool: Any = torch.cuda.graph_pool_handle() if self.record else None
        self._steps = 0  # of the batch that is under way
        if record:
            if model.engine.attention != "auto":
                set_attention(self.unet, model.engine.attention)
            if model.engine.compile:
                compile_blocks(self.unet)

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the graphs' memory back and let go of the UNet."""
        self.unet = None
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        for replay in self._replays.values():
            replay.release()
        self._replays.clear()

    # ---- batches

    def draw(self, embeds: PromptEmbeds, negative: PromptEmbeds, noise_seeds: Sequence[int]) -> torch.Tensor:
        """Final latents of all prompts; the initial noise of each is a function of its seed.

        A batch that does not fit is halved, for the rest of the run.

        Args:
            embeds: of B prompts, on any device.
            negative: of one prompt to steer away from.
            noise_seeds: B seeds.

        Returns:
            float32 [B, 4, h, w] on the CPU, UNet space.

        Raises:
            ResourceError: one image does not fit. CraftError: NaN or infinity came out.
        """
        shape = self.model.latent_shape(self.settings.height_px, self.settings.width_px)
        negative = negative.to(self.model.device)
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(embeds):
            rows = range(start, min(start + self._images_at_once(), len(embeds)))
            noise = torch.stack([normal(shape, noise_seeds[row]) for row in rows])
            part = self._try(embeds.select(rows).to(self.model.device), negative, noise)
            if part is not None:
                parts.append(part)
                start += len(rows)
        return torch.cat(parts)

    def _images_at_once(self) -> int:
        return min(self.settings.batch_size, self.concessions.images_at_once or self.settings.batch_size)

    def _try(self, embeds: PromptEmbeds, negative: PromptEmbeds, noise: torch.Tensor) -> torch.Tensor | None:
        """One batch on the CPU, or None after a concession to memory."""
        try:
            return self.denoise(embeds, negative, noise).cpu()
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            if len(noise) == 1 and not self._may_drop_recording():
                raise ResourceError(
                    "Not enough GPU memory to make one picture",
                    where=f"generate, {self.settings.width_px} x {self.settings.height_px} px",
                    why=reason,
                    hint=f"{'--set engine.resident=never' if self.model.resident else 'a smaller image'}; "
                    "craft-fast plan says what fits this GPU",
                ) from error
        # Out of the except block: what it holds keeps the failed batch's tensors alive.
        self._concede(len(noise), reason)
        return None

    def _may_drop_recording(self) -> bool:
        """Whether it is the recording that does not fit: steps of this batch were done without one."""
        return self.record and self._steps > 0

    def _concede(self, images: int, reason: str) -> None:
        """Give up recording, which changes no bit of a picture, before half of the batch."""
        if self._may_drop_recording():
            self.record, self.concessions.no_graphs = False, True
            self.warn(
                f"The recorded denoising step did not fit ({reason}); --set engine.graph=false decides it beforehand"
            )
        else:
            half = self.concessions.images_at_once = images // 2
            self.warn(
                f"{images} images at once did not fit ({reason}); {half} at once from here on. Images of another batch "
                f"differ in their last bits; --set generate.batch_size={half} decides it beforehand"
            )
        self._drop_graphs()
        free_memory()

    # ---- one batch

    @torch.inference_mode()
    def denoise(self, embeds: PromptEmbeds, negative: PromptEmbeds | None, noise: torch.Tensor) -> torch.Tensor:
        """Denoise one batch with classifier-free guidance, both halves in one forward; without it one half is run.

        Latents stay in float32 between steps whatever the UNet's dtype is.

        Args:
            embeds: of B prompts, on the model's device.
            negative: of 1 or B prompts to steer away from; None where guidance acts in no step.
            noise: float32 [B, 4, h, w], standard normal.

        Returns:
            float32 [B, 4, h, w] on the model's device, UNet space.

        Raises:
            CraftError: the result holds NaN or infinity.
        """
        model, device, batch = self.model, self.model.device, len(noise)
        scheduler = make_scheduler(model, self.settings.scheduler)
        # On the CPU, where the scheduler's own tables are: looking up a step waits for nothing on the device.
        scheduler.set_timesteps(self.settings.num_inference_steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        guided = guided_steps(self.settings, len(scheduler.timesteps))
        inputs = {act: self._conditioning(embeds, negative, batch, act) for act in set(guided)}
        timesteps = scheduler.timesteps.to(device)
        latents: torch.Tensor = noise.to(device, torch.float32) * scheduler.init_noise_sigma
        self._steps = 0
        for i, timestep in enumerate(scheduler.timesteps):
            noise_pred = self._replay(batch, guided[i])(
                latents=scheduler.scale_model_input(latents, timestep), timestep=timesteps[i], **inputs[guided[i]]
            )
            latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
            self._steps += 1
        if not bool(torch.isfinite(latents).all()):
            raise CraftError(
                "Sampling returned NaN or infinity",
                where=str(model.path / "unet"),
                why=f"the UNet ran in {model.dtype}, guidance {self.settings.guidance_scale}",
                hint="--set model.dtype=bfloat16 or float32; after training, a lower train.learning_rate",
            )
        return latents

    def _conditioning(
        self, embeds: PromptEmbeds, negative: PromptEmbeds | None, batch: int, guided: bool
    ) -> dict[str, torch.Tensor]:
        """What the UNet is told besides latents and timestep; the negative half first where there is one."""
        if len(embeds) != batch:
            raise ValueError(f"{len(embeds)} prompts for {batch} latents")
        if guided and negative is None:
            raise ValueError("guidance needs a negative prompt's embeddings, be it the empty one")
        prompt_embeds, pooled = embeds.prompt_embeds, embeds.pooled_prompt_embeds
        if guided and negative is not None:
            prompt_embeds = torch.cat([negative.prompt_embeds.expand(batch, -1, -1), prompt_embeds])
            pooled = torch.cat([negative.pooled_prompt_embeds.expand(batch, -1), pooled])
        size = self.settings.height_px, self.settings.width_px
        time_ids = add_time_ids(*size, len(prompt_embeds), device=prompt_embeds.device, dtype=prompt_embeds.dtype)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled, "time_ids": time_ids}

    def _tell_fallback(self, reason: str) -> None:
        self.warn(f"The denoising step cannot be recorded, and runs without ({reason})")

    def _replay(self, batch: int, guided: bool) -> Replay[torch.Tensor]:
        if (batch, guided) not in self._replays:
            forward = _forward(self.unet, self.settings.guidance_scale if guided else None)
            self._replays[batch, guided] = Replay(
                forward, record=self.record, pool=self._pool, on_fallback=self._tell_fallback
            )
        return self._replays[batch, guided]


def _forward(unet: Any, guidance_scale: float | None) -> Callable[..., torch.Tensor]:
    """``noise_pred = unconditional + scale (conditional - unconditional)`` (arXiv 2207.12598), as one function."""

    def predict(
        *,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        inputs = latents if guidance_scale is None else torch.cat([latents] * 2)
        noise_pred: torch.Tensor = unet(
            inputs.to(prompt_embeds.dtype),
            timestep,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0].float()
        if guidance_scale is None:
            return noise_pred
        unconditional, conditional = noise_pred.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict


def sample_latents(
    model: SdxlModel,
    embeds: PromptEmbeds,
    negative: PromptEmbeds | None,
    noise: torch.Tensor,
    *,
    settings: GenerateSettings,
    unet: Any = None,
) -> torch.Tensor:
    """Denoise one batch; see ``Denoiser.denoise``. Whoever has several keeps a ``Denoiser``.

    Args:
        model: the SDXL.
        embeds: of B prompts.
        negative: of 1 or B prompts to steer away from; None with guidance 1 only.
        noise: float32 [B, 4, h, w], standard normal.
        settings: scheduler, steps, guidance, image size.
        unet: used instead of ``model.unet``.
    """
    with Denoiser(model, settings, unet=unet, record=False) as denoiser:
        return denoiser.denoise(embeds, negative, noise)
