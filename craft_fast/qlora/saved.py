"""What autograd keeps for backward, unit by unit: measured, not calculated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.qlora.recompute import unit_names

REST = ""  # the part of the UNet that is in no unit


@dataclass(frozen=True)
class Saved:
    """One storage that is kept.

    Attributes:
        unit: the unit that was the first to keep it, or ``REST``.
        shape: of the tensor that was kept first.
        dtype: of that tensor.
        nbytes: of the whole storage.
    """

    unit: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def saved_tensors(unet: nn.Module, run: Callable[[], Any]) -> list[Saved]:
    """What is kept after ``run``, each storage once; parameters and buffers of ``unet`` are not counted.

    On the meta device too, where a full-size network costs nothing; attention is then what PyTorch chooses there.

    Args:
        unet: the network that ``run`` calls.
        run: a forward under autograd; its result is held until all is counted.
    """
    weights: list[Tensor] = [*unet.parameters(), *unet.buffers(), *_packed(unet)]
    owned = {t.untyped_storage()._cdata for t in weights}
    found: list[Saved] = []
    with _current_unit(unet) as stack:

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                owned.add(storage._cdata)
                found.append(Saved(stack[-1], tuple(tensor.shape), tensor.dtype, storage.nbytes()))
            return tensor

        # The graph that `result` holds keeps what was saved alive, so no address comes twice.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run()
    del result
    return found


def saved_bytes_by_unit(unet: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Bytes of ``saved_tensors`` by unit name; ``""`` is the rest. A tensor that two keep is the first one's."""
    total = dict.fromkeys([*unit_names(unet), REST], 0)
    for one in saved_tensors(unet, run):
        total[one.unit] += one.nbytes
    return total


def _packed(unet: nn.Module) -> Iterator[Tensor]:
    """The scales of bitsandbytes' layers, which are neither parameters nor buffers."""
    for module in unet.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (value for value in vars(part or object).values() if isinstance(value, Tensor))


@contextmanager
def _current_unit(unet: nn.Module) -> Iterator[list[str]]:
    stack = [REST]
    handles = []
    for name in unit_names(unet):
        unit = unet.get_submodule(name)
        handles.append(unit.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(unit.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
