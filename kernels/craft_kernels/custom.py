"""One op in two coats around the same functions: what ``torch.compile`` sees, and what an eager call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def differentiable(
    name: str,
    forward: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register ``forward`` as a custom op with its gradient, and give back what to call.

    Under ``torch.compile`` the call is ``torch.ops.craft_kernels.<name>``, a node that the compiler does not look into.
    In eager mode it is a ``torch.autograd.Function`` of the same three functions: the dispatcher's way through a Python
    custom op and back was measured at 61 us for forward and backward, the direct one at 27 us, and an adapter's
    560 layers pay it each step.

    Args:
        name: name of the op within ``craft_kernels``.
        forward: positional tensors and numbers to a tensor or a tuple of them, every one freshly allocated, with
            annotations from which ``torch.library`` reads the schema.
        fake: the same on shapes alone.
        setup_context: ``(ctx, inputs, output)``, keeps what backward needs.
        backward: ``(ctx, *grads)`` to one gradient, or None, for each input.
    """
    op = torch.library.custom_op(f"craft_kernels::{name}", forward, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
    # A second derivative is an error: taken through a kernel's gradient it would silently be a wrong one.
    once = torch.autograd.function.once_differentiable(backward)

    # One forward that also keeps: given a setup_context of its own, Function.apply binds the arguments to the signature
    # of forward in every call, 31 us for the eleven of lora_linear.
    def run(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(once)}
    direct: Any = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        return op(*args) if _traced(args) else direct.apply(*args)

    return call


def plain(name: str, forward: Callable[..., Any], *, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``forward`` as a custom op without a gradient; an eager call goes straight to it."""
    op = torch.library.custom_op(f"craft_kernels::{name}", forward, mutates_args=())
    op.register_fake(fake)

    def call(*args: Any) -> Any:
        return op(*args) if _traced(args) else forward(*args)

    return call


def _traced(args: tuple[Any, ...]) -> bool:
    """Whether a compiler looks on: Dynamo says so; AOTAutograd, which runs backward functions, wraps the tensors."""
    return torch.compiler.is_compiling() or any(
        isinstance(arg, Tensor) and type(arg) not in (Tensor, Parameter) for arg in args
    )
