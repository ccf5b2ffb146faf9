"""8-bit AdamW (arXiv 2110.02861) in three kinds behind one interface, with one state that travels through safetensors.

- ``bitsandbytes``: its optimizer, one launch a tensor; the default on a CPU.
- ``flat``: ``craft_kernels.adamw8bit``, two launches for all tensors and no wait for the device, for a CUDA graph.
- ``fused_backward``: updates each tensor while backward runs and frees its gradient, for training all weights.

A state saved by one kind loads in each other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from craft_fast.errors import IntegrityError, ResourceError
from craft_fast.quiet import import_bitsandbytes
from craft_fast.rng import derive_seed
from craft_kernels.adamw8bit import FlatAdamW8bit
from craft_kernels.dispatch import choose

Kind = Literal["bitsandbytes", "flat", "fused_backward"]

_QMAPS = ("qmap1", "qmap2")
_TRIES = 4
T = TypeVar("T")


def nothing_to_free() -> None:
    """What a step does about a shortage of memory by default: try again."""


class Optimizer(Protocol):
    """What a training step asks of an optimizer.

    In each step: ``zero_grad``, the micro-batches' backward passes, ``step``. Before the last backward comes ``arm``,
    which means something where ``updates_in_backward``, and may be called for every kind.
    """

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the update; such an optimizer has ``set_lr`` and ``apply`` too."""

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters change in the backward pass after ``arm``, and no global norm is known by then."""

    def zero_grad(self) -> None:
        """Forget all gradients."""

    def arm(self, lr: float, *, loss: Tensor | None = None, grad_scale: float = 1.0) -> None:
        """Say that the next backward is the last one of this step; arguments as for :meth:`step`.

        Does nothing unless ``updates_in_backward``.
        """

    def dry_run(self) -> AbstractContextManager[None]:
        """Inside, a whole step leaves parameters and state as they are, at the memory of a real one.

        For probing memory before anything has changed. Leave out :meth:`step` for kinds that do all work there.
        """

    def step(
        self,
        lr: float,
        *,
        loss: Tensor | None = None,
        grad_scale: float = 1.0,
        on_out_of_memory: Callable[[], None] = nothing_to_free,
    ) -> Tensor:
        """One update; none where the norm or ``loss`` is not finite.

        Args:
            lr: learning rate, finite, >= 0.
            loss: floating point [] on the device: the step's loss.
            grad_scale: what the loss was multiplied with before backward; divided out of the gradients in place.
            on_out_of_memory: frees memory, before another try.

        Returns:
            float32 [] on the device: the norm of all gradients, ``grad_scale`` divided out, before the clip; not
            finite where nothing was updated, but for a loss that alone is not finite. Valid until the next step.

        Raises:
            ResourceError: memory does not suffice, four times in a row.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as CPU tensors, ready for safetensors; waits for the device.

        Returns:
            ``<param>.state1|state2`` (uint8 or float32, the parameter's shape), ``<param>.absmax1|absmax2`` (float32
            [blocks], 8-bit ones only), ``<param>.step`` (int64 []), and the shared maps ``qmap1|qmap2`` (float32
            [256], where a parameter has 8-bit moments).
        """

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, where: str = "optimizer") -> None:
        """Put a state from :meth:`state_tensors` of any kind back.

        Raises:
            IntegrityError: names, shapes, dtypes or the 8-bit code differ; nothing is changed then.
        """


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    kind: Kind,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
    seed: int = 0,
) -> Optimizer:
    """An 8-bit AdamW over named parameters, its whole state allocated now: a shortage shows before anything changed.

    Tensors of 4,096 elements and more keep their moments in 8 bits with one scale a block of 256; smaller ones stay in
    32 bits (bitsandbytes' rule).

    Args:
        parameters: by name, at least one, in a stable order; of one dtype, on one device, all require a gradient.
        kind: see the module; :func:`optimizer_kind` chooses.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        max_grad_norm: largest norm of all gradients together; for ``fused_backward`` of each tensor's gradient.
        seed: root seed of the stochastic rounding of bfloat16 parameters, in [0, 2^63); not for ``bitsandbytes``.

    Raises:
        ValueError: parameters or settings do not fit; the message names them.
    """
    if kind == "bitsandbytes":
        return BitsAndBytesOptimizer(parameters, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    if kind == "flat":
        return FlatOptimizer(parameters, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed)
    if kind == "fused_backward":
        from craft_fast.qlora.fused_backward import FusedBackwardAdamW8bit

        return FusedBackwardAdamW8bit(
            parameters, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed
        )
    raise ValueError(f"kind must be one of bitsandbytes, flat, fused_backward, got {kind!r}")


def optimizer_kind(
    setting: Literal["auto", "flat", "bitsandbytes"], *, method: str, device: torch.device | str
) -> Kind:
    """The kind that ``engine.optimizer`` stands for.

    ``auto`` is ``fused_backward`` for ``train.method: full``; else ``flat`` where Triton runs on the device (its plain
    form needs several float32 copies of all parameters), and ``bitsandbytes`` elsewhere.
    """
    if setting != "auto":
        return setting
    if method == "full":
        return "fused_backward"
    return "flat" if choose("auto", torch.empty(0, device=device)) == "triton" else "bitsandbytes"


class BitsAndBytesOptimizer:
    """``bitsandbytes.optim.AdamW8bit`` after ``torch.nn.utils.clip_grad_norm_``: see :class:`Optimizer`.

    A step waits for the device once. Parameters without a gradient are left alone.
    """

    capturable = False
    updates_in_backward = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, max_grad_norm: float
    ) -> None:
        bnb = import_bitsandbytes()
        self.max_grad_norm = max_grad_norm
        self.optimizer: Any = bnb.optim.AdamW8bit(list(parameters.items()), lr=lr, weight_decay=weight_decay)
        for group_index, group in enumerate(self.optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                self.optimizer.init_state(group, p, group_index, index)

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def arm(self, lr: float, *, loss: Tensor | None = None, grad_scale: float = 1.0) -> None:
        """Nothing: see :class:`Optimizer`."""

    def dry_run(self) -> AbstractContextManager[None]:
        """Nothing changes before :meth:`step` here."""
        return nullcontext()

    def step(
        self,
        lr: float,
        *,
        loss: Tensor | None = None,
        grad_scale: float = 1.0,
        on_out_of_memory: Callable[[], None] = nothing_to_free,
    ) -> Tensor:
        """See :meth:`Optimizer.step`; a shortage of memory can not leave it half done.

        Parameters are updated one by one. One that meets ``torch.OutOfMemoryError`` gets its step counter back, memory
        is released by ``on_out_of_memory``, and the walk goes on from there: none is updated twice, none is missed.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if grad_scale != 1.0 and grads:
            torch._foreach_div_(grads, grad_scale)
        clip = partial(torch.nn.utils.clip_grad_norm_, params, self.max_grad_norm)
        norm = persist(clip, on_out_of_memory, "norm of the gradients").to(params[0].device, torch.float32)
        both = norm if loss is None else torch.stack([norm.double(), loss.detach().double()])
        if bool(both.isfinite().all()):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._update(on_out_of_memory)
        return norm

    @torch.no_grad()
    def _update(self, on_out_of_memory: Callable[[], None]) -> None:
        for group_index, group in enumerate(self.optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                update = partial(self._update_one, group, p, group_index, index)
                persist(update, on_out_of_memory, group["param_names"][index])

    def _update_one(self, group: Any, p: nn.Parameter, group_index: int, index: int) -> None:
        state = self.optimizer.state[p]
        step = state["step"]
        try:
            self.optimizer.update_step(group, p, group_index, index)
        except torch.OutOfMemoryError:
            state["step"] = step
            raise

    def _states(self) -> dict[str, dict[str, Any]]:
        return {
            name: self.optimizer.state[p]
            for group in self.optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """See :meth:`Optimizer.state_tensors`."""
        tensors: dict[str, Tensor] = {}
        for name, state in self._states().items():
            for key, value in state.items():
                if key in _QMAPS:
                    tensors.setdefault(key, value.detach().to("cpu", copy=True))
                elif isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
                else:
                    tensors[f"{name}.{key}"] = torch.tensor(value, dtype=torch.int64)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, where: str = "optimizer") -> None:
        """See :meth:`Optimizer.load_state_tensors`."""
        problems = state_problems(self.state_tensors(), tensors)
        if problems:
            raise not_this_state(where, f"{len(problems)} differences, first: {problems[0]}")
        for name, state in self._states().items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    if key not in _QMAPS:
                        value.copy_(tensors[f"{name}.{key}"])
                else:
                    state[key] = int(tensors[f"{name}.{key}"])


class FlatOptimizer:
    """``craft_kernels``' FlatAdamW8bit: see :class:`Optimizer`. A parameter without a gradient has a gradient of zero.

    ``step`` is ``set_lr`` and ``apply``. A CUDA graph records ``apply`` alone, with static tensors, and counts on by
    itself; before each replay ``set_lr`` changes the rate on the device.
    """

    capturable = True
    updates_in_backward = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, max_grad_norm: float,
        seed: int = 0,
    ) -> None:  # fmt: skip
        bfloat16 = {p.dtype for p in parameters.values()} == {torch.bfloat16}
        self.optimizer = FlatAdamW8bit(
            parameters, lr=lr, weight_decay=weight_decay, max_norm=max_grad_norm,
            rounding_seed=derive_seed(seed, "rounding") if bfloat16 else None,
        )  # fmt: skip

    def zero_grad(self) -> None:
        """Zero the buffer; gradients stay views of it."""
        self.optimizer.zero_grad()

    def arm(self, lr: float, *, loss: Tensor | None = None, grad_scale: float = 1.0) -> None:
        """Nothing: see :class:`Optimizer`."""

    def dry_run(self) -> AbstractContextManager[None]:
        """Nothing changes before :meth:`step` here."""
        return nullcontext()

    def set_lr(self, lr: float) -> None:
        """Change the learning rate on the device, without waiting for it."""
        self.optimizer.set_lr(lr)

    @torch.no_grad()
    def apply(
        self,
        *,
        loss: Tensor | None = None,
        grad_scale: float = 1.0,
        on_out_of_memory: Callable[[], None] = nothing_to_free,
    ) -> Tensor:
        """The update at the rate of :meth:`set_lr`; nothing waits for the device, and a CUDA graph can hold it.

        A ``loss`` that is not finite makes the norm not finite, in which case the kernel changes nothing.
        """
        # NaN where the loss is NaN or infinite, else 0: the check is the one that the norm goes through anyway. Made
        # first, since it allocates: nothing may fail between here and what is tried again.
        poison = None if loss is None else loss.detach() * 0.0
        self.optimizer.collect()
        if grad_scale != 1.0:
            self.optimizer.grads.div_(grad_scale)
        if poison is not None:
            self.optimizer.grads[:1].add_(poison)
        return persist(self.optimizer.step, on_out_of_memory, "all parameters")

    def step(
        self,
        lr: float,
        *,
        loss: Tensor | None = None,
        grad_scale: float = 1.0,
        on_out_of_memory: Callable[[], None] = nothing_to_free,
    ) -> Tensor:
        """See :meth:`Optimizer.step`; the norm is NaN where the loss alone is not finite."""
        self.set_lr(lr)
        return self.apply(loss=loss, grad_scale=grad_scale, on_out_of_memory=on_out_of_memory)

    def state_tensors(self) -> dict[str, Tensor]:
        """See :meth:`Optimizer.state_tensors`."""
        return self.optimizer.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, where: str = "optimizer") -> None:
        """See :meth:`Optimizer.load_state_tensors`; all parameters must have done the same number of steps."""
        try:
            self.optimizer.load_state_tensors(tensors)
        except ValueError as error:
            raise not_this_state(where, str(error)) from error


