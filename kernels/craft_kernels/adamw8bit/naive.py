"""8-bit AdamW in plain PyTorch: the truth that the Triton form is held against, bit for bit where no clip is at work.

Shapes: Q elements with 8-bit moments and F with float32 moments, N = Q + F, Q and F multiples of 4,096.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_kernels.adamw8bit.state import BLOCK, SECTION, TINY


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
) -> None:
    """One update in place; see ``craft_kernels.adamw8bit.adamw8bit_``, and ``AdamW8bitState`` for the tensors.

    Every product and every sum is rounded by itself: ``add(alpha=)``, ``addcmul`` and ``addcdiv`` would fuse them on
    some devices and not on others. Nothing waits for the device. Arguments are not checked here.
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

    def put(target: Tensor, value: Tensor) -> None:
        target.copy_(torch.where(finite, value.to(target.dtype), target))

    put(params, new_params)
    put(moment1, new1[size:])
    put(moment2, new2[size:])
    for code, absmax, moment, edges in (
        (code1, absmax1, new1[:size], tables[2]),
        (code2, absmax2, new2[:size], tables[3]),
    ):
        new_code, new_absmax = _encode(moment, edges)
        put(code, new_code)
        put(absmax, new_absmax)
    step.add_(finite)
    grad_norm.copy_(norm)


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
