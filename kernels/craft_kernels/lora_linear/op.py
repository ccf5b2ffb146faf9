"""A frozen linear layer with a low-rank update as one op: checks, choice of form, registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_kernels.checks import check_least, check_tensor
from craft_kernels.custom import differentiable, plain
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.lora_linear import naive
from craft_kernels.nf4_dequantize import NF4Weight, nf4_dequantize

# The frozen layer on its way through an op: weight or packed weight, absmax, nested_absmax, nested_code, offset.
Base = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """A frozen linear layer plus a trainable low-rank one, arXiv 2106.09685 section 4.1, QLoRA's equation 5.

    ``y = x W^T + b + scaling (x A^T) B^T`` with W dense or in NF4 (arXiv 2305.14314). Kept for backward: x, x A^T and
    references to the weights; an NF4 weight is dequantised again there, and never kept.

    Args:
        x: [..., in], floating point.
        weight: [out, in] in the dtype of ``x`` (any floating point under autocast), or an ``NF4Weight`` of that shape;
            frozen.
        lora_a: [r, in], floating point; converted to the dtype of the computation, its gradient back to its own.
        lora_b: [out, r], likewise.
        scaling: lora_alpha / r.
        bias: [out], like ``weight``; frozen.
        impl: ``auto`` (``torch`` everywhere), ``triton`` (both low-rank products in one launch; a rank above 128, in
            float32 above 64, and float64 go the way of ``torch``), ``compile`` (of the plain formula, which keeps a
            dequantised weight for backward) or ``torch`` (matrix products, the update added in place).

    Returns:
        [..., out] in the dtype of ``x``; under autocast in that of autocast, as ``torch.nn.functional.linear`` gives.
        Differentiable once, in x, lora_a and lora_b.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit, or a frozen one asks for a gradient.
    """
    dtype, autocast = _compute_dtype(x)
    _check(x, weight, lora_a, lora_b, bias, autocast)
    form = choose(impl, x, auto="torch")
    x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    if form == "compile":
        return compiled(naive.lora_linear)(x, weight, lora_a, lora_b, scaling, bias)
    base: Base = (weight, None, None, None, None) if isinstance(weight, Tensor) else _tensors(weight)
    out, _ = _layer(x, lora_a, lora_b, bias, *base, float(scaling), form == "triton")
    return out  # type: ignore[no-any-return]


def _forward(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, weight: Tensor, absmax: Tensor | None,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None, scaling: float, fused: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])
    base = _dense((weight, absmax, nested_absmax, nested_code, offset), lora_a, lora_b)
    out = F.linear(rows, base, None if bias is None else bias.to(x.dtype))
    if fused and _fits(rows, lora_a):
        from craft_kernels.lora_linear import kernel

        thin = kernel.low_rank_update_(out, rows.contiguous(), lora_a, lora_b.t(), up_scale=scaling)
    else:
        thin = rows @ lora_a.t()
        out.addmm_(thin, lora_b.t(), alpha=scaling)
    return out.view(*x.shape[:-1], lora_b.shape[0]), thin


def _forward_fake(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, weight: Tensor, absmax: Tensor | None,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None, scaling: float, fused: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], lora_b.shape[0]), x.new_empty(count, lora_a.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_a, lora_b, _, weight, *scales, scaling, fused = inputs
    _, thin = output
    ctx.mark_non_differentiable(thin)
    ctx.set_materialize_grads(False)  # else a tensor of zeros is filled for `thin` in every backward
    need_x, need_a, need_b, *_ = ctx.needs_input_grad
    ctx.scaling, ctx.fused = scaling, fused
    ctx.save_for_backward(
        x if need_a else None, thin if need_b else None, lora_a, lora_b, *((weight, *scales) if need_x else [None] * 5)
    )


def _gradients(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 11
    needs = ctx.needs_input_grad[:3]
    grads = _grads(grad_out, *ctx.saved_tensors, ctx.scaling, ctx.fused)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 8)


def _backward(
    grad_out: Tensor, x: Tensor | None, thin: Tensor | None, lora_a: Tensor, lora_b: Tensor, weight: Tensor | None,
    absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    scaling: float, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x (where ``weight`` is given), lora_a (``x``) and lora_b (``thin``); empty where not."""
    rows = grad_out.reshape(-1, lora_b.shape[0])
    grad_x, grad_a, grad_b = (rows.new_empty(0) for _ in range(3))
    grad_thin = None
    if weight is not None:
        grad_x = _product(rows, _dense((weight, absmax, nested_absmax, nested_code, offset), lora_a, lora_b))
        if fused and _fits(rows, lora_a):
            from craft_kernels.lora_linear import kernel

            grad_thin = kernel.low_rank_update_(grad_x, rows.contiguous(), lora_b.t(), lora_a, down_scale=scaling)
        else:
            grad_thin = _product(rows, lora_b, scaling)
            grad_x.addmm_(grad_thin, lora_a)
        grad_x = grad_x.view(*grad_out.shape[:-1], lora_a.shape[1])
    if x is not None:
        grad_thin = _product(rows, lora_b, scaling) if grad_thin is None else grad_thin
        grad_a = _product(grad_thin.t(), x.reshape(-1, lora_a.shape[1]))
    if thin is not None:
        grad_b = _product(rows.t(), thin, scaling)
    return grad_x, grad_a, grad_b


