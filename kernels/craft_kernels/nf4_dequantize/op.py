"""NF4 dequantisation as an op: checks, choice of form, registration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from craft_kernels.checks import KERNEL_DTYPES, check_choice, check_tensor
from craft_kernels.custom import plain
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.nf4_dequantize import naive
from craft_kernels.nf4_dequantize.naive import BLOCK, GROUP


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl = "auto",
) -> Tensor:
    """A weight from bitsandbytes' NF4 format, bit for bit what ``bitsandbytes.functional.dequantize_4bit`` gives.

    ``w_i = level[q_i] * scale[i // 64]`` with the 16 levels of arXiv 2305.14314 appendix E; with double quantisation
    (section 3 there) ``scale_k = nested_code[absmax_k] * nested_absmax[k // 256] + offset``. Every operation rounds to
    float32, the result once more to ``dtype``.

    Args:
        packed: ceil(N / 2) elements of any shape, uint8; two indices q to a byte, the first in the high half.
        absmax: [K] float32, K = ceil(N / 64); with double quantisation uint8.
        shape: of the result, N elements in all.
        nested_absmax: [ceil(K / 256)] float32; given together with the next two, or not at all.
        nested_code: [256] float32, what a quantised scale stands for.
        offset: [] float32, the mean of the scales.
        dtype: float16, bfloat16, float32 or float64 of the result.
        impl: ``auto`` (Triton on a GPU), ``triton``, ``compile`` or ``torch``. On a GPU ``compile`` may fuse the
            product and the sum of a nested scale into one rounding: close, not equal to the bit.

    Returns:
        [*shape] in ``dtype``, contiguous, without a gradient.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(packed, absmax, shape, nested_absmax, nested_code, offset, dtype)
    form = choose(impl, packed)
    flat = packed.reshape(-1).contiguous()
    scale = absmax.detach().contiguous()
    first, second, third = (
        None if tensor is None else tensor.detach().contiguous() for tensor in (nested_absmax, nested_code, offset)
    )
    if form == "triton" and packed.numel():
        return _fused(flat, scale, list(shape), first, second, third, dtype)  # type: ignore[no-any-return]
    run = compiled(naive.nf4_dequantize) if form == "compile" else naive.nf4_dequantize
    return run(flat, scale, shape, first, second, third, dtype)


def _forward(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from craft_kernels.nf4_dequantize import kernel

    return kernel.dequantize(packed, absmax, shape, nested_absmax, nested_code, offset, dtype)


def _forward_fake(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(tuple(shape), dtype=dtype)


_fused = plain("nf4_dequantize", _forward, fake=_forward_fake)


def _check(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_choice("dtype", dtype, KERNEL_DTYPES)
    if any(length < 0 for length in shape):
        raise ValueError(f"shape must hold no negative size, got {tuple(shape)}")
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-size // 2):
        found = f"{str(packed.dtype).removeprefix('torch.')} {tuple(packed.shape)}"
        raise ValueError(f"packed must be uint8 with {-(-size // 2)} elements for shape {tuple(shape)}, got {found}")
    like, blocks = ("packed", packed), -(-size // BLOCK)
    nested = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    missing = [name for name, value in nested.items() if value is None]
    if len(missing) not in (0, 3):
        raise ValueError(f"nested_absmax, nested_code and offset go together: {', '.join(missing)} is None")
    check_tensor("absmax", absmax, (blocks,), torch.float32 if missing else torch.uint8, like=like)
    if nested_absmax is not None and nested_code is not None and offset is not None:
        check_tensor("nested_absmax", nested_absmax, (-(-blocks // GROUP),), torch.float32, like=like)
        check_tensor("nested_code", nested_code, (256,), torch.float32, like=like)
        check_tensor("offset", offset, (), torch.float32, like=like)
