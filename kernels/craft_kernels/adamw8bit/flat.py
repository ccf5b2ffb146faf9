"""AdamW with 8-bit moments for a model's parameters, laid side by side in one buffer.

Shapes: Q elements of tensors with 8-bit moments, F of tensors with float32 moments, both with their padding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from craft_kernels.adamw8bit.op import DTYPES, adamw8bit_, check_settings
from craft_kernels.adamw8bit.state import BLOCK, MIN_8BIT_SIZE, SECTION, AdamW8bitState, new_state
from craft_kernels.checks import check_choice
from craft_kernels.dispatch import Impl, choose

_PROBLEMS_SHOWN = 3
# The signed code that stands for 0.
_SIGNED_ZERO = 127


@dataclass(frozen=True)
class _Segment:
    """Where one parameter lies: ``size`` elements from ``start`` of the flat buffer."""

    name: str
    param: nn.Parameter
    start: int
    small: bool

    @property
    def size(self) -> int:
        return self.param.numel()

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's view of a flat tensor."""
        return flat[self.start : self.start + self.size].view(self.param.shape)


class FlatAdamW8bit:
    """8-bit AdamW with a global-norm clip, two launches for all parameters, ready for a CUDA graph.

    Tensors of 4,096 elements and more keep their moments in 8 bits with one scale a block of 256, smaller ones in
    float32, as ``bitsandbytes.optim.AdamW8bit`` does; :meth:`state_tensors` speaks its format. See
    :func:`craft_kernels.adamw8bit.adamw8bit_` for the equation.

    Each ``p.data`` and ``p.grad`` becomes a contiguous view of ``params`` and ``grads``, and has to stay one: copy
    new values in, and make the optimizer after the model is on its device. A ``p.grad`` that was replaced is copied in
    at the next :meth:`step` and made a view again. One that is None counts as zero: unlike in ``torch.optim``, where
    such a parameter is left out, its moments and weights decay.

    Args:
        params: parameters by name, at least one, in a stable order; of one dtype (float32, bfloat16 or float16) and
            on one device, each once, all with ``requires_grad``.
        lr: learning rate, finite, >= 0; see :meth:`set_lr`.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled weight decay, >= 0.
        max_norm: largest norm of the whole gradient, > 0; None for no clip.
        rounding_seed: in [0, 2^63), for bfloat16 parameters alone: round them up or down at random, by bits that are a
            function of (seed, number of the step, place in ``params``); None: to nearest.
        impl: ``auto`` (Triton on a GPU), ``triton``, ``compile`` or ``torch``.

    Attributes:
        params: [Q + F], all parameters; padding is zero.
        grads: [Q + F], all gradients; padding is zero.
        state: the tensors that a step reads and writes; ``state.grad_norm`` is float32 [], before the clip.
        lr: float64 [], on the device.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    @torch.no_grad()
    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        rounding_seed: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        _check_params(params)
        check_settings(betas, eps, weight_decay, max_norm)
        _check_lr(lr)
        first = next(iter(params.values()))
        choose(impl, first)
        self.rounding_seed = _seed(rounding_seed, first)
        self.betas, self.eps, self.weight_decay, self.max_norm, self.impl = betas, eps, weight_decay, max_norm, impl
        self._segments, size_8bit, size_32bit = _lay_out(params)
        self._size_8bit = size_8bit
        self.params = torch.zeros(size_8bit + size_32bit, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.params)
        self.state = new_state(size_8bit, size_32bit, first.device)
        self.lr = torch.full((), lr, dtype=torch.float64, device=first.device)
        self._views = [(segment.of(self.params), segment.of(self.grads)) for segment in self._segments]
        for segment, (data, grad) in zip(self._segments, self._views, strict=True):
            data.copy_(segment.param.detach())
            if segment.param.grad is not None:
                grad.copy_(segment.param.grad)
            segment.param.data = data
            segment.param.grad = grad
        # The view that `p.data` makes is another tensor object; what stays the same is the address.
        self._addresses = [segment.param.data_ptr() for segment in self._segments]

    @torch.no_grad()
    def step(self, *, skip: Collection[str] = ()) -> Tensor:
        """One update; where the gradient's norm is not finite, nothing changes.

        Args:
            skip: names of parameters to leave as they are, with their moments; the step counter is that of all. Their
                gradients still count in the norm. They are copied aside and back, so these should be few.

        Returns:
            ``state.grad_norm``, float32 []. Nothing waits for the device.

        Raises:
            ValueError: a parameter no longer lies in the flat buffer.
        """
        self.collect()
        kept = [
            (view, view.clone())
            for segment in self._segments
            if segment.name in skip
            for view in self._views_of(segment)
        ]
        norm = adamw8bit_(
            self.params, self.grads, self.state, self.lr,
            betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, max_norm=self.max_norm,
            rounding_seed=self.rounding_seed, impl=self.impl,
        )  # fmt: skip
        for view, before in kept:
            view.copy_(before)
        return norm

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set every gradient to zero in one launch; ``set_to_none`` is accepted and ignored, the views stay."""
        self.grads.zero_()
        for segment, (_, grad) in zip(self._segments, self._views, strict=True):
            if segment.param.grad is not grad:
                segment.param.grad = grad

    def set_lr(self, lr: float) -> None:
        """Change the learning rate on the device, without waiting for it; a captured CUDA graph sees it too.

        Raises:
            ValueError: not finite, or negative.
        """
        _check_lr(lr)
        self.lr.fill_(lr)

    @property
    def steps_done(self) -> int:
        """Updates done, those skipped for a gradient that was not finite left out; waits for the device."""
        return int(self.state.step)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as CPU tensors, in the format of bitsandbytes' optimizer; waits for the device.

        Returns:
            ``<param>.state1|state2`` (uint8 or float32, the parameter's shape), ``<param>.absmax1|absmax2`` (float32
            [blocks], 8-bit ones only), ``<param>.step`` (int64 []), and the shared maps ``qmap1|qmap2`` (float32
            [256], where a parameter has 8-bit moments).
        """
        host = _on_cpu(self.state)
        tensors = {
            f"{segment.name}.{key}": part.clone()
            for segment in self._segments
            for key, part in self._parts(segment, host).items()
        }
        if self._size_8bit:
            tensors.update(qmap1=host.tables[0].clone(), qmap2=host.tables[1].clone())
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state of :meth:`state_tensors`, or of bitsandbytes in its format, back.

        Args:
            tensors: on any device; copied.

        Raises:
            ValueError: names, shapes, dtypes or the 8-bit code differ, or the parameters have not all done the same
                number of steps (here they share one counter); nothing is changed then.
        """
        host = AdamW8bitState(*(torch.zeros_like(value, device="cpu") for value in self.state))
        host.tables.copy_(self.state.tables)
        # Padding in the last block of a parameter must stay zero, and the signed code 0 is -0.99 of the scale.
        host.code1.fill_(_SIGNED_ZERO)
        expected = {
            f"{segment.name}.{key}": part
            for segment in self._segments
            for key, part in self._parts(segment, host).items()
        }
        if self._size_8bit:
            expected.update(qmap1=host.tables[0], qmap2=host.tables[1])
        step = _check_state(expected, tensors)
        for name, part in expected.items():
            if not name.endswith(".step"):
                part.copy_(tensors[name])
        host.step.fill_(step)
        host.grad_norm.copy_(self.state.grad_norm)
        for value, saved in zip(self.state, host, strict=True):
            value.copy_(saved)

    def _parts(self, segment: _Segment, state: AdamW8bitState) -> dict[str, Tensor]:
        """One parameter's share of a state, by bitsandbytes' names: views, not copies."""
        if segment.small:
            moved = replace(segment, start=segment.start - self._size_8bit)
            return {"step": state.step, "state1": moved.of(state.moment1), "state2": moved.of(state.moment2)}
        blocks = slice(segment.start // BLOCK, (segment.start + segment.size + BLOCK - 1) // BLOCK)
        return {
            "step": state.step,
            "state1": segment.of(state.code1),
            "state2": segment.of(state.code2),
            "absmax1": state.absmax1[blocks],
            "absmax2": state.absmax2[blocks],
        }

    def _views_of(self, segment: _Segment) -> list[Tensor]:
        """All that an update changes of one parameter alone."""
        parts = self._parts(segment, self.state)
        return [segment.of(self.params), *(part for name, part in parts.items() if name != "step")]

    @torch.no_grad()
    def collect(self) -> None:
        """Bring gradients back into ``grads`` that are no views of it any more; :meth:`step` does it too.

        Raises:
            ValueError: a parameter no longer lies in the flat buffer.
        """
        views, grads = [], []
        for segment, (_, view), address in zip(self._segments, self._views, self._addresses, strict=True):
            if segment.param.data_ptr() != address:
                raise ValueError(
                    f"params[{segment.name!r}] must stay a view of the flat buffer, got other memory: "
                    "copy values in, and make the optimizer after moving the model"
                )
            grad = segment.param.grad
            if grad is not view:
                if grad is None:
                    view.zero_()
                else:
                    views.append(view)
                    grads.append(grad)
                segment.param.grad = view
        if views:
            torch._foreach_copy_(views, grads)


def _lay_out(params: Mapping[str, nn.Parameter]) -> tuple[list[_Segment], int, int]:
    """Segments in the order of ``params``, Q and F. Each begins with a block; those with 8-bit moments come first."""
    starts: dict[str, int] = {}
    sizes = []
    end = 0
    for small in (False, True):
        begin = end
        for name, param in params.items():
            if (param.numel() < MIN_8BIT_SIZE) == small:
                starts[name] = end
                end += _up(param.numel(), BLOCK)
        end = begin + _up(end - begin, SECTION)
        sizes.append(end - begin)
    if not sum(sizes):
        sizes[1] = SECTION  # parameters without an element: a step of nothing but padding is still a step
    segments = [_Segment(name, p, starts[name], p.numel() < MIN_8BIT_SIZE) for name, p in params.items()]
    return segments, sizes[0], sizes[1]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _on_cpu(state: AdamW8bitState) -> AdamW8bitState:
    """One copy for each tensor of the state, not for each parameter."""
    return AdamW8bitState(*(value.detach().to("cpu") for value in state))


def _check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> int:
    """The number of steps in a saved state that fits."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name)
        if have is None:
            continue
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {tuple(have.shape)} {have.dtype}, not {tuple(want.shape)} {want.dtype}")
        elif name in ("qmap1", "qmap2") and not torch.equal(have.to(want.device), want):
            problems.append(f"{name} is another 8-bit code")
    steps: dict[int, str] = {}
    for name in () if problems else expected:
        if name.endswith(".step"):
            steps.setdefault(int(found[name]), name)
    if len(steps) > 1:
        problems.append(f"{' and '.join(f'{name} is {step}' for step, name in steps.items())}, not all the same")
    problems += [f"{name} is {step}, below 0" for step, name in steps.items() if step < 0]
    if problems:
        shown = "; ".join(problems[:_PROBLEMS_SHOWN])
        raise ValueError(f"tensors must be a state of these parameters, got {len(problems)} differences: {shown}")
    return next(iter(steps))


def _seed(seed: int | None, param: Tensor) -> Tensor | None:
    if seed is None:
        return None
    check_choice("params' dtype with rounding_seed", param.dtype, (torch.bfloat16,))
    if not 0 <= seed < 2**63:
        raise ValueError(f"rounding_seed must be in [0, 2^63), got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=param.device)


def _check_lr(lr: float) -> None:
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and at least 0, got {lr}")


def _check_params(params: Mapping[str, nn.Parameter]) -> None:
    if not params:
        raise ValueError("params must name at least one parameter, got none")
    first_name, first = next(iter(params.items()))
    check_choice(f"params[{first_name!r}].dtype", first.dtype, DTYPES)
    owners: dict[int, str] = {}
    for name, param in params.items():
        if not param.requires_grad:
            raise ValueError(f"params[{name!r}] must require a gradient, got requires_grad=False")
        if param.dtype != first.dtype or param.device != first.device:
            raise ValueError(
                f"params[{name!r}] must be {first.dtype} on {first.device} like {first_name!r}, "
                f"got {param.dtype} on {param.device}"
            )
        if param.numel() and owners.setdefault(param.data_ptr(), name) != name:
            raise ValueError(f"params[{name!r}] must have memory of its own, got that of {owners[param.data_ptr()]!r}")
