"""Triton form of the weighted noise-prediction loss: one pass over the data, a short finish, backward a scale.

Shapes: B samples of N elements each, cut into P parts of ``_PART`` elements, T training timesteps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one program. 4,096 over 128 threads are four 16-byte loads a thread and tensor in half precision, enough
# in flight to fill a GPU's memory, and 16 programs for one SDXL sample (65,536 elements). A part never depends on the
# batch, so neither does a sample's error, to the bit.
_PART = 4096
# Elements that the finish holds in registers at a time.
_FINISH_TILE = 8192


@triton.jit
def _error_kernel(
    pred_ptr, target_ptr, error_ptr, partial_ptr, sample_size, parts,
    ACC: tl.constexpr, KEEP_ERROR: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The error, pred - target, and the sum of its squares over this program's part of a sample."""
    program = tl.program_id(0)
    start = (program % parts).to(tl.int64) * PART
    base = (program // parts).to(tl.int64) * sample_size + start
    offsets = tl.arange(0, PART)
    mask = offsets < tl.minimum(sample_size - start, PART).to(tl.int32)
    pred = tl.load(pred_ptr + base + offsets, mask=mask, other=0.0).to(ACC)
    target = tl.load(target_ptr + base + offsets, mask=mask, other=0.0).to(ACC)
    error = pred - target
    if KEEP_ERROR:
        tl.store(error_ptr + base + offsets, error.to(error_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program, tl.sum(error * error, axis=0))


@triton.jit(do_not_specialize=["batch", "divisor"])  # both change from step to step; no reason to compile anew
def _finish_kernel(
    partial_ptr, weight_ptr, timestep_ptr, table_ptr, loss_ptr, per_sample_ptr, scale_ptr,
    batch, parts, sample_size, table_size, divisor,
    ACC: tl.constexpr, HAS_TABLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the parts up in a fixed order, without atomics: per-sample errors, the loss, what backward multiplies by."""
    # Not .to(): an argument of 1 is a plain Python number in here.
    size = tl.full((), sample_size, ACC)
    count = tl.full((), divisor, ACC)
    total = tl.zeros((ROWS,), ACC)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < batch
        sums = tl.zeros((ROWS, COLUMNS), ACC)
        for begin in range(0, parts, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            at = rows.to(tl.int64)[:, None] * parts + columns[None, :]
            sums += tl.load(partial_ptr + at, mask=there[:, None] & (columns < parts)[None, :], other=0.0)
        per_sample = tl.sum(sums, axis=1) / size
        weight = tl.load(weight_ptr + rows, mask=there, other=0.0).to(ACC)
        if HAS_TABLE:
            step = tl.load(timestep_ptr + rows, mask=there, other=0)
            known = (step >= 0) & (step < table_size)
            # A timestep outside of the table gives NaN, which no training step accepts, rather than a stray read.
            factor = tl.load(table_ptr + step, mask=there & known, other=float("nan")).to(ACC)
            weight = tl.where(there, weight * factor, 0.0)
        tl.store(per_sample_ptr + rows, per_sample, mask=there)
        tl.store(scale_ptr + rows, 2.0 * weight / (count * size), mask=there)
        total += tl.where(there, weight * per_sample, 0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / count)


@triton.jit
def _scale_kernel(
    error_ptr, scale_ptr, grad_loss_ptr, grad_pred_ptr, sample_size, parts, ACC: tl.constexpr, PART: tl.constexpr
):
    """grad_pred = error * (scale of its sample * grad_loss), rounded once."""
    program = tl.program_id(0)
    sample = program // parts
    start = (program % parts).to(tl.int64) * PART
    base = sample.to(tl.int64) * sample_size + start
    offsets = tl.arange(0, PART)
    mask = offsets < tl.minimum(sample_size - start, PART).to(tl.int32)
    factor = tl.load(scale_ptr + sample) * tl.load(grad_loss_ptr).to(ACC)
    error = tl.load(error_ptr + base + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(grad_pred_ptr + base + offsets, (error * factor).to(grad_pred_ptr.dtype.element_ty), mask=mask)


def forward(
    noise_pred: Tensor,
    target: Tensor,
    weight: Tensor,
    timesteps: Tensor | None,
    timestep_weight: Tensor | None,
    divisor: int,
    keep_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches.

    Args:
        noise_pred: [B, C, H, W] with at least one element; contiguous or channels_last is read as it lies, another
            layout is copied first.
        target: the same shape; another layout than that of ``noise_pred`` is copied first.
        weight: [B].
        timesteps: int64 [B] or None.
        timestep_weight: [T] or None.
        divisor: what the weighted sum is divided by.
        keep_error: keep what backward needs.

    Returns:
        The loss [], per-sample errors [B], the error [B, C, H, W] in the dtype of ``noise_pred`` (empty unless kept)
        and the factor [B] that turns it into the gradient.
    """
    layout = memory_layout(noise_pred)
    pred, aim = noise_pred.contiguous(memory_format=layout), target.contiguous(memory_format=layout)
    batch, size = len(pred), pred[0].numel()
    parts = triton.cdiv(size, _PART)
    acc, tl_acc = (torch.float64, tl.float64) if pred.dtype == torch.float64 else (torch.float32, tl.float32)
    error = torch.empty_like(pred, memory_format=layout) if keep_error else pred.new_empty(0)
    partial = torch.empty(batch * parts, dtype=acc, device=pred.device)
    loss = torch.empty((), dtype=acc, device=pred.device)
    per_sample, scale = (torch.empty(batch, dtype=acc, device=pred.device) for _ in range(2))
    _error_kernel[(batch * parts,)](
        pred, aim, error, partial, size, parts, ACC=tl_acc, KEEP_ERROR=keep_error, PART=_PART, num_warps=4
    )
    columns = min(triton.next_power_of_2(parts), 1024)
    rows = max(1, min(triton.next_power_of_2(batch), _FINISH_TILE // columns))
    warps = 8 if rows * columns > 1024 else 4
    _finish_kernel[(1,)](
        partial, weight.contiguous(), partial if timesteps is None else timesteps.contiguous(),
        partial if timestep_weight is None else timestep_weight.contiguous(), loss, per_sample, scale,
        batch, parts, size, 0 if timestep_weight is None else len(timestep_weight), divisor,
        ACC=tl_acc, HAS_TABLE=timesteps is not None, ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return loss, per_sample, error, scale


def backward(error: Tensor, scale: Tensor, grad_loss: Tensor) -> Tensor:
    """One launch: dL/dnoise_pred from the kept error, in its dtype and layout.

    Args:
        error: [B, C, H, W], dense.
        scale: [B].
        grad_loss: [], floating point.
    """
    grad_pred = torch.empty_like(error)
    size = error[0].numel()
    parts = triton.cdiv(size, _PART)
    _scale_kernel[(len(error) * parts,)](
        error, scale, grad_loss, grad_pred, size, parts,
        ACC=tl.float64 if error.dtype == torch.float64 else tl.float32, PART=_PART, num_warps=4,
    )  # fmt: skip
    return grad_pred


def memory_layout(tensor: Tensor) -> torch.memory_format:
    """The order in which the samples of [B, C, H, W] are best walked through."""
    nhwc = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
