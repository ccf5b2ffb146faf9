"""Noise and target as an op: checks, choice of form, registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from craft_kernels.checks import KERNEL_DTYPES, check_choice, check_tensor
from craft_kernels.custom import differentiable
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.noise_and_target import naive
from craft_kernels.noise_and_target.naive import PredictionType


def noise_and_target(
    latents: Tensor,
    sample_ids: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    prediction_type: PredictionType = "epsilon",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The forward process (arXiv 2006.11239 eq. 4) and what the model shall predict, noise being a function.

    ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``; the target is ``noise``, or for v-prediction (arXiv 2202.00512)
    ``v = sqrt(a_t) noise - sqrt(1 - a_t) x_0``. ``a_t`` is ``alphas_cumprod[t]``, in float32. ``noise`` is
    :func:`~craft_kernels.noise_and_target.counter_noise` of seed, sample id and step (design.md section 4); it is
    never stored. ``torch`` and ``triton`` agree to the bit, on every device; ``compile`` may round its products and
    sums together.

    Args:
        latents: x_0 [B, C, H, W], floating point.
        sample_ids: int64 [B], any values: which noise a sample gets does not depend on the batch around it.
        alphas_cumprod: [T], in (0, 1]; 0 is allowed (zero terminal SNR).
        timesteps: int64 [B] in [0, T).
        seed: root seed, in [0, 2^63).
        step: optimizer step, in [0, 2^32); an int64 tensor [] on the device lets a captured CUDA graph count on.
        prediction_type: ``epsilon`` or ``v_prediction``.
        impl: ``auto`` (Triton on a GPU), ``triton``, ``compile`` or ``torch``.

    Returns:
        x_t and the target, each [B, C, H, W] in the dtype of ``latents``. Differentiable in ``latents``.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(latents, sample_ids, alphas_cumprod, timesteps, seed, step, prediction_type)
    form = choose(impl, latents)
    if form == "triton" and latents.numel() and latents.dtype in KERNEL_DTYPES:
        number, tensor = (0, step) if isinstance(step, Tensor) else (step, None)
        noised, target = _fused(
            latents, sample_ids, alphas_cumprod, timesteps, seed, number, tensor, prediction_type == "v_prediction"
        )
        return noised, target
    run = compiled(naive.noise_and_target) if form == "compile" else naive.noise_and_target
    return run(latents, sample_ids, alphas_cumprod, timesteps, seed, step, prediction_type)


def _forward(
    latents: Tensor, sample_ids: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, seed: int, step: int,
    step_on_device: Tensor | None, v_prediction: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from craft_kernels.noise_and_target import kernel

    return kernel.forward(latents, sample_ids, alphas_cumprod, timesteps, seed, step, step_on_device, v_prediction)


def _forward_fake(
    latents: Tensor, sample_ids: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, seed: int, step: int,
    step_on_device: Tensor | None, v_prediction: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = torch.contiguous_format
    return torch.empty_like(latents, memory_format=layout), torch.empty_like(latents, memory_format=layout)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, alphas_cumprod, timesteps, *_, v_prediction = inputs
    ctx.save_for_backward(alphas_cumprod, timesteps)
    ctx.v_prediction = v_prediction


def _gradients(ctx: Any, grad_noised: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    """``sqrt(a_t) grad_noised``, for v less ``sqrt(1 - a_t) grad_target``. Off the training path: in plain torch."""
    alphas_cumprod, timesteps = ctx.saved_tensors
    dtype = torch.float64 if grad_noised.dtype == torch.float64 else torch.float32
    signal, sigma = naive.roots(alphas_cumprod, timesteps, dtype)
    grad = signal * grad_noised.to(dtype)
    if ctx.v_prediction:
        grad = grad - sigma * grad_target.to(dtype)
    return grad.to(grad_noised.dtype), None, None, None, None, None, None, None


_fused = differentiable("noise_and_target", _forward, fake=_forward_fake, setup_context=_keep, backward=_gradients)


def _check(
    latents: Tensor, sample_ids: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, seed: int, step: int | Tensor,
    prediction_type: str,
) -> None:  # fmt: skip
    check_tensor("latents", latents, ("B", "C", "H", "W"))
    like, batch = ("latents", latents), latents.shape[0]
    check_tensor("sample_ids", sample_ids, (batch,), torch.int64, like=like)
    check_tensor("alphas_cumprod", alphas_cumprod, ("T",), like=like)
    check_tensor("timesteps", timesteps, (batch,), torch.int64, like=like)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    if isinstance(step, Tensor):
        check_tensor("step", step, (), torch.int64, like=like)
    elif not 0 <= step < 2**32:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction"))
