"""The weighted noise-prediction loss as an op: checks, choice of form, registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from craft_kernels.checks import KERNEL_DTYPES, check_least, check_tensor
from craft_kernels.custom import differentiable, plain
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.weighted_noise_loss import naive


def weighted_noise_loss(
    noise_pred: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    timesteps: Tensor | None = None,
    timestep_weight: Tensor | None = None,
    divisor: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantage-weighted mean squared error, design.md section 1 item 6.

    ``loss = 1/divisor * sum_b weight_b * lambda(t_b) * mean_chw (noise_pred_b - target_b)^2``, in float32 (float64
    for float64 inputs).

    Args:
        noise_pred: [B, C, H, W], floating point; the model's prediction. The loss is differentiable in it alone.
        target: [B, C, H, W]; the noise, or v.
        weight: [B], any sign; w_b / mean(w).
        timesteps: [B] int64 in [0, T); needed with ``timestep_weight``.
        timestep_weight: [T], lambda by timestep (min-SNR, arXiv 2303.09556); None means 1.
        divisor: what the weighted sum is divided by, >= 1; None means B. With gradient accumulation, the size of the
            global batch: the losses of its parts then add up to the loss of the whole.
        impl: ``auto`` (Triton on a GPU), ``triton``, ``compile`` or ``torch``.

    Returns:
        The loss, a scalar, and the detached per-sample mean squared errors [B], unweighted; a sample that is not
        finite spoils the scalar but not its neighbours' errors. With Triton a sample's error does not depend on the
        batch around it, to the bit, and nothing waits for the device.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(noise_pred, target, weight, timesteps, timestep_weight, divisor)
    form = choose(impl, noise_pred)
    if form == "triton" and noise_pred.numel() and noise_pred.dtype in KERNEL_DTYPES:
        count = divisor if divisor is not None else len(weight)
        keep = torch.is_grad_enabled() and noise_pred.requires_grad
        loss, per_sample, _, _ = _fused(
            noise_pred, target.detach(), weight.detach(), timesteps, timestep_weight, count, keep
        )
        return loss, per_sample.detach()
    run = compiled(naive.weighted_noise_loss) if form == "compile" else naive.weighted_noise_loss
    return run(noise_pred, target, weight, timesteps, timestep_weight, divisor)


def _forward(
    noise_pred: Tensor, target: Tensor, weight: Tensor, timesteps: Tensor | None, timestep_weight: Tensor | None,
    divisor: int, keep_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from craft_kernels.weighted_noise_loss import kernel

    return kernel.forward(noise_pred, target, weight, timesteps, timestep_weight, divisor, keep_error)


def _forward_fake(
    noise_pred: Tensor, target: Tensor, weight: Tensor, timesteps: Tensor | None, timestep_weight: Tensor | None,
    divisor: int, keep_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = torch.float64 if noise_pred.dtype == torch.float64 else torch.float32
    loss = noise_pred.new_empty((), dtype=acc)
    per_sample, scale = (noise_pred.new_empty(noise_pred.shape[0], dtype=acc) for _ in range(2))
    return loss, per_sample, _dense_like(noise_pred) if keep_error else noise_pred.new_empty(0), scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, per_sample, error, scale = output
    ctx.save_for_backward(error, scale)
    ctx.mark_non_differentiable(per_sample, error, scale)


def _gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    error, scale = ctx.saved_tensors
    return _scaled(error, scale, grad_loss), None, None, None, None, None, None


def _backward(error: Tensor, scale: Tensor, grad_loss: Tensor) -> Tensor:
    from craft_kernels.weighted_noise_loss import kernel

    return kernel.backward(error, scale, grad_loss)


def _dense_like(tensor: Tensor) -> Tensor:
    nhwc = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(tensor, memory_format=torch.channels_last if nhwc else torch.contiguous_format)


_fused = differentiable("weighted_noise_loss", _forward, fake=_forward_fake, setup_context=_keep, backward=_gradients)
_scaled = plain("weighted_noise_loss_backward", _backward, fake=lambda error, scale, grad_loss: torch.empty_like(error))


def _check(
    noise_pred: Tensor,
    target: Tensor,
    weight: Tensor,
    timesteps: Tensor | None,
    timestep_weight: Tensor | None,
    divisor: int | None,
) -> None:
    check_tensor("noise_pred", noise_pred, ("B", "C", "H", "W"))
    like, batch = ("noise_pred", noise_pred), noise_pred.shape[0]
    check_tensor("target", target, noise_pred.shape, like=like)
    check_tensor("weight", weight, (batch,), like=like)
    if (timesteps is None) != (timestep_weight is None):
        raise ValueError("timesteps and timestep_weight go together: one is None, the other is not")
    if timesteps is not None and timestep_weight is not None:
        check_tensor("timesteps", timesteps, (batch,), torch.int64, like=like)
        check_tensor("timestep_weight", timestep_weight, ("T",), like=like)
    if divisor is not None:
        check_least("divisor", divisor, 1)
