"""Group norm and SiLU as an op: checks, choice of form, registration."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from craft_kernels.checks import KERNEL_DTYPES, check_choice, check_least, check_tensor
from craft_kernels.custom import differentiable, plain
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.group_norm_silu import naive
from craft_kernels.group_norm_silu.naive import Activation, memory_layout


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    activation: Activation = "silu",
    impl: Impl = "auto",
) -> Tensor:
    """Group norm, arXiv 1803.08494 eq. 1 to 3, and SiLU, arXiv 1702.03118 eq. 1, over an image's channels.

    ``z = (x - mean) / sqrt(variance + eps) * weight + bias`` with the mean and the biased variance of the C / G
    channels of a group over all pixels of a sample; ``y = z * sigmoid(z)``, or ``z`` itself.

    Args:
        x: [B, C, H, W], floating point; channels_last or contiguous is read as it lies, another layout is copied first.
        weight: [C], floating point, of any such dtype: a norm kept in float32 need not be cast for a bfloat16 ``x``.
        bias: [C], likewise.
        num_groups: G >= 1, a divisor of C; 32 in SDXL.
        eps: >= 0; 1e-5 in SDXL's resnets, 1e-6 in its transformers.
        activation: ``silu``, or ``none`` for the norm alone.
        impl: ``auto`` (plain PyTorch), ``triton``, ``compile`` or ``torch``.

    Returns:
        [B, C, H, W] in the dtype of ``x``; channels_last if ``x`` is, else contiguous. With Triton the arithmetic is
        in float32 (float64 for float64) and rounded once, no sample depends on the batch around it, to the bit, and
        backward keeps ``x``, ``weight``, ``bias`` and two numbers a group. Gradients that nobody wants are not worked
        out: those of ``weight`` and ``bias`` where the norm is frozen, as under a LoRA.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(x, weight, bias, num_groups, eps, activation)
    # Until a GPU has shown at which shapes the kernel wins (README.md), it runs only where it is asked for.
    form = choose(impl, x, auto="torch")
    if form == "triton" and x.numel() and all(tensor.dtype in KERNEL_DTYPES for tensor in (x, weight, bias)):
        y: Tensor = _fused(x, weight, bias, num_groups, eps, activation == "silu")[0]
        return y
    run = compiled(naive.group_norm_silu) if form == "compile" else naive.group_norm_silu
    return run(x, weight, bias, num_groups, eps, activation)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from craft_kernels.group_norm_silu import kernel

    return kernel.forward(x, weight, bias, num_groups, eps, silu)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=acc) for _ in range(2))
    return _dense_like(x), mean, rstd


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grads = _differentiated(grad_y, x, weight, bias, mean, rstd, ctx.silu, need_x, need_weight or need_bias)
    wanted = zip(grads, (need_x, need_weight, need_bias), strict=True)
    return *(grad if needed else None for grad, needed in wanted), None, None, None


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    silu: bool, need_x: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from craft_kernels.group_norm_silu import kernel

    return kernel.backward(grad_y, x, weight, bias, mean, rstd, silu, need_x, need_affine)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    silu: bool, need_x: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = _dense_like(x) if need_x else x.new_empty(0)
    size = x.shape[1] if need_affine else 0
    return grad_x, weight.new_empty(size), bias.new_empty(size)


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=memory_layout(tensor))


_fused = differentiable("group_norm_silu", _forward, fake=_forward_fake, setup_context=_keep, backward=_gradients)
_differentiated = plain("group_norm_silu_backward", _backward, fake=_backward_fake)


def _check(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str) -> None:
    check_tensor("x", x, ("B", "C", "H", "W"))
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, (x.shape[1],), like=("x", x))
    check_least("num_groups", num_groups, 1)
    if x.shape[1] % num_groups:
        raise ValueError(f"num_groups must be a divisor of the {x.shape[1]} channels of x, got {num_groups}")
    check_least("eps", eps, 0.0)
    check_choice("activation", activation, get_args(Activation))
