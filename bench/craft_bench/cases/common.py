"""What the cases share: random inputs that are the same in every run, and the compiled baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from craft_bench.registry import Form

P = ParamSpec("P")
R = TypeVar("R")

GIB = 2**30


class Random:
    """Random tensors, by a seed; never zeros, whose multiplication costs a GPU less power and so less time."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        # Drawn where they are used: 2^28 numbers would take seconds to draw on a CPU and move.
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """N(0, scale^2)."""
        drawn = torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)
        return drawn if scale == 1.0 else drawn.mul_(scale)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """U(low, high), float32."""
        return torch.rand(shape, generator=self._generator, device=self._device).mul_(high - low).add_(low)

    def integers(self, shape: Sequence[int], high: int) -> Tensor:
        """Integers in [0, high), int64."""
        return torch.randint(high, tuple(shape), generator=self._generator, device=self._device)


def makers(form: Callable[[str], Form], *impls: str) -> dict[str, Callable[[], Form]]:
    """``Problem.forms`` from one function of the form's name."""
    return {impl: functools.partial(form, impl) for impl in impls}


def dtype_of(name: str) -> torch.dtype:
    """``dtype_of("bfloat16") is torch.bfloat16``."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def compile_static(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compile`` with its defaults, for the very shapes it is called with."""
    return torch.compile(function, dynamic=False)


def in_float64(tensor: Tensor) -> Tensor:
    """A detached copy in float64 that asks for gradients where the original does."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
