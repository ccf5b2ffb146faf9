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
    *,
    timesteps: Tensor | None = None,
    timestep_weight: Tensor | None = None,
    divisor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage-weighted mean squared error, design.md section 1 item 6.

    ``loss = 1/divisor * sum_b weight_b * lambda(t_b) * mean_chw (noise_pred_b - target_b)^2``, in float32 (float64
    for float64 inputs).

    Args:
        noise_pred: [B, C, H, W], floating point; the model's prediction. The loss is differentiable in it alone.
        target: [B, C, H, W]; the noise, or v.
        weight: [B], any sign; w_b / mean(w).
        timesteps: [B] int64 in [0, T); needed with ``timestep_weight``.
        timestep_weight: [T], lambda by timestep (min-SNR); None means 1.
        divisor: what the weighted sum is divided by, >= 1; None means B. With gradient accumulation, the size of the
            global batch: the losses of its parts then add up to the loss of the whole.

    Returns:
        The loss, a scalar, and the detached per-sample mean squared errors [B], unweighted; a sample that is not
        finite spoils the scalar but not its neighbours' errors.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; the message names it.
    """
    _check(noise_pred, target, weight, timesteps, timestep_weight, divisor)
    dtype = torch.float64 if noise_pred.dtype == torch.float64 else torch.float32
    error = noise_pred.to(dtype) - target.to(dtype)
    per_sample = error.square().flatten(1).mean(dim=1)
    scale = weight.to(dtype)
    if timesteps is not None and timestep_weight is not None:
        scale = scale * timestep_weight.to(dtype)[timesteps]
    count = divisor if divisor is not None else max(len(weight), 1)
    return (scale.detach() * per_sample).sum() / count, per_sample.detach()


def _check(
    noise_pred: Tensor,
    target: Tensor,
    weight: Tensor,
    timesteps: Tensor | None,
    timestep_weight: Tensor | None,
    divisor: int | None,
) -> None:
    if noise_pred.ndim != 4 or not noise_pred.is_floating_point():
        raise ValueError(
            f"noise_pred must be floating point [B, C, H, W], got {noise_pred.dtype} {tuple(noise_pred.shape)}"
        )
    batch = noise_pred.shape[0]
    if target.shape != noise_pred.shape or not target.is_floating_point():
        raise ValueError(
            f"target must be floating point {tuple(noise_pred.shape)}, got {target.dtype} {tuple(target.shape)}"
        )
    if weight.shape != (batch,) or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point [{batch}], got {weight.dtype} {tuple(weight.shape)}")
    if (timesteps is None) != (timestep_weight is None):
        raise ValueError("timesteps and timestep_weight go together: one is None, the other is not")
    if timesteps is not None and (timesteps.shape != (batch,) or timesteps.dtype != torch.int64):
        raise ValueError(f"timesteps must be int64 [{batch}], got {timesteps.dtype} {tuple(timesteps.shape)}")
    if timestep_weight is not None and (timestep_weight.ndim != 1 or not timestep_weight.is_floating_point()):
        raise ValueError(
            f"timestep_weight must be floating point [T], got {timestep_weight.dtype} {tuple(timestep_weight.shape)}"
        )
    if divisor is not None and divisor < 1:
        raise ValueError(f"divisor must be at least 1, got {divisor}")
    named = {"target": target, "weight": weight, "timesteps": timesteps, "timestep_weight": timestep_weight}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != noise_pred.device:
            raise ValueError(f"{name} must be on {noise_pred.device} like noise_pred, got {tensor.device}")
