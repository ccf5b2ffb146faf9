"""8-bit AdamW in plain PyTorch: the truth that the Triton form is held against, bit for bit where no clip is at work.

Shapes: Q elements with 8-bit moments and F with float32 moments, N = Q + F, Q and F multiples of 4,096.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_kernels.adamw8bit.state import BLOCK, SECTION, TINY
from craft_kernels.noise_and_target.naive import philox

_WORD = 0xFFFFFFFF
# The exponent of a float32, all ones in infinities and NaN; the half that bfloat16 keeps, as a signed number.
EXPONENT, KEPT = 0x7F800000, -0x10000


def adamw8bit_(
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
    """One update in place; see ``craft_kernels.adamw8bit.adamw8bit_``, and ``AdamW8bitState`` for the tensors.

    Every product and every sum is rounded by itself: ``add(alpha=)``, ``addcmul`` and ``addcdiv`` would fuse them on
    some devices and not on others. Everything is computed before anything is written, so that running out of memory
    leaves all as it was. Nothing waits for the device. Arguments are not checked here.
    """
    size = code1.numel()
    grad = grads.float()
    norm = grad.view(-1, SECTION).square().sum(dim=1).sum().sqrt()
    finite = norm.isfinite()
    grad = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    decay, rate, floor = _scalars(step, lr, beta1, beta2, eps, weight_decay)
    old1 = torch.cat([_decode(code1, absmax1, tables[0]), moment1])
    old2 = torch.cat([_decode(code2, absmax2, tables[1]), moment2])
    new1 = old1 * beta1 + grad * (1.0 - beta1)
    new2 = old2 * beta2 + grad * (1.0 - beta2) * grad
    new_params = params.float() * decay + rate * (new1 / (new2.sqrt() + floor))
    if rounding_seed is not None:
        new_params = stochastic(new_params, random_bits(len(params), rounding_seed, step + 1))
    new_code1, new_absmax1 = _encode(new1[:size], tables[2])
    new_code2, new_absmax2 = _encode(new2[:size], tables[3])
    pairs = (
        (params, new_params), (moment1, new1[size:]), (moment2, new2[size:]),
        (code1, new_code1), (code2, new_code2), (absmax1, new_absmax1), (absmax2, new_absmax2),
    )  # fmt: skip
    written = [(target, torch.where(finite, value.to(target.dtype), target)) for target, value in pairs]
    for target, value in written:
        target.copy_(value)
    step.add_(finite)
    grad_norm.copy_(norm)


def random_bits(size: int, seed: Tensor, step: Tensor) -> Tensor:
    """16 random bits for each element, a function of (seed, step, element).

    Element ``8 g + 2 k + h`` has the low (``h`` = 0) or high half of word ``k`` of the Philox4x32-10 block of counter
    ``(g, step, 0, 0)`` under key ``(seed, seed >> 32)``.

    Args:
        size: a multiple of 8, below 2^35.
        seed: int64 [], any value.
        step: int64 [], the number of the update, from 1.

    Returns:
        int32 [size], in [0, 2^16).
    """
    groups = torch.arange(size // 8, device=seed.device)
    zeros = torch.zeros_like(groups)
    counter = (groups & _WORD, zeros + (step & _WORD), zeros, zeros)
    words = torch.stack(philox(counter, seed), dim=-1)  # type: ignore[arg-type]  # a tensor works as well
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten().int()


def stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random: up with the probability of the distance from below.

    The value's 32 bits are its magnitude among the float32 numbers, beside a sign; bfloat16 keeps the upper 16. Adding
    16 uniform random bits carries into them with the probability of what is cut, so the mean is the value itself, for
    both signs alike. What bfloat16 holds stays as it is; so do infinities and NaN, and no finite value becomes
    infinite: above bfloat16's largest number there is none to go up to.

    Args:
        value: float32.
        bits: int32 in [0, 2^16), as many.

    Returns:
        bfloat16, the shape of ``value``.
    """
    raw = value.view(torch.int32)
    up = raw + bits
    cut = torch.where((up & EXPONENT) == EXPONENT, raw, up) & KEPT
    special = (raw & EXPONENT) == EXPONENT
    return torch.where(special, value, cut.view(torch.float32)).to(torch.bfloat16)


def _scalars(
    step: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the parameters, the quotient and the root are multiplied by or added to, in float64, rounded once."""
    count = (step + 1).double()
    correction1 = 1.0 - torch.pow(beta1, count)
    correction2 = torch.sqrt(1.0 - torch.pow(beta2, count))
    decay, rate, floor = 1.0 - lr * weight_decay, -lr * correction2 / correction1, eps * correction2
    return decay.float(), rate.float(), floor.float()


def _decode(code: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """The float32 [Q] that codes and scales stand for."""
    return (values.index_select(0, code.int()).view(-1, BLOCK) * absmax[:, None]).flatten()


def _encode(moment: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes [Q], and scales [Q / 256] that are the largest magnitudes; all zero in a block of zeros."""
    blocks = moment.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax >= TINY, absmax, 0.0)
    there = (absmax > 0)[:, None]
    scaled = blocks * (1.0 / torch.where(absmax > 0, absmax, 1.0))[:, None]
    code = torch.bucketize(scaled, edges[:-1], out_int32=True)
    return torch.where(there, code, 0).flatten(), absmax
