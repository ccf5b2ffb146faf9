"""8-bit AdamW that updates each parameter as soon as backward has its gradient, and frees the gradient at once.

Training all of SDXL's UNet in bfloat16 (2,567,463,684 parameters) holds 5.135 GB of weights, 5.132 GB of 8-bit codes,
0.080 GB of their scales and 0.012 GB of what small tensors need besides: 10.36 GB, 9.65 GiB. All gradients together
would be another 5.1 GB; here they are one or two, of 0.059 GB at most, and 0.003 GB of small ones.

What it costs: nobody knows the norm of all gradients when the first parameter changes. So the clip is by tensor, and a
gradient that is not finite leaves its own tensor alone while others may have changed. A loss that is not finite blocks
all of them, since it is known before backward.

"Large" parameters are those of a multiple of 4,096 elements: of SDXL all but 1.6 of 2,567 million. They are updated in
backward. The others are few and small; they share one buffer (``FlatAdamW8bit``), are updated in :meth:`step`, and
count as one tensor for clip and check.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from craft_fast.errors import ResourceError
from craft_fast.qlora.optim import not_this_state, nothing_to_free, persist, state_problems
from craft_fast.rng import derive_seed
from craft_kernels.adamw8bit import AdamW8bitState, FlatAdamW8bit, adamw8bit_, new_state
from craft_kernels.adamw8bit.state import BLOCK, SECTION

# Numbers of one parameter lie 16 bytes apart: Triton compiles a kernel anew for a pointer of another alignment.
_APART_BYTES = 16


@dataclass(frozen=True)
class _Large:
    """A parameter that is updated in backward, its share of the state (views), and the seed of its rounding."""

    name: str
    param: nn.Parameter
    state: AdamW8bitState
    rounding_seed: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """Its state by bitsandbytes' names: views, not copies."""
        shape, state = self.param.shape, self.state
        return {
            "step": state.step,
            "state1": state.code1.view(shape),
            "state2": state.code2.view(shape),
            "absmax1": state.absmax1,
            "absmax2": state.absmax2,
        }


