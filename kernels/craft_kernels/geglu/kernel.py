"""Triton form of GEGLU: one launch forward, one backward, nothing kept between them but the input.

Shapes: M rows (the leading sizes, flattened) and D columns of the result; the input has 2D columns, hidden then gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of the result that one program makes. 2,048 over 128 threads are two 16-byte loads a thread from each of
# hidden and gate in half precision, four in flight. Float64's erf and exp at 16 elements a thread spill on sm_80 (255
# registers); 4 do not. SDXL's widths, 2,560 and 5,120, are 5 and 10 times 512.
_TILE, _TILE_FLOAT64 = 2048, 512
_MAX_COLUMNS = 512


@triton.jit
def _normal_cdf(gate):
    """The standard normal distribution function, (1 + erf(gate / sqrt 2)) / 2; gelu is gate times it."""
    return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@triton.jit
def _tile(rows, width, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers (int64: a large input has more than 2^31 elements), column numbers and mask of this program."""
    program = tl.program_id(0)
    row = (program // column_blocks) * ROWS + tl.arange(0, ROWS)
    column = (program % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], mask


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, rows, width, stride, column_blocks,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The product of hidden and gelu(gate), rounded once."""
    row, column, mask = _tile(rows, width, column_blocks, ROWS, COLUMNS)
    at = x_ptr + row * stride + column
    hidden = tl.load(at, mask=mask, other=0.0).to(ACC)
    gate = tl.load(at + width, mask=mask, other=0.0).to(ACC)
    y = hidden * (gate * _normal_cdf(gate))
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, x_ptr, grad_x_ptr, rows, width, stride, column_blocks,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Both halves of the gradient, gelu and its derivative computed anew from the input."""
    row, column, mask = _tile(rows, width, column_blocks, ROWS, COLUMNS)
    at = x_ptr + row * stride + column
    grad_y = tl.load(grad_y_ptr + row * width + column, mask=mask, other=0.0).to(ACC)
    hidden = tl.load(at, mask=mask, other=0.0).to(ACC)
    gate = tl.load(at + width, mask=mask, other=0.0).to(ACC)
    below = _normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
    grad_hidden = grad_y * (gate * below)
    grad_gate = grad_y * hidden * (below + gate * density)
    to = grad_x_ptr + row * (2 * width) + column
    tl.store(to, grad_hidden.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(to + width, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor) -> Tensor:
    """One launch.

    Args:
        x: [..., 2D] with at least one element. Rows at one distance from each other, as in a slice of columns, are
            read as they lie; another layout is copied first.

    Returns:
        [..., D], contiguous, in the dtype of ``x``.
    """
    flat = _rows(x)
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    grid, numbers, constants = _plan(flat)
    _forward_kernel[grid](flat, y, *numbers, **constants)
    return y


def backward(grad_y: Tensor, x: Tensor) -> Tensor:
    """One launch: dL/dx [..., 2D], contiguous, in the dtype of ``x``.

    Args:
        grad_y: [..., D] in the dtype of ``x``; copied first unless contiguous.
        x: as in ``forward``.
    """
    flat = _rows(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, numbers, constants = _plan(flat)
    _backward_kernel[grid](grad_y.contiguous(), flat, grad_x, *numbers, **constants)
    return grad_x


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _plan(flat: Tensor) -> tuple[tuple[int], tuple[int, int, int, int], dict[str, object]]:
    """Grid, numbers and constants of either kernel for an input [M, 2D]."""
    rows, width = flat.shape[0], flat.shape[1] // 2
    acc, tile = (tl.float64, _TILE_FLOAT64) if flat.dtype == torch.float64 else (tl.float32, _TILE)
    columns = min(triton.next_power_of_2(width), _MAX_COLUMNS)
    tile_rows, column_blocks = tile // columns, triton.cdiv(width, columns)
    constants = {"ACC": acc, "ROWS": tile_rows, "COLUMNS": columns, "num_warps": 4}
    return (triton.cdiv(rows, tile_rows) * column_blocks,), (rows, width, flat.stride(0), column_blocks), constants
