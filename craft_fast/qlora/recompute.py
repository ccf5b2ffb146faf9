"""Activations kept for backward, or computed again in it, unit by unit (arXiv 1604.06174).

A unit is a ``ResnetBlock2D`` or a ``BasicTransformerBlock``: what recomputes keeps its inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_fast.errors import ConfigError
from craft_fast.quiet import import_bitsandbytes, quiet_third_party

quiet_third_party()


def unit_names(unet: nn.Module) -> list[str]:
    """Names of all units of ``unet``, in the order in which it holds them."""
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [name for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)]


def recompute(unet: nn.Module, kept: Collection[str]) -> None:
    """Have all units that are not in ``kept`` recompute in backward; replaces what an earlier call chose.

    Loss and gradients are the same to the bit. Without gradients, as in sampling, a unit runs as it did. Nothing waits
    for the device and no state of a random generator is saved, so a CUDA graph can hold it. Units may be compiled:
    after this call, since a compiled ``forward`` that stands where this one stood is not looked into by the next call.

    Args:
        unet: a diffusers UNet in any form; changed in place, by an attribute of each unit.
        kept: names from ``unit_names``; with all of them nothing recomputes and every unit is as it was.

    Raises:
        ValueError: a name is not a unit's.
        ConfigError: a unit draws random numbers (dropout), which would not be the same the second time.
    """
    names = unit_names(unet)
    unknown = sorted(set(kept) - set(names))
    if unknown:
        raise ValueError(f"kept must hold names of units, got {unknown[:3]}")
    for name in names:
        unit: Any = unet.get_submodule(name)
        _restore(unit)
        if name in kept:
            continue
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in unit.modules()):
            raise ConfigError(
                "A block with dropout cannot be computed again in backward.",
                where=f"unet {name}",
                why="dropout draws other numbers the second time; found a probability above 0 in the UNet's config",
                hint="Set train.gradient_checkpointing: none, or dropout: 0.0 in the UNet's config.json.",
            )
        unit.forward = _Recomputed(unit.forward, unit.__dict__.get("forward"))


class _Recomputed:
    """A unit's forward, of which autograd keeps the inputs only.

    Args:
        inner: the forward.
        shadowed: the unit's own attribute of that name, if it had one.
    """

    def __init__(self, inner: Callable[..., Any], shadowed: Any) -> None:
        self.inner, self.shadowed = inner, shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        return checkpoint(self.inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _restore(unit: nn.Module) -> None:
    found = unit.__dict__.get("forward")
    if isinstance(found, _Recomputed):
        if found.shadowed is None:
            del unit.__dict__["forward"]
        else:
            unit.__dict__["forward"] = found.shadowed