class FusedBackwardAdamW8bit:
    """See the module, and ``craft_fast.qlora.optim.Optimizer`` for the interface.

    One step is: ``zero_grad``, backward of all micro-batches but the last, ``arm``, backward of the last, ``step``.
    With one micro-batch no gradient outlives its update. With more, earlier ones add up in ``p.grad`` as usual, which
    costs a gradient for every parameter. Without ``arm`` all updates happen in ``step``.

    bfloat16 parameters are rounded up or down at random, by bits that are a function of (seed, parameter's name, number
    of its update, element), so that a resumed run repeats them; float16 and float32 are rounded to the nearest.

    A parameter without a gradient is left alone. Parameters become contiguous; large ones keep memory of their own.
    Activation recomputation must be the non-reentrant kind, in which each gradient comes once a backward.

    Args:
        parameters: by name, of one dtype and on one device, all with ``requires_grad``.
        lr: learning rate until the first :meth:`arm` or :meth:`step`.
        weight_decay: decoupled weight decay.
        max_grad_norm: largest norm of one tensor's gradient.
        seed: root seed of the stochastic rounding, in [0, 2^63).

    Raises:
        ValueError: parameters or settings do not fit; the message names them.
    """

    capturable = False
    updates_in_backward = True

    @torch.no_grad()
    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, max_grad_norm: float,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        large = {name: p for name, p in parameters.items() if p.numel() and p.numel() % SECTION == 0}
        rest = {name: p for name, p in parameters.items() if name not in large}
        bfloat16 = {p.dtype for p in parameters.values()} == {torch.bfloat16}
        self._joint: FlatAdamW8bit | None = None
        if rest or not large:
            self._joint = FlatAdamW8bit(
                rest, lr=lr, weight_decay=weight_decay, max_norm=max_grad_norm,
                rounding_seed=derive_seed(seed, "rounding") if bfloat16 else None,
            )  # fmt: skip
        self._small_names, self._small = list(rest), list(rest.values())
        self._device = next(iter(parameters.values())).device
        self._lr = torch.full((), lr, dtype=torch.float64, device=self._device)
        self._poison = torch.zeros((), device=self._device)
        self._norms, self._large = _lay_out(large, seed if bfloat16 else None, self._device)
        self._updated: set[str] = set()
        self._armed: tuple[float, float] | None = None
        self._dry = False
        for p in large.values():
            p.data = p.data.contiguous()
        self._free_small()
        _add_hooks(self, self._large)

    # ---- the step

    def zero_grad(self) -> None:
        """Free all gradients.

        Raises:
            ResourceError: backward ended half-way, by running out of memory, after parameters had been updated. Where
                none had been, the step can be tried again.
        """
        updated, self._updated, self._armed = len(self._updated), set(), None
        for large in self._large:
            large.param.grad = None
        self._free_small()
        if updated and not self._dry:
            raise ResourceError(
                "Out of memory in the middle of a training step.",
                where=f"backward pass, after {updated} of {len(self._large)} large parameters were updated",
                why="with train.method: full parameters change during backward, so this step cannot be done again",
                hint="The last checkpoint is whole: run the same command again with a smaller "
                "train.micro_batch_size, or train.gradient_checkpointing: all, and it continues from there.",
            )

    @torch.no_grad()
    def arm(self, lr: float, *, loss: Tensor | None = None, grad_scale: float = 1.0) -> None:
        """From here to :meth:`step`, each gradient that backward finishes updates its parameter and is freed.

        Args:
            lr: learning rate, finite, >= 0.
            loss: floating point [] on the device; where it is not finite, nothing is updated. Nothing waits for it.
            grad_scale: what the loss was multiplied with; divided out of each gradient.

        Raises:
            ValueError: ``lr`` does not fit, or there was an :meth:`arm` without its :meth:`step`.
        """
        if self._armed is not None:
            raise ValueError("arm() comes once before each step(), got it twice")
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"lr must be finite and at least 0, got {lr}")
        self._lr.fill_(lr)
        self._norms.zero_()
        self._poison.zero_()
        if loss is not None:
            # NaN where the loss is NaN or infinite, else 0: added to each gradient, it fails the check of its norm.
            self._poison.copy_(loss.detach() * 0.0)
        self._armed = (lr, grad_scale)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Inside, gradients are freed as they come and nothing is updated, nor in :meth:`step`.

        A whole step can so be tried for its memory while running out of it does no harm yet.
        """
        self._dry = True
        try:
            yield
        finally:
            self.zero_grad()
            self._dry = False

    @torch.no_grad()
    def step(
        self,
        lr: float,
        *,
        loss: Tensor | None = None,
        grad_scale: float = 1.0,
        on_out_of_memory: Callable[[], None] = nothing_to_free,
    ) -> Tensor:
        """Update what backward did not: small parameters, and large ones whose gradient was not in the last backward.

        Args:
            lr: as given to :meth:`arm`, if that was called; so is ``grad_scale``.
            loss: blocks the updates of this call where it is not finite; those in backward need it in :meth:`arm`.
            grad_scale: see :meth:`arm`.
            on_out_of_memory: frees memory, before another try.

        Returns:
            float32 [] on the device: the norm of all gradients; not finite where one tensor or more was left alone.

        Raises:
            ResourceError: memory does not suffice, four times in a row.
            ValueError: ``lr`` or ``grad_scale`` is not what :meth:`arm` was given.
        """
        if self._armed is None:
            self.arm(lr, loss=loss, grad_scale=grad_scale)
        elif self._armed != (lr, grad_scale):
            raise ValueError(f"step() must be given arm()'s (lr, grad_scale) {self._armed}, got {(lr, grad_scale)}")
        elif loss is not None:
            self._poison.add_(loss.detach() * 0.0)
        for large in self._large:
            if large.param.grad is not None:
                self._update(large, on_out_of_memory)
        squares = self._norms.double().square().sum()
        if self._joint is not None:
            squares += self._step_joint(self._joint, grad_scale, on_out_of_memory).double().square()
        self._armed, self._updated = None, set()
        return squares.sqrt().float()

    def _finished(self, large: _Large) -> None:
        """Backward has finished a large parameter's gradient."""
        if self._armed is not None:
            self._update(large)

    def _update(self, large: _Large, on_out_of_memory: Callable[[], None] | None = None) -> None:
        """One large parameter; where memory runs out nothing of it has changed, and its gradient is still there."""
        param = large.param
        assert self._armed is not None and param.grad is not None  # noqa: PT018
        if large.name in self._updated:
            raise RuntimeError(
                f"The gradient of {large.name!r} came twice after arm(): arm() belongs before the last backward of a "
                "step, and activations must be recomputed without reentering backward."
            )
        if not self._dry:
            if not param.is_contiguous():
                raise ValueError(f"parameter {large.name!r} must stay contiguous, got strides {param.stride()}")
            grad = param.grad.contiguous().view(-1)
            if self._armed[1] != 1.0:
                grad.div_(self._armed[1])
            grad[:1].add_(self._poison)
            update = partial(
                adamw8bit_, param.detach().view(-1), grad, large.state, self._lr, weight_decay=self.weight_decay,
                max_norm=self.max_grad_norm, rounding_seed=large.rounding_seed,
            )  # fmt: skip
            update() if on_out_of_memory is None else persist(update, on_out_of_memory, large.name)
        self._updated.add(large.name)
        param.grad = None

    def _step_joint(self, joint: FlatAdamW8bit, grad_scale: float, on_out_of_memory: Callable[[], None]) -> Tensor:
        """All small parameters; their gradients are freed."""
        skip = [name for name, p in zip(self._small_names, self._small, strict=True) if p.grad is None]
        if self._dry or len(skip) == len(self._small):
            self._free_small()
            return torch.zeros((), device=self._device)
        joint.collect()
        if grad_scale != 1.0:
            joint.grads.div_(grad_scale)
        joint.grads[:1].add_(self._poison)
        joint.lr.copy_(self._lr)
        norm = persist(partial(joint.step, skip=skip), on_out_of_memory, "small parameters")
        self._free_small()
        return norm

    def _free_small(self) -> None:
        """None rather than views of zeros: autograd then need not add, and one without a gradient is known."""
        for p in self._small:
            p.grad = None

    # ---- the state

    def _expected(self, joint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names and tensors of the whole state, in the order of the parameters; views where ``joint`` has none."""
        found = dict(joint)
        for large in self._large:
            found.update({f"{large.name}.{key}": value for key, value in large.parts().items()})
            found.update(qmap1=large.state.tables[0], qmap2=large.state.tables[1])
        return found

    def state_tensors(self) -> dict[str, Tensor]:
        """See ``Optimizer.state_tensors``."""
        joint = {} if self._joint is None else self._joint.state_tensors()
        return {
            name: value if name in joint else value.detach().to("cpu", copy=True)
            for name, value in self._expected(joint).items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, where: str = "optimizer") -> None:
        """See ``Optimizer.load_state_tensors``; all small parameters must have done the same number of steps."""
        joint = {} if self._joint is None else self._joint.state_tensors()
        problems = state_problems(self._expected(joint), tensors)
        if problems:
            raise not_this_state(where, f"{len(problems)} differences, first: {problems[0]}")
        if self._joint is not None:
            try:
                self._joint.load_state_tensors({name: tensors[name] for name in joint})
            except ValueError as error:
                raise not_this_state(where, str(error)) from error
        for large in self._large:
            for key, value in large.parts().items():
                value.copy_(tensors[f"{large.name}.{key}"])


def _lay_out(params: Mapping[str, nn.Parameter], seed: int | None, device: torch.device) -> tuple[Tensor, list[_Large]]:
    """The norms of all large parameters' gradients, float32 [P], and each parameter with its views of one state."""
    whole = new_state(sum(p.numel() for p in params.values()), 0, device)
    steps, seeds = (torch.zeros(len(params), _APART_BYTES // 8, dtype=torch.int64, device=device) for _ in range(2))
    norms = torch.zeros(len(params), _APART_BYTES // 4, device=device)
    if seed is not None:
        own = [derive_seed(seed, "rounding", name) for name in params]
        seeds[:, 0] = torch.tensor(own, dtype=torch.int64)
    found, start = [], 0
    for index, (name, param) in enumerate(params.items()):
        at, blocks = (slice(start // n, (start + param.numel()) // n) for n in (1, BLOCK))
        state = whole._replace(
            code1=whole.code1[at], code2=whole.code2[at], absmax1=whole.absmax1[blocks], absmax2=whole.absmax2[blocks],
            step=steps[index, 0], grad_norm=norms[index, 0],
        )  # fmt: skip
        found.append(_Large(name, param, state, None if seed is None else seeds[index, 0]))
        start += param.numel()
    return norms[:, 0], found


def _add_hooks(optimizer: FusedBackwardAdamW8bit, parameters: list[_Large]) -> None:
    """Hooks that do not keep the optimizer alive: the parameters stay, when training is over and its state must go."""
    reference = weakref.ref(optimizer)

    def hook(_: Tensor, *, large: weakref.ref[_Large]) -> None:
        owner, found = reference(), large()
        if owner is not None and found is not None:
            owner._finished(found)

    for large in parameters:
        large.param.register_post_accumulate_grad_hook(partial(hook, large=weakref.ref(large)))
