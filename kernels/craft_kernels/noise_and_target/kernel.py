"""Triton form of noise and target: latents in, noised latents and target out, noise made on the way in registers.

Bit-equal to ``naive.py``: compiled without fused multiply-adds, and with nothing but operations that round in one way.

Shapes: B samples of N elements each, cut into parts of 4 * ``_GROUPS`` elements, T training timesteps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from craft_kernels.noise_and_target import naive

# Groups of four normals a program, four a thread: 16 elements a thread, 16-byte accesses in half precision too, and the
# division that finds the sample spread thin (62 instructions an element in half precision; with 256 groups 12 more).
_GROUPS = 512
_ROUNDS = tl.constexpr(naive.ROUNDS)
_ROUND_A, _ROUND_B = tl.constexpr(naive.ROUND_A), tl.constexpr(naive.ROUND_B)
_KEY_A, _KEY_B = tl.constexpr(naive.KEY_A), tl.constexpr(naive.KEY_B)
_L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(value) for value in naive.LOG)
_S1, _S2, _S3 = (tl.constexpr(value) for value in naive.SIN)
_C1, _C2, _C3 = (tl.constexpr(value) for value in naive.COS)
_MINUS_TWO_LN2, _RADIANS = tl.constexpr(naive.MINUS_TWO_LN2), tl.constexpr(naive.RADIANS)
_SQRT_HALF_BITS = tl.constexpr(naive.SQRT_HALF_BITS)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four random words for each counter, all uint32.

    Not tl.philox: whole 64-bit products are one instruction, where its two halves are two (44 of 1,044 here), and these
    bits shall not change with a version of Triton.
    """
    for i in tl.static_range(_ROUNDS):
        # Added in 64 bits and cut, since Triton refuses constants that do not fit a dtype.
        k0 = (seed + i * _KEY_A).to(tl.uint32)
        k1 = ((seed >> 32) + i * _KEY_B).to(tl.uint32)
        p0, p1 = c0.to(tl.uint64) * _ROUND_A, c2.to(tl.uint64) * _ROUND_B
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _box_muller(first, second):
    """Two normals from two uint32 words."""
    u = first.to(tl.float32) * (2.0**-32) + (2.0**-33)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    log = ((((((_L7 * f + _L6) * f + _L5) * f + _L4) * f + _L3) * f + _L2) * f + _L1) * f - 2.0
    radius = tl.sqrt_rn(exponent.to(tl.float32) * _MINUS_TWO_LN2 + f * log)

    quarter = (second + 0x20000000) >> 30
    t = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _RADIANS
    square = t * t
    sine = t * (((_S3 * square + _S2) * square + _S1) * square + 1.0)
    cosine = ((_C3 * square + _C2) * square + _C1) * square + 1.0
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    y = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return radius * x.to(tl.float32, bitcast=True), radius * y.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "step"])
def _noise_and_target_kernel(
    latents_ptr, id_ptr, alphas_ptr, timestep_ptr, step_ptr, noised_ptr, target_ptr, seed, step, sample_size, parts,
    table_size, ACC: tl.constexpr, V_PREDICTION: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Noise 4 * GROUPS elements of a sample."""
    program = tl.program_id(0)
    sample = program // parts
    part = (program % parts).to(tl.int64)

    timestep = tl.load(timestep_ptr + sample)
    known = (timestep >= 0) & (timestep < table_size)
    # A timestep outside of the table gives NaN, which no training step accepts, rather than a stray read.
    alpha = tl.load(alphas_ptr + timestep, mask=known, other=float("nan")).to(tl.float32)
    signal = tl.sqrt_rn(alpha).to(ACC)
    sigma = tl.sqrt_rn(1.0 - alpha).to(ACC)

    now = tl.load(step_ptr).to(tl.uint32) if STEP_ON_DEVICE else tl.full((), step, tl.uint32)
    id = tl.load(id_ptr + sample)
    groups = (part * GROUPS + tl.arange(0, GROUPS)).to(tl.uint32)
    key = tl.full((), seed, tl.uint64)
    r0, r1, r2, r3 = philox(groups, now, id.to(tl.uint32), (id >> 32).to(tl.uint32), key)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3)).to(ACC)

    start = part * (4 * GROUPS)
    base = sample.to(tl.int64) * sample_size + start
    offsets = tl.arange(0, 4 * GROUPS)
    mask = offsets < tl.minimum(sample_size - start, 4 * GROUPS).to(tl.int32)
    x_0 = tl.load(latents_ptr + base + offsets, mask=mask, other=0.0).to(ACC)
    noised = signal * x_0 + sigma * noise
    tl.store(noised_ptr + base + offsets, noised.to(noised_ptr.dtype.element_ty), mask=mask)
    target = signal * noise - sigma * x_0 if V_PREDICTION else noise
    tl.store(target_ptr + base + offsets, target.to(target_ptr.dtype.element_ty), mask=mask)


def forward(
    latents: Tensor,
    sample_ids: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    seed: int,
    step: int,
    step_on_device: Tensor | None,
    v_prediction: bool,
) -> tuple[Tensor, Tensor]:
    """One launch.

    Args:
        latents: [B, C, H, W] with at least one element; a layout other than contiguous is copied first.
        sample_ids: int64 [B].
        alphas_cumprod: [T].
        timesteps: int64 [B].
        seed: in [0, 2^63).
        step: in [0, 2^32); not read when ``step_on_device`` is given.
        step_on_device: int64 [] or None.
        v_prediction: whether the target is v.

    Returns:
        Noised latents and target, [B, C, H, W], contiguous, in the dtype of ``latents``.
    """
    x_0 = latents.contiguous()
    noised, target = torch.empty_like(x_0), torch.empty_like(x_0)
    size = x_0[0].numel()
    parts = triton.cdiv(size, 4 * _GROUPS)
    _noise_and_target_kernel[(len(x_0) * parts,)](
        x_0, sample_ids.contiguous(), alphas_cumprod.contiguous(), timesteps.contiguous(),
        sample_ids if step_on_device is None else step_on_device, noised, target, seed, step, size, parts,
        len(alphas_cumprod), ACC=tl.float64 if x_0.dtype == torch.float64 else tl.float32, V_PREDICTION=v_prediction,
        STEP_ON_DEVICE=step_on_device is not None, GROUPS=_GROUPS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return noised, target