def state_problems(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How a saved state differs from what is expected, in names, shapes, dtypes and the 8-bit code."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name)
        if have is None:
            continue
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {tuple(have.shape)} {have.dtype}, not {tuple(want.shape)} {want.dtype}")
        elif name in _QMAPS and not torch.equal(have.to(want.device), want):
            problems.append(f"{name} is another 8-bit code than this optimizer uses")
        elif name.endswith(".step") and int(have) < 0:
            problems.append(f"{name} is {int(have)}, below 0")
    return problems


def not_this_state(where: str, why: str) -> IntegrityError:
    """The error for a state that does not fit."""
    return IntegrityError("The saved optimizer state does not fit.", where=where, why=why)


def persist(update: Callable[[], T], on_out_of_memory: Callable[[], None], where: str) -> T:
    """``update()``, again after ``on_out_of_memory()`` where memory runs out in it; it must change all or nothing.

    Raises:
        ResourceError: it failed four times.
    """
    for _ in range(_TRIES):
        try:
            return update()
        except torch.OutOfMemoryError:
            pass
        # Outside of `except`, whose traceback keeps what the failed try had allocated.
        on_out_of_memory()
    raise ResourceError(
        "Out of memory in the optimizer step.",
        where=where,
        hint="Lower train.rank or train.micro_batch_size, or close other programs on this device.",
    )
