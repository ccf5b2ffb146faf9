"""Triton form of group norm and SiLU: three launches forward, three backward, four where the norm is trained.

Every pass over the data works on tiles of PIXELS x CHANNELS values. Sums run over a tile's pixels and leave one number
a channel, so a tile never has to know where groups begin: C / G is 10, 20, 30, 40, 60 or 80 in SDXL, no power of two.
A short finish adds the tiles' numbers up by group, in a fixed order, without atomics.

Shapes: B samples, C channels, N pixels (H * W), G groups of S = C / G channels, P tiles along the pixels.
Names: n = (x - mean) * rstd, z = n * weight + bias, y = silu(z) or z.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from craft_kernels.group_norm_silu.naive import memory_layout

# Values of a tile. 8,192 over 128 threads are eight 16-byte loads a thread and tensor in half precision; half as many
# keep the memory as busy but run 36 instead of 31 instructions a value in _sums_kernel (sm_90), near the 38 that an
# H100 can issue in the time it reads the value and its gradient. Float32 has twice the bytes, float64 spills at 4,096.
# A sample of fewer than _SMALL values would make less than 256 large tiles, too few to share out among 132 SMs.
# By the shape of a sample alone: the batch must not change how it is added up.
_TILE, _TILE_FLOAT32, _TILE_FLOAT64 = 8192, 4096, 1024
_SMALL, _TILE_SMALL = 2**21, 4096
# 64 divides every channel count of SDXL, and 64 half-precision channels are one 128-byte line of a channels_last pixel.
_CHANNELS_LAST_CHANNELS = 64
# In contiguous memory few channels of many pixels: mean, scale and bias of 4 cost less to fetch than those of 16.
_CONTIGUOUS_CHANNELS = 4
# Values that a finish holds in registers at a time.
_FINISH_TILE = 4096


@triton.jit
def _tile(
    pixels, channels, parts, channel_blocks,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Where this program's tile lies.

    Returns its sample, part and channel numbers, the offsets of its values from the first of the tensor (int64: there
    may be more than 2^31), the mask of values that exist, and how many of its pixels do.
    """
    program = tl.program_id(0)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    part = (program // channel_blocks) % parts
    sample = program // channel_blocks // parts
    pixel = part * PIXELS + tl.arange(0, PIXELS)
    mask = (channel < channels)[None, :]
    if not EVEN:
        mask = (pixel < pixels)[:, None] & mask
    base = sample.to(tl.int64) * channels * pixels
    if CHANNELS_LAST:
        offsets = base + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    else:
        offsets = base + channel.to(tl.int64)[None, :] * pixels + pixel[:, None]
    return sample, part, channel, offsets, mask, tl.minimum(pixels - part * PIXELS, PIXELS)


@triton.jit
def _statistics_kernel(
    x_ptr, mean_ptr, square_ptr, pixels, channels, parts, channel_blocks,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean over a tile's pixels and sum of the squares of what is left, by channel."""
    sample, part, channel, offsets, mask, count = _tile(
        pixels, channels, parts, channel_blocks, CHANNELS_LAST, EVEN, PIXELS, CHANNELS
    )
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    mean = tl.sum(x, axis=0) / count.to(ACC)
    rest = x - mean[None, :]
    if not EVEN:
        rest = tl.where(mask, rest, 0.0)
    to = (sample.to(tl.int64) * parts + part) * channels + channel
    tl.store(mean_ptr + to, mean, mask=channel < channels)
    tl.store(square_ptr + to, tl.sum(rest * rest, axis=0), mask=channel < channels)


@triton.jit
def _reciprocal_root(value):
    """1 / sqrt(value), rounded as in IEEE 754: the approximate forms are off by 2^-22, and all of a group with them."""
    return 1.0 / tl.sqrt(value) if value.dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(value))


@triton.jit
def _statistics_finish_kernel(
    part_mean_ptr, part_square_ptr, mean_ptr, rstd_ptr, pixels, channels, parts,
    ACC: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the tiles of one group (Chan, Golub and LeVeque 1983): mean, and 1 / sqrt(variance + eps).

    The second pass knows how far the rounded mean of the first one is off, and corrects mean and squares by it.
    """
    program = tl.program_id(0)
    groups = channels // SIZE
    sample, first = program // groups, (program % groups) * SIZE
    column = tl.arange(0, COLUMNS)
    size = tl.full((), pixels, ACC) * SIZE
    base = sample.to(tl.int64) * parts * channels + first
    total = tl.zeros((PARTS, COLUMNS), ACC)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < SIZE)[None, :]
        count = tl.minimum(pixels - part * PIXELS, PIXELS).to(ACC)[:, None]
        at = base + part.to(tl.int64)[:, None] * channels + column[None, :]
        total += count * tl.load(part_mean_ptr + at, mask=mask, other=0.0)
    mean = tl.sum(tl.sum(total, axis=0), axis=0) / size
    squares, shift = tl.zeros((PARTS, COLUMNS), ACC), tl.zeros((PARTS, COLUMNS), ACC)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < SIZE)[None, :]
        count = tl.minimum(pixels - part * PIXELS, PIXELS).to(ACC)[:, None]
        at = base + part.to(tl.int64)[:, None] * channels + column[None, :]
        off = tl.where(mask, tl.load(part_mean_ptr + at, mask=mask, other=0.0) - mean, 0.0)
        squares += tl.load(part_square_ptr + at, mask=mask, other=0.0) + count * off * off
        shift += count * off
    correction = tl.sum(tl.sum(shift, axis=0), axis=0) / size
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / size - correction * correction
    # Of equal values nothing but a rounding below zero may be left.
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(mean_ptr + program, mean + correction)
    tl.store(rstd_ptr + program, _reciprocal_root(variance + tl.full((), EPS, ACC)))


@triton.jit
def _of_channels(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channels, ACC: tl.constexpr, SIZE: tl.constexpr
):
    """By channel of a tile: its group's number among those of all samples, mean, rstd, weight * rstd, and bias."""
    mask = channel < channels
    group = sample * (channels // SIZE) + channel // SIZE
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(ACC)
    return group, mean, rstd, weight * rstd, bias


@triton.jit
def _apply_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, pixels, channels, parts, channel_blocks,
    ACC: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The activation of (x - mean) * rstd * weight + bias, rounded once."""
    sample, _, channel, offsets, mask, _ = _tile(
        pixels, channels, parts, channel_blocks, CHANNELS_LAST, EVEN, PIXELS, CHANNELS
    )
    _, mean, _, scale, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channels, ACC, SIZE
    )
    # Not x * scale + (bias - mean * scale): of x near 1e4 that would leave a rounding of mean * scale.
    y = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _through_activation(grad_y, centred, scale, bias, SILU: tl.constexpr):
    """The gradient of z = centred * scale + bias: grad_y * s * (1 + z * (1 - s)) where y = silu(z), s = sigmoid(z)."""
    if SILU:
        z = centred * scale + bias
        s = tl.sigmoid(z)
        grad_y = grad_y * (s * (1.0 + z * (1.0 - s)))
    return grad_y


@triton.jit
def _sums_kernel(
    grad_y_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sum_ptr, product_ptr,
    pixels, channels, parts, channel_blocks,
    ACC: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of grad_z and of grad_z * n over a tile's pixels, by channel."""
    sample, part, channel, offsets, mask, _ = _tile(
        pixels, channels, parts, channel_blocks, CHANNELS_LAST, EVEN, PIXELS, CHANNELS
    )
    _, mean, rstd, scale, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channels, ACC, SIZE
    )
    grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
    if not EVEN:
        # Outside of the mask grad_y is 0 and so is grad_z, unless -mean is far enough from 0 to make an infinity of z.
        centred = tl.where(mask, centred, 0.0)
    grad_z = _through_activation(grad_y, centred, scale[None, :], bias[None, :], SILU)
    to = (sample.to(tl.int64) * parts + part) * channels + channel
    tl.store(sum_ptr + to, tl.sum(grad_z, axis=0), mask=channel < channels)
    tl.store(product_ptr + to, tl.sum(grad_z * centred, axis=0) * rstd, mask=channel < channels)


@triton.jit
def _sums_finish_kernel(
    part_sum_ptr, part_product_ptr, weight_ptr, sum_ptr, product_ptr, group_sum_ptr, group_product_ptr,
    pixels, channels, parts,
    ACC: tl.constexpr, KEEP_CHANNELS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one group: by channel the sums over all tiles; by group the means of grad_n and of grad_n * n."""
    program = tl.program_id(0)
    groups = channels // SIZE
    sample, first = program // groups, (program % groups) * SIZE
    column = tl.arange(0, COLUMNS)
    base = sample.to(tl.int64) * parts * channels + first
    sums, products = tl.zeros((PARTS, COLUMNS), ACC), tl.zeros((PARTS, COLUMNS), ACC)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < SIZE)[None, :]
        at = base + part.to(tl.int64)[:, None] * channels + column[None, :]
        sums += tl.load(part_sum_ptr + at, mask=mask, other=0.0)
        products += tl.load(part_product_ptr + at, mask=mask, other=0.0)
    by_channel, by_product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    if KEEP_CHANNELS:
        to = sample.to(tl.int64) * channels + first + column
        tl.store(sum_ptr + to, by_channel, mask=column < SIZE)
        tl.store(product_ptr + to, by_product, mask=column < SIZE)
    weight = tl.load(weight_ptr + first + column, mask=column < SIZE, other=0.0).to(ACC)
    size = tl.full((), pixels, ACC) * SIZE
    tl.store(group_sum_ptr + program, tl.sum(by_channel * weight, axis=0) / size)
    tl.store(group_product_ptr + program, tl.sum(by_product * weight, axis=0) / size)


@triton.jit(do_not_specialize=["batch"])
def _affine_kernel(
    sum_ptr, product_ptr, grad_weight_ptr, grad_bias_ptr, batch, channels, ACC: tl.constexpr, CHANNELS: tl.constexpr
):
    """Gradients of weight and bias: what the samples say, added in their order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    grad_weight, grad_bias = tl.zeros((CHANNELS,), ACC), tl.zeros((CHANNELS,), ACC)
    for sample in range(0, batch):
        at = tl.full((), sample, tl.int64) * channels + channel
        grad_bias += tl.load(sum_ptr + at, mask=mask, other=0.0)
        grad_weight += tl.load(product_ptr + at, mask=mask, other=0.0)
    tl.store(grad_weight_ptr + channel, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_bias_ptr + channel, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_x_kernel(
    grad_y_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group_sum_ptr, group_product_ptr, grad_x_ptr,
    pixels, channels, parts, channel_blocks,
    ACC: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, rstd * (grad_n - mean of grad_n - n * mean of grad_n * n) with grad_n = weight * grad_z."""
    sample, _, channel, offsets, mask, _ = _tile(
        pixels, channels, parts, channel_blocks, CHANNELS_LAST, EVEN, PIXELS, CHANNELS
    )
    group, mean, rstd, scale, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, channel, channels, ACC, SIZE
    )
    mean_grad = tl.load(group_sum_ptr + group, mask=channel < channels, other=0.0)
    mean_product = tl.load(group_product_ptr + group, mask=channel < channels, other=0.0)
    grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
    grad_z = _through_activation(grad_y, centred, scale[None, :], bias[None, :], SILU)
    grad_x = scale[None, :] * grad_z - ((rstd * mean_grad)[None, :] + centred * (rstd * rstd * mean_product)[None, :])
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches.

    Args:
        x: [B, C, H, W] with at least one element; channels_last or contiguous is read as it lies, another layout is
            copied first.
        weight: [C].
        bias: [C].
        num_groups: G, a divisor of C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        y [B, C, H, W] in the dtype and layout of ``x``, and mean and 1 / sqrt(variance + eps) [B, G] in the dtype of
        the sums.
    """
    x, weight, bias = x.contiguous(memory_format=memory_layout(x)), weight.contiguous(), bias.contiguous()
    plan = _Plan(x, num_groups)
    part_mean, part_square = plan.empty("BPC"), plan.empty("BPC")
    mean, rstd = plan.empty("BG"), plan.empty("BG")
    y = torch.empty_like(x)
    _statistics_kernel[plan.grid](x, part_mean, part_square, *plan.numbers, **plan.tile)
    _statistics_finish_kernel[plan.groups](
        part_mean, part_square, mean, rstd, *plan.numbers[:3], EPS=eps, PIXELS=plan.tile["PIXELS"], **plan.finish
    )
    _apply_kernel[plan.grid](x, mean, rstd, weight, bias, y, *plan.numbers, SILU=silu, SIZE=plan.size, **plan.tile)
    return y, mean, rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    silu: bool, need_x: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Three launches for the gradient of ``x`` alone, one more for those of ``weight`` and ``bias``.

    Args:
        grad_y: [B, C, H, W] in the dtype of ``x``; copied first unless laid out as ``x``.
        x: as in ``forward``, as are ``weight``, ``bias`` and ``silu``.
        mean: [B, G], of ``forward``, as is ``rstd``.
        rstd: [B, G].
        weight: [C].
        bias: [C].
        silu: whether SiLU followed.
        need_x: whether the gradient of ``x`` is wanted.
        need_affine: whether those of ``weight`` and ``bias`` are.

    Returns:
        The gradients of ``x``, in its layout, of ``weight`` and of ``bias``; what is not wanted is empty.
    """
    layout = memory_layout(x)
    x, grad_y = x.contiguous(memory_format=layout), grad_y.contiguous(memory_format=layout)
    weight, bias = weight.contiguous(), bias.contiguous()
    plan = _Plan(x, mean.shape[1])
    given = (grad_y, x, mean, rstd, weight, bias)
    part_sum, part_product = plan.empty("BPC"), plan.empty("BPC")
    group_sum, group_product = plan.empty("BG"), plan.empty("BG")
    sums, products = (plan.empty("BC"), plan.empty("BC")) if need_affine else (part_sum, part_product)
    _sums_kernel[plan.grid](
        *given, part_sum, part_product, *plan.numbers, SILU=silu, SIZE=plan.size, **plan.tile
    )  # fmt: skip
    _sums_finish_kernel[plan.groups](
        part_sum, part_product, weight, sums, products, group_sum, group_product, *plan.numbers[:3],
        KEEP_CHANNELS=need_affine, **plan.finish,
    )  # fmt: skip
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    if need_x:
        _grad_x_kernel[plan.grid](
            *given, group_sum, group_product, grad_x, *plan.numbers, SILU=silu, SIZE=plan.size, **plan.tile
        )
    if not need_affine:
        return grad_x, weight.new_empty(0), bias.new_empty(0)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    _affine_kernel[(triton.cdiv(len(weight), 128),)](
        sums, products, grad_weight, grad_bias, len(x), len(weight), ACC=plan.tile["ACC"], CHANNELS=128, num_warps=4
    )
    return grad_x, grad_weight, grad_bias


class _Plan:
    """Grids, numbers and constants of the launches for one dense input, and fresh memory between them."""

    def __init__(self, x: Tensor, num_groups: int) -> None:
        batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        channels_last = memory_layout(x) == torch.channels_last
        tile = _tile_shape(pixels, channels, x.dtype, channels_last)
        parts, channel_blocks = triton.cdiv(pixels, tile[0]), triton.cdiv(channels, tile[1])
        self.size = channels // num_groups
        self.grid, self.groups = (batch * parts * channel_blocks,), (batch * num_groups,)
        self.numbers = (pixels, channels, parts, channel_blocks)
        self.acc, acc = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
        self.tile: dict[str, Any] = {
            "ACC": acc, "CHANNELS_LAST": channels_last, "EVEN": pixels % tile[0] == 0,
            "PIXELS": tile[0], "CHANNELS": tile[1], "num_warps": 4,
        }  # fmt: skip
        columns = triton.next_power_of_2(self.size)
        rows = max(1, min(triton.next_power_of_2(parts), _FINISH_TILE // columns))
        self.finish: dict[str, Any] = {
            "ACC": acc, "SIZE": self.size, "PARTS": rows, "COLUMNS": columns, "num_warps": 8
        }  # fmt: skip
        self._sizes = {"B": batch, "P": parts, "C": channels, "G": num_groups}
        self._device = x.device

    def empty(self, shape: str) -> Tensor:
        """Fresh memory in the dtype of the sums; ``BPC`` stands for [B, P, C]."""
        return torch.empty([self._sizes[letter] for letter in shape], dtype=self.acc, device=self._device)


def _tile_shape(pixels: int, channels: int, dtype: torch.dtype, channels_last: bool) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two."""
    values = {torch.float64: _TILE_FLOAT64, torch.float32: _TILE_FLOAT32}.get(dtype, _TILE)
    if pixels * channels < _SMALL:
        values = min(values, _TILE_SMALL)
    all_pixels, all_channels = triton.next_power_of_2(pixels), triton.next_power_of_2(channels)
    if channels_last:
        across = min(all_channels, _CHANNELS_LAST_CHANNELS)
        return min(all_pixels, values // across), across
    along = min(all_pixels, values // _CONTIGUOUS_CHANNELS)
    return along, min(all_channels, values // along)
