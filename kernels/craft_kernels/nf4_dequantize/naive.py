"""Dequantisation of a 4-bit NormalFloat weight in plain PyTorch: the truth that every faster form is held against.

Shapes: N elements, two to a byte; K = ceil(N / 64) blocks with a scale each; G = ceil(K / 256) groups of such scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # elements that share a scale
GROUP = 256  # scales that share a second scale, where the scales are themselves quantised

# The 16 levels of NF4, arXiv 2305.14314 appendix E: float32 numbers, written out in full.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, see ``craft_kernels.nf4_dequantize.nf4_dequantize``; arguments are not checked here.

    The order of the float32 roundings is that of bitsandbytes: product, sum, product, and then ``dtype``.
    """
    scale = absmax
    if nested_absmax is not None and nested_code is not None and offset is not None:
        scale = nested_code[absmax.int()] * nested_absmax.repeat_interleave(GROUP)[: len(absmax)] + offset
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=packed.device)
    pairs = torch.cartesian_prod(levels, levels)  # [256, 2]: what a byte stands for, its high half first
    size = 1
    for length in shape:
        size *= length
    values = pairs[packed.int()].view(-1)[:size]
    return (values * scale.repeat_interleave(BLOCK)[:size]).to(dtype).view(tuple(shape))
