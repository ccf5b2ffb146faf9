"""What 8-bit AdamW keeps between steps, and the two 8-bit codes it keeps its moments in (arXiv 2110.02861).

Shapes: Q elements of tensors with 8-bit moments, F elements of tensors with float32 moments, both with their padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Elements that share one scale.
BLOCK = 256
# Q and F are multiples of this: no program of a kernel meets a ragged end, so no access is masked.
SECTION = 4096
# Tensors of fewer elements keep float32 moments.
MIN_8BIT_SIZE = 4096
# Below the smallest normal float32, 1/scale is infinite: such a block is stored as zeros.
TINY = torch.finfo(torch.float32).tiny

_DECADES = 7


class AdamW8bitState(NamedTuple):
    """The optimizer's tensors, all on one device.

    Attributes:
        code1: uint8 [Q], first moment in the signed code.
        code2: uint8 [Q], second moment in the unsigned code.
        absmax1: float32 [Q / 256], scale of each block of ``code1``.
        absmax2: float32 [Q / 256], scale of each block of ``code2``.
        moment1: float32 [F], first moment of the small tensors.
        moment2: float32 [F], second moment of the small tensors.
        step: int64 [], updates done.
        grad_norm: float32 [], norm of the last gradient, before the clip.
        tables: float32 [4, 256], from :func:`code_tables`; constant.
    """

    code1: Tensor
    code2: Tensor
    absmax1: Tensor
    absmax2: Tensor
    moment1: Tensor
    moment2: Tensor
    step: Tensor
    grad_norm: Tensor
    tables: Tensor


def new_state(size_8bit: int, size_32bit: int, device: torch.device | str) -> AdamW8bitState:
    """The state before the first step: all zeros.

    Args:
        size_8bit: Q, a multiple of 4,096.
        size_32bit: F, a multiple of 4,096.
        device: of all its tensors.

    Raises:
        ValueError: a size that is negative or no multiple of 4,096.
    """
    for name, size in (("size_8bit", size_8bit), ("size_32bit", size_32bit)):
        if size < 0 or size % SECTION:
            raise ValueError(f"{name} must be a multiple of {SECTION}, at least 0, got {size}")

    def zeros(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return AdamW8bitState(
        code1=zeros(size_8bit, torch.uint8),
        code2=zeros(size_8bit, torch.uint8),
        absmax1=zeros(size_8bit // BLOCK),
        absmax2=zeros(size_8bit // BLOCK),
        moment1=zeros(size_32bit),
        moment2=zeros(size_32bit),
        step=torch.zeros((), dtype=torch.int64, device=device),
        grad_norm=torch.zeros((), device=device),
        tables=code_tables().to(device),
    )


def dynamic_map(signed: bool) -> Tensor:
    """The dynamic-exponent code of arXiv 2110.02861, section 1.3: what each of 256 codes stands for, ascending.

    Seven decades, ``10^-6`` to ``1``. Decade ``d`` cuts [0.1, 1] into ``2^d`` equal parts (``2^(d+1)`` without a sign)
    and takes their centres; 0 and 1 complete the 256. The signed code has each centre with both signs, and no -1.

    Args:
        signed: True for the first moment, False for the second, which is never negative.

    Returns:
        float32 [256].
    """
    values = torch.tensor([0.0, 1.0])
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)
        values = torch.cat([values, centres, -centres] if signed else [values, centres])
    return values.sort().values


def code_tables() -> Tensor:
    """Both codes and the edges between them, for the CPU.

    Edge ``j`` lies half-way between the codes ``j`` and ``j + 1``, and the code of ``x`` is the number of edges below
    ``x``: the nearest one. Half-way cases go to the even code, as in bitsandbytes' CUDA kernel: an odd ``j`` has its
    edge one float lower, so that ``x`` on it counts as above. Zero is kept for what is zero:

    - A negative first moment never becomes 0, which keeps its sign; this too is the rule of that kernel.
    - A positive second moment never becomes 0. bitsandbytes rounds it to 0 below 1.6e-7 of its block's largest, and
      the next update then divides by next to nothing: README.md has the measurement.

    Returns:
        float32 [4, 256]: signed map, unsigned map, signed edges, unsigned edges (255 of them, then infinity).
    """
    maps = [dynamic_map(signed) for signed in (True, False)]
    edges = [torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([torch.inf])]) for values in maps]
    for row in edges:
        row[1:-1:2] = torch.nextafter(row[1:-1:2], torch.tensor(-torch.inf))
    edges[0][126] = -TINY  # between the last negative value and 0
    edges[1][0] = TINY  # between 0 and the first positive value
    return torch.stack([*maps, *edges])
