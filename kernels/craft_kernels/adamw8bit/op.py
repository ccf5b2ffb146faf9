"""8-bit AdamW over flat tensors as an op: checks, choice of form, registration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from craft_kernels.adamw8bit import naive
from craft_kernels.adamw8bit.state import BLOCK, SECTION, AdamW8bitState
from craft_kernels.checks import check_choice, check_tensor
from craft_kernels.dispatch import Form, Impl, choose, compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MUTATED = (
    "params", "code1", "code2", "absmax1", "absmax2", "moment1", "moment2", "step", "grad_norm",
)  # fmt: skip


@torch.no_grad()
def adamw8bit_(
    params: Tensor,
    grads: Tensor,
    state: AdamW8bitState,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_norm: float | None = None,
    rounding_seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """One step of AdamW (arXiv 1711.05101) with block-wise 8-bit moments (arXiv 2110.02861), in place.

    With ``g = grads * min(1, max_norm / (|grads| + 1e-6))`` and ``t`` the number of this step:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        p = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    in float32, the parameter rounded once: to the nearest, or with ``rounding_seed`` up or down at random, so that the
    mean is the unrounded value, and updates far below half a unit in the last place still add up. Where ``|grads|`` is
    not finite, nothing changes except ``grad_norm``.

    Args:
        params: [Q + F], float32, bfloat16 or float16, contiguous; first those with 8-bit moments, then the others.
            Both parts are multiples of 4,096, and each tensor begins at a multiple of 256 (``FlatAdamW8bit`` lays
            tensors out so).
        grads: [Q + F], the same dtype, contiguous; zero where ``params`` is padding.
        state: from ``new_state(Q, F, device)``; changed in place.
        lr: float64 [] on the same device, read when the step runs: changing it needs no new compilation.
        betas: decay of the moments, each in [0, 1); constants of the compiled kernel, as are ``eps`` and
            ``weight_decay``.
        eps: added to the root, > 0.
        weight_decay: decoupled weight decay, >= 0.
        max_norm: largest norm of the gradient, > 0; None for no clip.
        rounding_seed: int64 [] on the same device, any value, for bfloat16 ``params`` alone: round them at random by
            bits that are a function of (seed, ``state.step``, element) and equal on every device; None: to nearest.
        impl: ``auto`` (Triton on a GPU), ``triton``, ``compile`` or ``torch``.

    Returns:
        ``state.grad_norm``: float32 [], the norm before the clip. Nothing waits for the device.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message names it.
    """
    _check(params, grads, state, lr)
    if rounding_seed is not None:
        check_choice("params.dtype with rounding_seed", params.dtype, (torch.bfloat16,))
        check_tensor("rounding_seed", rounding_seed, (), torch.int64, like=("params", params))
    check_settings(betas, eps, weight_decay, max_norm)
    form = choose(impl, params)
    limit = math.inf if max_norm is None else float(max_norm)
    _run(form)(
        params, grads, *state, lr, float(betas[0]), float(betas[1]), float(eps), float(weight_decay), limit,
        rounding_seed,
    )  # fmt: skip
    return state.grad_norm


def _run(form: Form) -> Callable[..., None]:
    if form == "triton":
        # Under torch.compile a node that changes its arguments; an eager call goes straight to the launcher.
        return _op if torch.compiler.is_compiling() else _triton
    return compiled(naive.adamw8bit_) if form == "compile" else naive.adamw8bit_


def _triton(
    params: Tensor, grads: Tensor, code1: Tensor, code2: Tensor, absmax1: Tensor, absmax2: Tensor, moment1: Tensor,
    moment2: Tensor, step: Tensor, grad_norm: Tensor, tables: Tensor, lr: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, max_norm: float, rounding_seed: Tensor | None = None,
) -> None:  # fmt: skip
    from craft_kernels.adamw8bit import kernel

    kernel.update(
        params, grads, code1, code2, absmax1, absmax2, moment1, moment2, step, grad_norm, tables, lr,
        beta1, beta2, eps, weight_decay, max_norm, rounding_seed,
    )  # fmt: skip


def _fake(*_: Any) -> None:
    """In place: there is nothing to return."""


_op = torch.library.custom_op("craft_kernels::adamw8bit_", _triton, mutates_args=_MUTATED)
_op.register_fake(_fake)


def check_settings(betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float | None) -> None:
    """Refuse numbers that are no AdamW: see :func:`adamw8bit_`."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be finite and above 0, got {eps}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm must be None or above 0, got {max_norm}")


def _check(params: Tensor, grads: Tensor, state: AdamW8bitState, lr: Tensor) -> None:
    check_tensor("params", params, ("Q + F",))
    check_choice("params.dtype", params.dtype, DTYPES)
    like = ("params", params)
    check_tensor("grads", grads, params.shape, params.dtype, like=like)
    check_tensor("lr", lr, (), torch.float64, like=like)
    check_tensor("state.code1", state.code1, ("Q",), torch.uint8, like=like)
    check_tensor("state.moment1", state.moment1, ("F",), torch.float32, like=like)
    sizes = state.code1.numel(), state.moment1.numel()
    for name, size in zip(("state.code1", "state.moment1"), sizes, strict=True):
        if size % SECTION:
            raise ValueError(f"{name} must have a multiple of {SECTION} elements, got {size}")
    if sum(sizes) != params.numel() or not params.numel():
        raise ValueError(f"params must have Q + F = {sum(sizes)} elements like state, at least one, got {len(params)}")
    check_tensor("state.code2", state.code2, sizes[:1], torch.uint8, like=like)
    check_tensor("state.moment2", state.moment2, sizes[1:], torch.float32, like=like)
    for name in ("absmax1", "absmax2"):
        check_tensor(f"state.{name}", getattr(state, name), (sizes[0] // BLOCK,), torch.float32, like=like)
    check_tensor("state.step", state.step, (), torch.int64, like=like)
    check_tensor("state.grad_norm", state.grad_norm, (), torch.float32, like=like)
    check_tensor("state.tables", state.tables, (4, 256), torch.float32, like=like)
    named = {"params": params, "grads": grads, **{f"state.{name}": value for name, value in state._asdict().items()}}
    for name, value in named.items():
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")
