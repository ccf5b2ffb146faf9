"""Triton form of the NF4 dequantisation: one launch, also where the scales are quantised themselves.

Shapes: N elements in ceil(N / 2) bytes; K = ceil(N / 64) scales; G = ceil(K / 256) second scales. A program owns
``ROWS`` rows of ``BYTES`` bytes: a row is what one thread reads at once and writes as 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from craft_kernels.nf4_dequantize.naive import BLOCK, GROUP, LEVELS

_WARPS = 4
# Rows of a program by size of the weight: (most elements, rows). One row a thread gives SDXL's 640 x 640 weights 400
# programs, enough for 132 multiprocessors; four rows a thread keep four loads in flight and pay the table once.
_ROWS = ((1 << 21, 128), (1 << 63, 512))


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, elements, total_bytes,
    NESTED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Level of each half byte times the scale of its block; a 2-D tile, so that a row's scale is read once."""
    first = tl.program_id(0).to(tl.int64) * (ROWS * BYTES)
    row = tl.arange(0, ROWS)
    byte = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    present = byte < tl.minimum(total_bytes - first, ROWS * BYTES).to(tl.int32)
    packed = tl.load(packed_ptr + first + byte, mask=present, other=0).to(tl.int32)
    left = tl.minimum(elements - first * 2, ROWS * BYTES * 2).to(tl.int32)
    block = (first * 2) // BLOCK + row // (BLOCK // (2 * BYTES))
    wanted = row * (2 * BYTES) < left
    scale = tl.load(absmax_ptr + block, mask=wanted, other=0)
    if NESTED:
        group_scale = tl.load(nested_absmax_ptr + block // GROUP, mask=wanted, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * group_scale + tl.load(offset_ptr)
    # The 16 levels live in shared memory: a read an element. A tree of selects costs 15 instructions an element, and
    # at 3 TB/s an H100 has some 25 to spare for everything.
    lane = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(lane == i, LEVELS[i], table)
    index = tl.reshape(tl.join(packed >> 4, packed & 15), (ROWS * BYTES * 2,))
    values = tl.reshape(tl.gather(table, index, axis=0), (ROWS, 2 * BYTES)) * scale[:, None]
    at = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out_ptr + first * 2 + at, values.to(out_ptr.dtype.element_ty), mask=at < left)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One launch.

    Args:
        packed: [ceil(N / 2)] uint8, N >= 1; contiguous, as every tensor here.
        absmax: [K] float32, or uint8 where nested.
        shape: of the result, N elements.
        nested_absmax: [G] float32, or None where not nested; the same holds for the next two.
        nested_code: [256] float32.
        offset: [] float32, read on the device: nothing waits for it.
        dtype: of the result.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    size, row_bytes = out.numel(), 8 // dtype.itemsize
    rows = next(rows for most, rows in _ROWS if size <= most)
    # Without fused multiply-adds: bitsandbytes rounds the product of a nested scale before it adds the offset.
    _dequantize_kernel[(triton.cdiv(packed.numel(), rows * row_bytes),)](
        packed, absmax, absmax if nested_absmax is None else nested_absmax,
        absmax if nested_code is None else nested_code, absmax if offset is None else offset, out, size, packed.numel(),
        NESTED=nested_absmax is not None, ROWS=rows, BYTES=row_bytes, BLOCK=BLOCK, GROUP=GROUP, LEVELS=LEVELS,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
