"""Triton form of 8-bit AdamW: one launch for the norm of the gradient, one that updates everything.

Shapes: Q elements with 8-bit moments and F with float32 moments, N = Q + F, Q and F multiples of 4,096.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from craft_kernels.adamw8bit import naive
from craft_kernels.adamw8bit.state import BLOCK, TINY
from craft_kernels.noise_and_target.kernel import philox

# Partial sums of squares. Every program of the update adds them up by itself, 2 KiB from the L2 cache and 16 bytes a
# thread, which costs less than a launch; 512 programs of 256 threads are 31 warps on each of an H100's 132 processors.
_PARTS = 512
_NORM_TILE = 4096
# Elements of one update program: eight blocks, 16 elements a thread, so that a thread's codes are one 16-byte access,
# and the largest magnitude of a block is found by 16 threads of one warp, without shared memory.
_TILE = 2048
# decay, rate, floor, count: see _scalars.
_SCALARS = 4
_EXPONENT, _KEPT = tl.constexpr(naive.EXPONENT), tl.constexpr(naive.KEPT)


@triton.jit
def _power(base, exponent):
    """base^exponent by squaring, in the dtype of base."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _scalars(
    scalar_ptr, lr_ptr, step_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
):  # fmt: skip
    """What the next update multiplies with. In float64: 1 - 0.999 in float32 is wrong in its fifth digit."""
    lr = tl.load(lr_ptr)
    count = tl.load(step_ptr) + 1
    correction1 = 1.0 - _power(tl.full((), BETA1, tl.float64), count)
    correction2 = tl.sqrt(1.0 - _power(tl.full((), BETA2, tl.float64), count))
    tl.store(scalar_ptr, (1.0 - lr * tl.full((), WEIGHT_DECAY, tl.float64)).to(tl.float32))
    tl.store(scalar_ptr + 1, (-lr * correction2 / correction1).to(tl.float32))
    tl.store(scalar_ptr + 2, (correction2 * tl.full((), EPS, tl.float64)).to(tl.float32))
    # Bits, not a number: the update counts the step on, so its programs must not read the counter themselves.
    tl.store(scalar_ptr + 3, count.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["tiles"])
