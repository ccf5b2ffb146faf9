"""A training loop that does what diffusers' SDXL LoRA example does in each step, to be measured beside ours.

What it does, as far as a step's cost depends on it: a frozen UNet in half precision, PEFT's LoRA in float32 on the
attention projections, autocast around the forward, diffusers' own checkpointing, noise from ``torch.randn``, a
scheduler's ``add_noise``, the mean squared error in float32, ``clip_grad_norm_``, AdamW in 8 bits from bitsandbytes,
and the loss read after each step. Latents and text embeddings come from a cache on the device, which the example has
not: only the step differs from ours. Written from knowledge of what the example does (huggingface/diffusers,
examples/text_to_image/train_text_to_image_lora_sdxl.py); no code is taken from it.

Shapes: B samples, latents [B, 4, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craft_fast.qlora.lora import add_lora, lora_parameters
from craft_fast.quiet import import_bitsandbytes
from craft_fast.sdxl import published


class DiffusersLora:
    """The loop's state, and one step of it.

    Args:
        unet: a pristine diffusers UNet on the device; changed in place.
        dtype: of the frozen weights, and of autocast; float32 is without autocast.
        rank: of the LoRA; its scale is 1.
        target_modules: name endings of the adapted layers.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: of the clip.
        seed: the LoRA's initialisation is that of ``craft_fast.qlora.lora.add_lora``, so that losses can be compared.
        gradient_checkpointing: the example's switch.
    """

    def __init__(
        self,
        unet: Any,
        *,
        dtype: torch.dtype,
        rank: int,
        target_modules: Sequence[str],
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        seed: int,
        gradient_checkpointing: bool = True,
    ) -> None:
        bnb = import_bitsandbytes()
        from diffusers import DDPMScheduler

        add_lora(unet, rank=rank, lora_alpha=rank, target_modules=target_modules, seed=seed)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        self.unet, self.dtype, self.max_grad_norm = unet, dtype, max_grad_norm
        self.parameters = lora_parameters(unet)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer: Any = bnb.optim.AdamW8bit(
            list(self.parameters.values()), lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, eps=1e-8
        )
        config = published.SCHEDULER
        self.scheduler: Any = DDPMScheduler(
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            num_train_timesteps=config["num_train_timesteps"],
        )

    def step(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        timesteps: Tensor,
        time_ids: Tensor,
        noise: Tensor | None = None,
    ) -> float:
        """One optimizer step.

        Args:
            latents: [B, 4, h, w].
            prompt_embeds: [B, T, D].
            pooled_prompt_embeds: [B, P].
            timesteps: int64 [B].
            time_ids: [1, 6].
            noise: like ``latents``, where another loop must see the same; None draws it.

        Returns:
            The loss; waits for the device, as the example does to log it.
        """
        latents = latents.to(self.dtype)
        noise = torch.randn_like(latents) if noise is None else noise.to(self.dtype)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.repeat(len(latents), 1)}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            noise_pred = self.unet(
                noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False
            )[0]  # fmt: skip
        loss = F.mse_loss(noise_pred.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
