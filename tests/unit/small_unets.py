"""Small UNets of SDXL's class for the tests of what trains them, and a loss that reaches every weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import craft_fast.tiny
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.tiny import random_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SHIPPED = Path(craft_fast.tiny.__file__).parent / "assets/sdxl/unet"


def small_unet() -> Any:
    """That of ``random_model``: 32 and 64 channels, latents 16 x 16."""
    torch.manual_seed(0)
    return random_model._unet().requires_grad_(False)


def shipped_unet() -> Any:
    """The trained one in the package: 48, 64 and 96 channels."""
    return UNet2DConditionModel.from_pretrained(SHIPPED).requires_grad_(False)


def inputs(
    unet: Any, *, batch: int = 2, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What the UNet is called with, always the same: latents [B, 4, 16, 16], 7 tokens, timesteps from 5 to 900."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions = {"text_embeds": normal(batch, pooled), "time_ids": torch.full((batch, 6), 64.0, device=device)}
    return {
        "sample": normal(batch, 4, 16, 16),
        "encoder_hidden_states": normal(batch, 7, config.cross_attention_dim),
        "timestep": torch.linspace(5, 900, batch, device=device).long(),
        "added_cond_kwargs": conditions,
    }


def forward(unet: Any, **options: Any) -> Tensor:
    """The noise prediction [B, 4, 16, 16] for ``inputs``."""
    output: Tensor = unet(**inputs(unet, **options)).sample
    return output


def prepared(make: Callable[[], Any], *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A UNet made trainable, and its parameters; ``B`` of an adapter is not zero, so that all gradients are not."""
    given = {"method": "qlora", "rank": 4, "lora_alpha": 6.0, "target_modules": TARGETS, "seed": 3}
    unet = make().to(dtype)
    parameters = prepare_unet(unet, dtype=dtype, **{**given, **options})
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in parameters.items():
            if ".lora_B." in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return unet, parameters


def loss_and_gradients(unet: Any, parameters: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [] and gradient by name; gradients are taken off the parameters."""
    loss = forward(unet, **options).float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return loss.detach(), gradients


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
