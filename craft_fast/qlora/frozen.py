"""Frozen layers as ops: a weight in NF4 or dense, nothing kept for backward but references to it.

The input's gradient of a linear layer or a convolution needs the weight alone, so the input is not kept. PyTorch's own
``conv2d`` keeps it even where its weight is frozen (a test shows it). An NF4 weight (arXiv 2305.14314) is dequantised
in forward and again in backward, and the dense copy lives no longer than the call.

Shapes: B samples, O output channels, I input channels, G groups, k x l taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_kernels.custom import differentiable, plain
from craft_kernels.nf4_dequantize import NF4Weight, nf4_dequantize

# A frozen weight on its way through an op: weight or packed weight, absmax, nested_absmax, nested_code, offset.
Base = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
GROUP = 256  # scales that share a second scale
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """An NF4 weight [*shape] in ``dtype``: by Triton on a GPU, by bitsandbytes' C++ on a CPU; the same bits.

    Measured on one CPU core, 5120 x 1280 to bfloat16: bitsandbytes 1.7 ms, our plain PyTorch form 41 ms.
    """
    return _dequantize(_tensors(weight), weight.shape, dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with a frozen W in NF4.

    Args:
        x: [..., in], floating point.
        weight: [out, in].
        bias: [out], floating point, frozen; converted to the dtype of the computation.

    Returns:
        [..., out] in the dtype of ``x``, under autocast in that of autocast. Differentiable once, in x.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = _linear(x.to(dtype), bias, *_tensors(weight), list(weight.shape))
    return out


def frozen_conv2d(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a frozen weight.

    A 3 x 3 weight in NF4 comes out as channels_last, without a copy; an input that is channels_last then stays so, and
    with another one the output is channels_last, as it is with a dense channels_last weight.

    Args:
        x: [B, I, H, W], floating point, in any layout.
        weight: [O, I / G, k, l] in the dtype of ``x``; or NF4 of shape [O, k, l, I / G], the order of channels_last.
        bias: [O], frozen; converted to the dtype of the computation.
        stride: of the convolution; the same holds for the rest.
        padding: zeros on each side.
        dilation: distance of taps.
        groups: G.

    Returns:
        [B, O, H', W'] in the dtype of ``x``, with NF4 under autocast in that of autocast. Differentiable once, in x.
    """
    geometry = (list(stride), list(padding), list(dilation), groups)
    if isinstance(weight, Tensor):
        if compute_dtype(x) != weight.dtype:  # autocast converts the weight, which is PyTorch's own business
            return torch.conv2d(x, weight, bias, *geometry)
        out: Tensor = _conv(x, bias, weight, None, None, None, None, [], *geometry)
        return out
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    out = _conv(x.to(dtype), bias, *_tensors(weight), list(weight.shape), *geometry)
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in: autocast's dtype where that is on, else that of ``x``."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _tensors(weight: NF4Weight) -> Base:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset


