"""Weighted noise-prediction loss in plain PyTorch: the truth that every faster form is held against.

Shapes: B samples, C channels, H x W latent height and width, T training timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_noise_loss(
    noise_pred: Tensor,
    target: Tensor,
    weight: Tensor,
    timesteps: Tensor | None = None,
    timestep_weight: Tensor | None = None,
    divisor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the per-sample errors; see ``craft_kernels.weighted_noise_loss.weighted_noise_loss``.

    Arguments are not checked here.
    """
    dtype = torch.float64 if noise_pred.dtype == torch.float64 else torch.float32
    error = noise_pred.to(dtype) - target.detach().to(dtype)
    per_sample = error.square().flatten(1).mean(dim=1)
    scale = weight.to(dtype)
    if timesteps is not None and timestep_weight is not None:
        scale = scale * timestep_weight.to(dtype)[timesteps]
    count = divisor if divisor is not None else max(len(weight), 1)
    return (scale.detach() * per_sample).sum() / count, per_sample.detach()
