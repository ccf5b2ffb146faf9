"""Noised latents and the training target in plain PyTorch: the truth that every faster form is held against.

Shapes: B samples, C channels, H x W latent height and width, T training timesteps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def noise_and_target(
    latents: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    *,
    prediction_type: PredictionType = "epsilon",
) -> tuple[Tensor, Tensor]:
    """The forward process (arXiv 2006.11239 eq. 4) and what the model shall predict.

    ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``; the target is ``noise``, or for v-prediction (arXiv 2202.00512)
    ``v = sqrt(a_t) noise - sqrt(1 - a_t) x_0``. ``a_t`` is ``alphas_cumprod[t]``; roots are taken in its dtype.

    Args:
        latents: x_0 [B, C, H, W], floating point.
        noise: standard normal, shape and dtype of ``latents``.
        alphas_cumprod: [T], in (0, 1]; 0 is allowed (zero terminal SNR).
        timesteps: [B] int64 in [0, T).
        prediction_type: ``epsilon`` or ``v_prediction``.

    Returns:
        x_t and the target, each [B, C, H, W] in the dtype of ``latents``.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(latents, noise, alphas_cumprod, timesteps, prediction_type)
    a_t = alphas_cumprod[timesteps]
    signal = a_t.sqrt().to(latents.dtype).view(-1, 1, 1, 1)
    sigma = (1 - a_t).sqrt().to(latents.dtype).view(-1, 1, 1, 1)
    noised = signal * latents + sigma * noise
    target = noise if prediction_type == "epsilon" else signal * noise - sigma * latents
    return noised, target


def _check(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> None:
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(f"latents must be floating point [B, C, H, W], got {latents.dtype} {tuple(latents.shape)}")
    if noise.shape != latents.shape or noise.dtype != latents.dtype:
        raise ValueError(
            f"noise must be {latents.dtype} {tuple(latents.shape)} like latents, got {noise.dtype} {tuple(noise.shape)}"
        )
    if alphas_cumprod.ndim != 1 or not alphas_cumprod.is_floating_point():
        raise ValueError(
            f"alphas_cumprod must be floating point [T], got {alphas_cumprod.dtype} {tuple(alphas_cumprod.shape)}"
        )
    if timesteps.shape != (latents.shape[0],) or timesteps.dtype != torch.int64:
        raise ValueError(
            f"timesteps must be int64 [{latents.shape[0]}], got {timesteps.dtype} {tuple(timesteps.shape)}"
        )
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}")
    for name, tensor in {"noise": noise, "alphas_cumprod": alphas_cumprod, "timesteps": timesteps}.items():
        if tensor.device != latents.device:
            raise ValueError(f"{name} must be on {latents.device} like latents, got {tensor.device}")
