"""Refusing arguments that do not fit: every message names the argument, what is allowed, and what was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = "floating point"
# What the Triton forms take; the plain ones take any floating point.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtype: torch.dtype | str = FLOATING,
    *,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Refuse a tensor of another shape, dtype or device.

    Args:
        name: the argument's name.
        tensor: what was given.
        shape: sizes; a letter stands for any size.
        dtype: the one allowed, or ``FLOATING`` for any floating-point one.
        like: another argument, by name, whose device is required.

    Raises:
        ValueError: it does not fit.
    """
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    right = tensor.is_floating_point() if isinstance(dtype, str) else tensor.dtype == dtype
    if not (fits and right):
        sizes = ", ".join(str(size) for size in shape)
        kind = dtype if isinstance(dtype, str) else _short(dtype)
        raise ValueError(f"{name} must be {kind} [{sizes}], got {_short(tensor.dtype)} {tuple(tensor.shape)}")
    if like is not None and tensor.device != like[1].device:
        raise ValueError(f"{name} must be on {like[1].device} like {like[0]}, got {tensor.device}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is none of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(str(a) for a in allowed)}, got {value!r}")


def check_least(name: str, value: float, least: float) -> None:
    """Refuse a number below ``least``."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