def _backward_fake(
    grad_out: Tensor, x: Tensor | None, thin: Tensor | None, lora_a: Tensor, lora_b: Tensor, weight: Tensor | None,
    absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    scaling: float, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    empty = grad_out.new_empty
    return (
        empty(0) if weight is None else empty(*grad_out.shape[:-1], lora_a.shape[1]),
        empty(0) if x is None else empty(lora_a.shape),
        empty(0) if thin is None else empty(lora_b.shape),
    )


_layer = differentiable("lora_linear", _forward, fake=_forward_fake, setup_context=_keep, backward=_gradients)
_grads = plain("lora_linear_backward", _backward, fake=_backward_fake)


def _product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * left right`` in one launch. In place, since autocast leaves that alone: backward may run under it."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scale)


def _dense(base: Base, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The frozen weight [out, in] in the dtype of ``lora_a``."""
    weight, absmax, nested_absmax, nested_code, offset = base
    if absmax is None:
        return weight.to(lora_a.dtype)
    return nf4_dequantize(
        weight, absmax, (lora_b.shape[0], lora_a.shape[1]), nested_absmax=nested_absmax, nested_code=nested_code,
        offset=offset, dtype=lora_a.dtype,
    )  # fmt: skip


def _tensors(weight: NF4Weight) -> Base:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset


def _fits(rows: Tensor, lora_a: Tensor) -> bool:
    """Whether the Triton form takes the call; what it does not take goes the way of ``torch``."""
    from craft_kernels.lora_linear import kernel

    return rows.numel() > 0 and lora_a.shape[0] <= kernel.MAX_RANK.get(rows.dtype, 0)


def _compute_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """What ``torch.nn.functional.linear`` computes in, and whether autocast says so; it leaves float64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind), True
    return x.dtype, False


def _check(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, autocast: bool
) -> None:  # fmt: skip
    check_tensor("lora_a", lora_a, ("r", "in"))
    rank, inner = lora_a.shape
    check_least("lora_a.shape[0]", rank, 1)
    check_least("lora_a.shape[1]", inner, 1)
    if x.ndim < 1 or x.shape[-1] != inner or not x.is_floating_point():
        found = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise ValueError(f"x must be floating point [..., {inner}], got {found}")
    check_tensor("lora_a", lora_a, ("r", "in"), like=("x", x))
    check_tensor("lora_b", lora_b, ("out", rank), like=("x", x))
    sizes = (lora_b.shape[0], inner)
    if isinstance(weight, NF4Weight):
        if tuple(weight.shape) != sizes:
            raise ValueError(f"weight must be NF4 [{sizes[0]}, {sizes[1]}], got {tuple(weight.shape)}")
        if weight.packed.device != x.device:
            raise ValueError(f"weight must be on {x.device} like x, got {weight.packed.device}")
    for name, frozen, shape in (("weight", weight, sizes), ("bias", bias, sizes[:1])):
        if isinstance(frozen, Tensor):
            check_tensor(name, frozen, shape, "floating point" if autocast else x.dtype, like=("x", x))
            if frozen.requires_grad:
                raise ValueError(f"{name} must be frozen (requires_grad=False): lora_linear gives it no gradient")