def _norm_kernel(
    grad_ptr, partial_ptr, scalar_ptr, lr_ptr, step_ptr, tiles,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum of squares of every num_programs-th tile of the gradient; program 0 also prepares the update's scalars."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    at = grad_ptr + program.to(tl.int64) * TILE + tl.arange(0, TILE)
    stride = programs.to(tl.int64) * TILE
    squares = tl.zeros((TILE,), tl.float32)
    for _ in range(program, tiles, programs):
        grad = tl.load(at).to(tl.float32)
        squares += grad * grad
        at += stride
    tl.store(partial_ptr + program, tl.sum(squares, axis=0))
    if program == 0:
        _scalars(scalar_ptr, lr_ptr, step_ptr, BETA1, BETA2, EPS, WEIGHT_DECAY)


@triton.jit
def _position(magnitude):
    """Where a magnitude in [0, 1] lies among the non-negative signed codes, counted from zero's: to about 0.3.

    Decade d is a line, 2^d * (8/9 + x * 10^(6-d) / 0.9); each is less steep than the one before, so that the smallest
    of the seven is the right one: 13 instructions without a branch or a load.
    """
    position = tl.fma(magnitude, 1111111.1111111112, 0.8888888888888888)
    position = tl.minimum(position, tl.fma(magnitude, 222222.22222222222, 1.7777777777777777))
    position = tl.minimum(position, tl.fma(magnitude, 44444.444444444445, 3.5555555555555554))
    position = tl.minimum(position, tl.fma(magnitude, 8888.8888888888889, 7.1111111111111107))
    position = tl.minimum(position, tl.fma(magnitude, 1777.7777777777778, 14.222222222222221))
    position = tl.minimum(position, tl.fma(magnitude, 355.55555555555554, 28.444444444444443))
    return tl.minimum(position, tl.fma(magnitude, 71.111111111111114, 56.888888888888886))


@triton.jit
def _rounded(position):
    """The nearest integer of a number in [0, 255]: adding 1.5 * 2^23 leaves it in the low bits, in one instruction.

    The eight bits kept also hold every look-up inside the tables, whatever a damaged state holds.
    """
    return (position + 12582912.0).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _nearest_signed(scaled, edge_ptr):
    """The code of each number in [-1, 1], exactly as a search of all edges finds it.

    The rounded position says which edge is close by, the edge itself decides. Between the last code of a decade and
    the first of the next the true edge lies 0.2 beside the rounded one, at 0 and 1 less than that, all nearer than 0.5.
    """
    near = _rounded(_position(tl.abs(scaled)))
    edge = tl.maximum(tl.where(scaled < 0.0, 127 - near, 126 + near), 0)
    return edge + (scaled > tl.load(edge_ptr + edge)).to(tl.int32)


@triton.jit
def _nearest_unsigned(scaled, edge_ptr):
    """The same for numbers in [0, 1] and the unsigned code, which has two steps where the signed one has one."""
    edge = _rounded(tl.fma(_position(scaled), 2.0, -1.0)) - 1
    return edge + (scaled > tl.load(edge_ptr + edge)).to(tl.int32)


@triton.jit
def _scale(moment, TINY: tl.constexpr):
    """Largest magnitude of each row, 0 where 1/it would be infinite, and what brings the row into [-1, 1]."""
    absmax = tl.max(tl.abs(moment), axis=1)
    absmax = tl.where(absmax >= TINY, absmax, 0.0)
    return absmax, tl.div_rn(1.0, tl.where(absmax > 0.0, absmax, 1.0))


@triton.jit
def _stepped(param, grad, old1, old2, scalar_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """New parameter and moments, in float32."""
    new1 = old1 * BETA1 + grad * (1.0 - BETA1)
    new2 = old2 * BETA2 + grad * (1.0 - BETA2) * grad
    decay, rate, floor = tl.load(scalar_ptr), tl.load(scalar_ptr + 1), tl.load(scalar_ptr + 2)
    return param * decay + rate * (new1 / (tl.sqrt(new2) + floor)), new1, new2


@triton.jit
def _stochastic(value, first, count, seed, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers that bfloat16 holds, above or below each float32 value, at random: naive.stochastic and random_bits.

    A Philox block serves eight elements, 16 bits each: with four of 32 bits it would cost twice the instructions.
    """
    inside = tl.arange(0, ROWS)[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    groups = ((first // 8) + inside).to(tl.uint32)
    zero = tl.zeros((), tl.uint32)
    r0, r1, r2, r3 = philox(groups, count, zero, zero, seed)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    bits = tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
    raw = value.to(tl.int32, bitcast=True)
    up = raw + bits
    cut = tl.where((up & _EXPONENT) == _EXPONENT, raw, up) & _KEPT
    return tl.where((raw & _EXPONENT) == _EXPONENT, value, cut.to(tl.float32, bitcast=True))


@triton.jit
def _store_param(
    param_ptr, at, offsets, param, scalar_ptr, seed_ptr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STOCHASTIC:
        count = tl.load(scalar_ptr + 3).to(tl.uint32, bitcast=True)
        param = _stochastic(param, at, count, tl.load(seed_ptr).to(tl.uint64), ROWS, BLOCK)
    tl.store(param_ptr + at + offsets, param.to(param_ptr.dtype.element_ty))


@triton.jit
def _clip(norm_ptr, step_ptr, partial_ptr, parts, max_norm, PARTS: tl.constexpr):
    """What the gradient is multiplied by, as torch.nn.utils.clip_grad_norm_ has it, and whether its norm is finite.

    Program 0 also counts the step. Its scalars were prepared from the old count by the launch before, so nobody else
    reads the counter here, and a replayed CUDA graph counts on by itself.
    """
    part = tl.arange(0, PARTS)
    norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + part, mask=part < parts, other=0.0), axis=0))
    finite = norm < float("inf")
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, norm)
        tl.store(step_ptr, tl.load(step_ptr) + finite.to(tl.int64))
    return tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0), finite


@triton.jit(do_not_specialize=["tiles_8bit", "parts"])
def _update_kernel(
    param_ptr, grad_ptr, code1_ptr, code2_ptr, absmax1_ptr, absmax2_ptr, moment1_ptr, moment2_ptr,
    step_ptr, norm_ptr, table_ptr, partial_ptr, scalar_ptr, seed_ptr, tiles_8bit, parts, max_norm,
    BETA1: tl.constexpr, BETA2: tl.constexpr, TINY: tl.constexpr,
    STOCHASTIC: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile: clip, decode, update, encode; nothing at all where the norm is not finite."""
    program = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = program.to(tl.int64) * (ROWS * BLOCK)
    param = tl.load(param_ptr + at + offsets).to(tl.float32)
    grad = tl.load(grad_ptr + at + offsets).to(tl.float32)
    # All reads of a branch come before its clip: they are on their way while the norm is added up.
    if program < tiles_8bit:
        blocks = program.to(tl.int64) * ROWS + rows
        code1 = tl.load(code1_ptr + at + offsets).to(tl.int32)
        code2 = tl.load(code2_ptr + at + offsets).to(tl.int32)
        absmax1 = tl.load(absmax1_ptr + blocks)
        absmax2 = tl.load(absmax2_ptr + blocks)
        factor, finite = _clip(norm_ptr, step_ptr, partial_ptr, parts, max_norm, PARTS)
        if finite:
            old1 = tl.load(table_ptr + code1) * absmax1[:, None]
            old2 = tl.load(table_ptr + 256 + code2) * absmax2[:, None]
            param, new1, new2 = _stepped(param, grad * factor, old1, old2, scalar_ptr, BETA1, BETA2)
            absmax1, factor1 = _scale(new1, TINY)
            absmax2, factor2 = _scale(new2, TINY)
            code1 = _nearest_signed(new1 * factor1[:, None], table_ptr + 512)
            code2 = _nearest_unsigned(new2 * factor2[:, None], table_ptr + 768)
            code1 = tl.where((absmax1 > 0.0)[:, None], code1, 0)
            tl.store(code1_ptr + at + offsets, code1.to(tl.uint8))
            tl.store(code2_ptr + at + offsets, code2.to(tl.uint8))
            tl.store(absmax1_ptr + blocks, absmax1)
            tl.store(absmax2_ptr + blocks, absmax2)
            _store_param(param_ptr, at, offsets, param, scalar_ptr, seed_ptr, STOCHASTIC, ROWS, BLOCK)
    else:
        small = at - tiles_8bit.to(tl.int64) * (ROWS * BLOCK)
        old1 = tl.load(moment1_ptr + small + offsets)
        old2 = tl.load(moment2_ptr + small + offsets)
        factor, finite = _clip(norm_ptr, step_ptr, partial_ptr, parts, max_norm, PARTS)
        if finite:
            param, new1, new2 = _stepped(param, grad * factor, old1, old2, scalar_ptr, BETA1, BETA2)
            tl.store(moment1_ptr + small + offsets, new1)
            tl.store(moment2_ptr + small + offsets, new2)
            _store_param(param_ptr, at, offsets, param, scalar_ptr, seed_ptr, STOCHASTIC, ROWS, BLOCK)


def update(
    params: Tensor,
    grads: Tensor,
    code1: Tensor,
    code2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    step: Tensor,
    grad_norm: Tensor,
    tables: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    rounding_seed: Tensor | None = None,
) -> None:
    """Two launches, in place; nothing waits for the device, and a CUDA graph can hold them.

    Args:
        params: [N], float32, bfloat16 or float16, contiguous.
        grads: [N], likewise.
        code1: uint8 [Q].
        code2: uint8 [Q].
        absmax1: float32 [Q / 256].
        absmax2: float32 [Q / 256].
        moment1: float32 [F].
        moment2: float32 [F].
        step: int64 [].
        grad_norm: float32 [].
        tables: float32 [4, 256], from ``code_tables``.
        lr: float64 [].
        beta1: a constant of the compiled kernel, as are the next three.
        beta2: as above.
        eps: as above.
        weight_decay: as above.
        max_norm: infinity for no clip.
        rounding_seed: int64 [], for bfloat16 parameters rounded at random; None: to nearest.
    """
    tiles = params.numel() // _NORM_TILE
    parts = min(tiles, _PARTS)
    work = torch.empty(_PARTS + _SCALARS, dtype=torch.float32, device=params.device)
    partial, scalars = work[:_PARTS], work[_PARTS:]
    betas = {"BETA1": beta1, "BETA2": beta2}
    _norm_kernel[(parts,)](
        grads, partial, scalars, lr, step, tiles,
        **betas, EPS=eps, WEIGHT_DECAY=weight_decay, TILE=_NORM_TILE, num_warps=8,
    )  # fmt: skip
    # Without fused multiply-adds the moments and codes equal those of the torch form to the bit, on every device.
    _update_kernel[(params.numel() // _TILE,)](
        params, grads, code1, code2, absmax1, absmax2, moment1, moment2,
        step, grad_norm, tables, partial, scalars, step if rounding_seed is None else rounding_seed,
        code1.numel() // _TILE, parts, max_norm,
        **betas, TINY=TINY, STOCHASTIC=rounding_seed is not None,
        PARTS=_PARTS, ROWS=_TILE // BLOCK, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
