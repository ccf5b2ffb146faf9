"""Which form of an op runs: Triton, ``torch.compile`` of the naive form, or the naive form itself."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "compile", "torch"]
Form = Literal["triton", "compile", "torch"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
FORCE = "CRAFT_KERNELS_IMPL"

P = ParamSpec("P")
R = TypeVar("R")
_compiled: dict[Callable[..., object], Callable[..., object]] = {}
_works: dict[torch.device, bool] = {}


def choose(impl: str, tensor: Tensor, *, auto: Form = "triton") -> Form:
    """The form that a call takes.

    The environment variable ``CRAFT_KERNELS_IMPL`` comes before ``impl``, whatever that is. ``impl="auto"`` means
    ``auto`` for a tensor on a CUDA device where Triton works, else ``torch``.

    Args:
        impl: ``auto``, ``triton``, ``compile`` or ``torch``.
        tensor: decides the device.
        auto: what an op's author measured to be best on a GPU.

    Returns:
        ``triton``, ``compile`` or ``torch``.

    Raises:
        ValueError: another name, or ``triton`` where it cannot run.
    """
    forced = os.environ.get(FORCE)
    wanted, named = (forced, FORCE) if forced else (impl, "impl")
    if wanted not in get_args(Impl):
        raise ValueError(f"{named} must be one of {', '.join(get_args(Impl))}, got {wanted!r}")
    if wanted == "auto":
        return auto if tensor.is_cuda and (auto != "triton" or triton_works(tensor.device)) else "torch"
    if wanted == "triton" and not _triton_runs_on(tensor):
        why = f"a tensor on {tensor.device}" if HAS_TRITON else "triton is not installed"
        raise ValueError(f"{named}='triton' needs triton and a CUDA tensor (or TRITON_INTERPRET=1 on a CPU), got {why}")
    return wanted  # type: ignore[return-value]


def triton_works(device: torch.device) -> bool:
    """Whether Triton is installed and compiles and runs a kernel on ``device``; tried once, a failure warned of once.

    It needs a C compiler and a GPU of compute capability 7.0 or later; where it fails, training is slower, not over.
    """
    if device not in _works:
        if torch.compiler.is_compiling():  # a compiler looks on, so no kernel can be tried now
            return HAS_TRITON
        _works[device] = _try_triton(device)
    return _works[device]


def _try_triton(device: torch.device) -> bool:
    if not HAS_TRITON:
        return False
    try:
        from craft_kernels.probe import add_one

        add_one(device)
    # Whatever it is (a missing compiler, a driver, an assertion inside of Triton), the other form of an op still works.
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton does not work on {device}, so plain PyTorch is used: {why}", RuntimeWarning, stacklevel=3
        )
        return False
    return True


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compile`` of ``function``, made at its first use and kept."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function)
    return _compiled[function]  # type: ignore[return-value]


def _triton_runs_on(tensor: Tensor) -> bool:
    if not HAS_TRITON:
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
