"""The one registry: which ops are measured, and what a case of one is made of.

Importing this module loads no torch: the command line names ops before anything heavy is there.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from craft_fast.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EAGER, COMPILE, TRITON = "eager", "compile", "triton"

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = ("float32", "bfloat16", "float16")

# In the order in which they are run and shown.
OPS = (
    "weighted_noise_loss",
    "noise_and_target",
    "lora_linear",
    "nf4_dequantize",
    "adamw8bit",
    "group_norm_silu",
    "geglu",
)

Result = tuple[Sequence["Tensor"], Sequence["Tensor"]]


@dataclass(frozen=True, slots=True)
class Form:
    """One implementation on the inputs of one case.

    Args:
        forward: one call; what it returns is compared with the exact result.
        wrt: inputs whose gradients are taken; none for an op without a backward.
        grads: gradients of the outputs, for the first ``len(grads)`` of them.
        tolerance: largest relative error allowed where a form rounds differently on purpose (another quantiser,
            another approximation of the same function); None is the rule that the op's tests follow.
        result: what to compare instead of the outputs of ``forward``, where a call changes its inputs.
        capture: whether a CUDA graph of the call makes sense.
    """

    forward: Callable[[], Sequence[Tensor]]
    wrt: Sequence[Tensor] = ()
    grads: Sequence[Tensor] = ()
    tolerance: float | None = None
    result: Callable[[], Sequence[Tensor]] | None = None
    capture: bool = True


@dataclass(frozen=True, slots=True)
class Problem:
    """A case with its inputs in memory.

    Args:
        exact: outputs and gradients in float64, by the naive form.
        forms: what makes each form, by name. ``eager`` (the naive form) must be there: the others' errors are held
            against its own. A maker may raise, where a library is missing or refuses.
    """

    exact: Callable[[], Result]
    forms: Mapping[str, Callable[[], Form]]


@dataclass(frozen=True, slots=True)
class Case:
    """One size of one op.

    Args:
        op: name of the op.
        name: the size in words, ``B=8 4x128x128``; unique among the op's cases of one dtype.
        dtype: dtype of the data, ``bfloat16``.
        size: what the plot's axis counts, see ``unit``.
        traffic: bytes that must be read and written, by mode; its keys are the modes that are measured.
        memory: bytes that inputs, the exact result and all intermediate values take at most, roughly.
        build: puts the inputs on a device.
        rivals: names of the forms to compare with, in the order in which they are measured.
        ours: names of our forms, those of the op's ``impl=``; the first is the one that ``auto`` takes on a GPU, by
            which figures are judged.
        quick: part of ``--quick``.
        unit: what ``size`` counts.
    """

    op: str
    name: str
    dtype: str
    size: int
    traffic: Mapping[Mode, int]
    memory: int
    build: Callable[[torch.device], Problem]
    rivals: tuple[str, ...] = (EAGER, COMPILE)
    ours: tuple[str, ...] = (TRITON,)
    quick: bool = False
    unit: str = "elements"

    @property
    def label(self) -> str:
        """``weighted_noise_loss B=8 4x128x128 bfloat16``."""
        return f"{self.op} {self.name} {self.dtype}"


def choose_ops(names: Sequence[str]) -> list[str]:
    """The ops to run, in the registry's order; no names are all of them.

    Raises:
        UsageError: there is no op of that name.
    """
    for name in names:
        if name not in OPS:
            # A part of a name is closer than what only looks alike.
            close = [op for op in OPS if name and name in op] or difflib.get_close_matches(name, OPS, n=1, cutoff=0.5)
            raise UsageError(
                f"There is no op named {name!r}",
                why=f"the ops are {', '.join(OPS)}",
                hint=f"craft-fast bench kernels {close[0]}" if close else "leave the names out to run all of them",
            )
    return [name for name in OPS if name in names or not names]


def runs_on(impl: str, device_type: str) -> bool:
    """Whether a form can run on a kind of device; Triton's interpreter on a CPU is for tests alone."""
    return impl != TRITON or device_type == "cuda"


def load_cases(op: str) -> list[Case]:
    """All cases of an op; this imports torch and the op."""
    cases: list[Case] = importlib.import_module(f"craft_bench.cases.{op}").cases()
    return cases
