"""Counts the bytes of tensors that are alive while real modules run, on any device, the meta device among them.

The truth that the formulas of ``craft_fast.sdxl.costs`` are held against: every op's results are seen as they are made,
and their storages as they die, so the peak is that of a caching allocator without rounding or fragmentation. What an
op takes and gives back inside itself (workspaces of libraries) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _product_in_place(_: Tensor, left: Tensor, right: Tensor, **options: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


# torch's counter knows addmm, and not the in-place form, of which the fused adapter is made.
FLOPS = {**flop_registry, torch.ops.aten.addmm_: _product_in_place}


class LiveBytes(TorchDispatchMode):
    """Live and peak bytes of tensors made inside the block.

    Attributes:
        live: bytes alive now.
        peak: the most so far.
        flops: of matrix products, convolutions and attention, as ``torch.utils.flop_counter`` counts them (a
            multiply-add counts as two).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before the block does not count, nor do its views.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.see(leaf, made_here=False)
        out = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func.overloadpacket):
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def see(self, tensor: Tensor, *, made_here: bool = True) -> None:
        """Count a tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if made_here else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live


@contextmanager
def flash_attention() -> Iterator[None]:
    """On the meta device, attention as a GPU has it, which keeps its result and a float32 a row, not the scores."""
    whole = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return whole(query, key, value, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)[0]  # type: ignore[no-any-return]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = whole
