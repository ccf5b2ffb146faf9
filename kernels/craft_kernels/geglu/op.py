"""GEGLU as an op: checks, choice of form, registration."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from craft_kernels.checks import FLOATING, KERNEL_DTYPES
from craft_kernels.custom import differentiable, plain
from craft_kernels.dispatch import Impl, choose, compiled
from craft_kernels.geglu import naive


def geglu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The gated linear unit with gelu, arXiv 2002.05202 section 2, after its projection.

    ``y = x[..., :D] * gelu(x[..., D:])`` with the exact, erf gelu, as ``diffusers.models.activations.GEGLU`` has it.

    Args:
        x: [..., 2D], floating point; the projection's output, hidden columns before those of the gate.
        impl: ``auto`` (plain PyTorch), ``triton``, ``compile`` or ``torch``.

    Returns:
        [..., D] in the dtype of ``x``. With Triton the arithmetic is in float32 (float64 for float64) and rounded
        once, the result is contiguous, and backward keeps the input alone.

    Raises:
        ValueError: ``x`` is not floating point, or its last size is not even and at least 2; ``impl`` is unknown or
            cannot run here.
    """
    _check(x)
    # Until a GPU has shown at which shapes the kernel wins (README.md), it runs only where it is asked for.
    form = choose(impl, x, auto="torch")
    if form == "triton" and x.numel() and x.dtype in KERNEL_DTYPES:
        y: Tensor = _fused(x)
        return y
    run = compiled(naive.geglu) if form == "compile" else naive.geglu
    return run(x)


def _forward(x: Tensor) -> Tensor:
    from craft_kernels.geglu import kernel

    return kernel.forward(x)


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_y: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    grad_x: Tensor = _differentiated(grad_y, x)
    return grad_x


def _backward(grad_y: Tensor, x: Tensor) -> Tensor:
    from craft_kernels.geglu import kernel

    return kernel.backward(grad_y, x)


_fused = differentiable("geglu", _forward, fake=_forward_fake, setup_context=_keep, backward=_gradient)
_differentiated = plain("geglu_backward", _backward, fake=lambda grad_y, x: x.new_empty(x.shape))


def _check(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] < 2 or x.shape[-1] % 2:
        found = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise ValueError(f"x must be {FLOATING} [..., 2D] with D >= 1, got {found}")