def _dequantize(base: Base, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    packed, absmax, nested_absmax, nested_code, offset = base
    assert absmax is not None
    if packed.is_cpu and dtype in _CPU_DTYPES:
        if nested_absmax is not None and nested_code is not None and offset is not None:
            scales = nested_absmax.repeat_interleave(GROUP)[: len(absmax)]
            absmax = nested_code[absmax.int()] * scales + offset
        # As one row: with rows that are no multiple of 64 bitsandbytes 0.50's C++ takes the scales of other rows
        # (measured: weights of 96 x 96 with rows of different size come back with 36 % error instead of 9 %).
        size = 1
        for length in shape:
            size *= length
        run = torch.ops.bitsandbytes.dequantize_4bit.default
        dense: Tensor = run(packed.reshape(-1), absmax, 64, "nf4", [size], dtype)
        return dense.view(tuple(shape))
    return nf4_dequantize(
        packed, absmax, shape, nested_absmax=nested_absmax, nested_code=nested_code, offset=offset, dtype=dtype
    )


# ---- linear


def _linear_forward(
    x: Tensor, bias: Tensor | None, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    return F.linear(x, _dequantize((packed, absmax, nested_absmax, nested_code, offset), shape, x.dtype), bias)


def _linear_fake(
    x: Tensor, bias: Tensor | None, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *base, ctx.shape = inputs
    ctx.save_for_backward(*(base if ctx.needs_input_grad[0] else [None] * 5))


def _linear_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad = _linear_grad(grad_out, *ctx.saved_tensors, ctx.shape) if ctx.needs_input_grad[0] else None
    return grad, *(None,) * 7


def _linear_backward(
    grad_out: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    weight = _dequantize((packed, absmax, nested_absmax, nested_code, offset), shape, grad_out.dtype)
    rows = grad_out.reshape(-1, shape[0])
    # `out=` style product: autocast, under which backward may run, leaves it alone.
    grad = torch.mm(rows, weight, out=rows.new_empty(rows.shape[0], shape[1]))
    return grad.view(*grad_out.shape[:-1], shape[1])


def _linear_backward_fake(
    grad_out: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    return grad_out.new_empty(*grad_out.shape[:-1], shape[1])


_linear = differentiable(
    "nf4_linear", _linear_forward, fake=_linear_fake, setup_context=_linear_keep, backward=_linear_gradient
)
_linear_grad = plain("nf4_linear_backward", _linear_backward, fake=_linear_backward_fake)


# ---- convolution


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor [B, C, H, W] lies channels_last, and not contiguous as well."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _laid_out(tensor: Tensor, nhwc: bool) -> Tensor:
    """What a compiler was promised; a backend that has laid its result out so, as all do, pays nothing."""
    return tensor.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _kernel(base: Base, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight [O, I / G, k, l], channels_last where it comes from NF4."""
    return base[0] if base[1] is None else _dequantize(base, shape, dtype).permute(0, 3, 1, 2)


def _conv_forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    kernel = _kernel((weight, absmax, nested_absmax, nested_code, offset), shape, x.dtype)
    return _laid_out(
        torch.conv2d(x, kernel, bias, stride, padding, dilation, groups),
        is_channels_last(x) or is_channels_last(kernel),
    )


def _conv_fake(
    x: Tensor, bias: Tensor | None, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    kernel = weight if absmax is None else x.new_empty(tuple(shape)).permute(0, 3, 1, 2)
    out = torch.conv2d(x, kernel, bias, stride, padding, dilation, groups)
    return _laid_out(out, is_channels_last(x) or is_channels_last(kernel))


def _conv_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *base, ctx.shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.input_shape, ctx.channels_last = list(x.shape), is_channels_last(x)
    ctx.save_for_backward(*(base if ctx.needs_input_grad[0] else [None] * 5))


def _conv_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad = None
    if ctx.needs_input_grad[0]:
        geometry = (ctx.shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
        grad = _conv_grad(grad_out, ctx.input_shape, ctx.channels_last, *ctx.saved_tensors, *geometry)
    return grad, *(None,) * 11


def _conv_backward(
    grad_out: Tensor, input_shape: Sequence[int], channels_last: bool, weight: Tensor, absmax: Tensor | None,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    kernel = _kernel((weight, absmax, nested_absmax, nested_code, offset), shape, grad_out.dtype)
    # Of the input, backward reads shape and layout alone, as torch.nn.grad.conv2d_input relies on; a channels_last one
    # is laid out in full, since the layout of an expanded number says contiguous and grad_out would be turned to that.
    if channels_last:
        x = torch.empty_like(
            grad_out.new_empty(1).expand(tuple(input_shape)), memory_format=torch.channels_last
        )  # fmt: skip
    else:
        x = grad_out.new_empty(1).expand(tuple(input_shape))
    zeros = [0] * len(padding)
    grad: Tensor = torch.ops.aten.convolution_backward(
        grad_out, x, kernel, None, stride, padding, dilation, False, zeros, groups, (True, False, False)
    )[0]
    return _laid_out(grad, channels_last or is_channels_last(kernel))


def _conv_backward_fake(
    grad_out: Tensor, input_shape: Sequence[int], channels_last: bool, weight: Tensor, absmax: Tensor | None,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    kernel = weight if absmax is None else grad_out.new_empty(tuple(shape)).permute(0, 3, 1, 2)
    return _laid_out(grad_out.new_empty(tuple(input_shape)), channels_last or is_channels_last(kernel))


_conv = differentiable(
    "frozen_conv2d", _conv_forward, fake=_conv_fake, setup_context=_conv_keep, backward=_conv_gradient
)
_conv_grad = plain("frozen_conv2d_backward", _conv_backward, fake=_conv_backward_fake)
