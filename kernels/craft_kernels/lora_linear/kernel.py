"""Triton form of the low-rank update: one launch for both of its products, forward and backward.

Shapes: M rows, K features read, N features updated, R rank. Forward reads x and updates y; backward reads the gradient
of y and updates that of x: the same product of two thin matrices, ``out += up_scale * (down_scale * rows D^T) U``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest rank by dtype: above it a program's registers no longer hold its tiles (float32 spilled at 128).
MAX_RANK = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}

# Rows of a program in half precision: (most rows of the call, rows). 16 is the least that a tensor core takes. In
# float32 it is 16 always: sums of exact products live in registers, and 32 rows spilled at rank 64.
_ROWS = ((2048, 16), (8192, 32), (1 << 63, 64))
_FLOAT32_ROWS = 16
# Programs wanted: 132 multiprocessors of an H100 twice over. Where the rows alone do not give as many, the updated
# columns are shared out as well, and each share computes the rank-R rows for itself: R / N of the update's work.
_PROGRAMS = 264
_COLUMNS = 64


@triton.jit
def _low_rank_kernel(
    rows_ptr, down_ptr, up_ptr, thin_ptr, out_ptr, row_count, inner, columns, span, rank,
    down_rank_stride, down_inner_stride, up_rank_stride, up_column_stride, down_scale, up_scale,
    RANK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keep thin = down_scale * rows D^T for this program's rows; add up_scale * thin U to its span of columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < row_count)[:, None]
    lane = tl.arange(0, RANK)
    used = lane < rank
    thin = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, inner, INNER):
        at = start + tl.arange(0, INNER)
        inside = at < inner
        x = tl.load(rows_ptr + row[:, None] * inner + at[None, :], mask=here & inside[None, :], other=0.0)
        down = tl.load(
            down_ptr + at[:, None] * down_inner_stride + lane[None, :] * down_rank_stride,
            mask=inside[:, None] & used[None, :], other=0.0,
        )  # fmt: skip
        thin = tl.dot(x, down, thin, input_precision="ieee")
    # Rounded before it is multiplied again: forward and backward then work with the very values that are kept.
    low = (thin * down_scale).to(thin_ptr.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(thin_ptr + row[:, None] * rank + lane[None, :], low, mask=here & used[None, :])
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, columns), COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < columns
        up = tl.load(
            up_ptr + lane[:, None] * up_rank_stride + at[None, :] * up_column_stride,
            mask=used[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        where = out_ptr + row[:, None] * columns + at[None, :]
        mask = here & inside[None, :]
        update = tl.dot(low, up, input_precision="ieee") * up_scale
        old = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, (old + update).to(out_ptr.dtype.element_ty), mask=mask)


def low_rank_update_(
    out: Tensor, rows: Tensor, down: Tensor, up: Tensor, *, down_scale: float = 1.0, up_scale: float = 1.0
) -> Tensor:
    """One launch: add ``up_scale * T up`` to ``out`` in place, T = ``down_scale * rows down^T``.

    Args:
        out: [M, N], contiguous, float16, bfloat16 or float32 as every tensor here; nobody else may hold it.
        rows: [M, K], contiguous, M >= 1.
        down: [R, K], any strides, R <= MAX_RANK[dtype].
        up: [R, N], any strides.
        down_scale: multiplies T before it is rounded.
        up_scale: multiplies the update.

    Returns:
        T [M, R] in the dtype of ``rows``.
    """
    (count, inner), columns, rank = rows.shape, out.shape[1], down.shape[0]
    thin = torch.empty(count, rank, dtype=rows.dtype, device=rows.device)
    whole = rows.dtype == torch.float32
    tile = _FLOAT32_ROWS if whole else next(tile for most, tile in _ROWS if count <= most)
    row_programs, column_tiles = triton.cdiv(count, tile), triton.cdiv(columns, _COLUMNS)
    shares = min(column_tiles, triton.cdiv(_PROGRAMS, row_programs))
    span = triton.cdiv(column_tiles, shares) * _COLUMNS
    width = max(16, triton.next_power_of_2(rank))
    _low_rank_kernel[(row_programs, triton.cdiv(columns, span))](
        rows, down, up, thin, out, count, inner, columns, span, rank,
        down.stride(0), down.stride(1), up.stride(0), up.stride(1), down_scale, up_scale,
        RANK=width, ROWS=tile, INNER=32 if whole or width > 64 else 64, COLUMNS=_COLUMNS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return thin
