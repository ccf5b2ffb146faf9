"""Counter-based noise, noised latents and the training target in plain PyTorch: the truth of this op, to the bit.

Every floating-point step is one that IEEE 754 rounds in one way only (add, multiply, a square root, a conversion), and
every step is rounded by itself. So the CPU, the GPU and Triton agree to the bit, which library functions for log, sin
and cos would not (CUDA programming guide, "Mathematical Functions": 1 to 2 ulp).

Shapes: B samples, C channels, H x W latent height and width, N = C H W elements of a sample, T training timesteps.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]

_MASK = 0xFFFFFFFF
# Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# Minimax fits, with the errors of float32's own rounding or less: -2 ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]
# (4e-7), sin(t) / t (4e-9) and cos(t) (3e-8) on [-pi/4, pi/4], in t^2. Before them come -2, 1 and 1.
LOG = (1.00000576, -0.66670182, 0.49946772, -0.39787992, 0.34403118, -0.32557982, 0.2069598)
SIN = (-0.16666655, 0.00833218, -0.00019517)
COS = (-0.49999895, 0.04165629, -0.00135978)
MINUS_TWO_LN2 = -2 * math.log(2)
RADIANS = math.pi / 2**31
SQRT_HALF_BITS = 0x3F3504F3  # the bits of float32(sqrt(1/2))


def noise_and_target(
    latents: Tensor,
    sample_ids: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    seed: int,
    step: int | Tensor,
    prediction_type: PredictionType = "epsilon",
) -> tuple[Tensor, Tensor]:
    """Noised latents and target; see ``craft_kernels.noise_and_target.noise_and_target``.

    Arguments are not checked here.
    """
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    noise = counter_noise(sample_ids, latents.shape[1:], seed=seed, step=step).to(dtype)
    signal, sigma = roots(alphas_cumprod, timesteps, dtype)
    x_0 = latents.to(dtype)
    noised = signal * x_0 + sigma * noise
    target = noise if prediction_type == "epsilon" else signal * noise - sigma * x_0
    return noised.to(latents.dtype), target.to(latents.dtype)


def roots(alphas_cumprod: Tensor, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``sqrt(a_t)`` and ``sqrt(1 - a_t)``, float32 values in ``dtype``, each [B, 1, 1, 1]."""
    a_t = alphas_cumprod.float()[timesteps].view(-1, 1, 1, 1)
    return _sqrt(a_t).to(dtype), _sqrt(1 - a_t).to(dtype)


def counter_noise(sample_ids: Tensor, shape: tuple[int, ...] | torch.Size, *, seed: int, step: int | Tensor) -> Tensor:
    """Standard normal noise as a function: the same (seed, sample id, step) gives the same bits on every device.

    Element ``4 g + k`` of a sample is the k-th of four Box-Muller normals from the Philox4x32-10 block of counter
    ``(g, step, id, id >> 32)`` under key ``(seed, seed >> 32)``. The largest value possible is 6.8.

    Args:
        sample_ids: int64 [B], any values.
        shape: of one sample; below 2^34 elements.
        seed: in [0, 2^63).
        step: in [0, 2^32), or that in an int64 tensor [].

    Returns:
        float32 [B, *shape] on the device of ``sample_ids``.
    """
    size = math.prod(shape)
    groups = torch.arange((size + 3) // 4, device=sample_ids.device).expand(len(sample_ids), -1)
    ids = sample_ids.view(-1, 1).expand_as(groups)
    steps = torch.zeros_like(groups) + step
    words = philox((groups & _MASK, steps & _MASK, ids & _MASK, (ids >> 32) & _MASK), seed)
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    return normals.flatten(1)[:, :size].reshape(len(sample_ids), *shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words in [0, 2^32) for each counter, all int64."""
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        k0, k1 = (seed + i * KEY_A) & _MASK, ((seed >> 32) + i * KEY_B) & _MASK
        (high0, low0), (high1, low1) = _product(c0, ROUND_A), _product(c2, ROUND_B)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two numbers below 2^32.

    By halves, so that nothing exceeds 2^49: a whole product can pass 2^63, which is undefined in the C++ that
    ``torch.compile`` makes, and was seen to come out wrong there.
    """
    upper = (word >> 16) * factor
    total = (word & 0xFFFF) * factor + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (total >> 32), total & _MASK


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words: radius ``sqrt(-2 ln u)`` at a uniform angle."""
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    radius = _sqrt(exponent.to(torch.float32) * MINUS_TWO_LN2 + f * _polynomial(-2.0, LOG, f))

    # The nearest quarter turn, and the rest as a signed 30-bit angle.
    quarter = ((second + 0x20000000) >> 30) & 3
    rest = (second - (quarter << 30)) & _MASK
    t = torch.where(rest >= 2**31, rest - 2**32, rest).to(torch.float32) * RADIANS
    square = t * t
    sine, cosine = t * _polynomial(1.0, SIN, square), _polynomial(1.0, COS, square)
    odd = (quarter & 1) == 1
    x, y = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    x = torch.where(((quarter + 1) & 2) == 2, -x, x)
    y = torch.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


def _polynomial(first: float, others: tuple[float, ...], x: Tensor) -> Tensor:
    """``first + c_1 x + c_2 x^2 + ...`` by Horner's rule, a multiplication and an addition a term."""
    value = torch.full_like(x, others[-1])
    for coefficient in (*reversed(others[:-1]), first):
        value = value * x + coefficient
    return value


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 root: float64's is, after rounding, whatever its last bit (53 >= 2 * 24 + 2 bits).

    ``torch.sqrt`` of float32 on a CPU was measured one bit off for some values.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)
