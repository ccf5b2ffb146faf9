"""A shadow of autograd: ops on tensors that have a size and no content, to know when which memory is alive.

A network written with these ops is followed through forward, recomputation and backward in the order in which PyTorch
goes, and the ledger knows the peak in milliseconds and without PyTorch. Lifetimes are Python's own reference counts,
as they are for real tensors; an op says what it keeps for backward, from PyTorch's derivatives.yaml.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count


class Ledger:
    """Bytes alive now and at most, and the floating-point operations so far.

    Attributes:
        live: bytes alive.
        peak: most bytes alive at once.
        flops: of the ops that were run, a multiply-add counting as two.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.flops = 0.0
        self._order = count()
        self._stays: list[Storage] = []
        self._frame: _Frame | None = None

    # ---- memory

    def take(self, size: int) -> Storage:
        """Memory of ``size`` bytes that lives as long as something refers to it."""
        return Storage(self, size)

    def scratch(self, size: int) -> None:
        """Memory that an op takes and gives back inside itself."""
        self.peak = max(self.peak, self.live + size)

    def stay(self, size: int) -> None:
        """Memory that is never given back."""
        self._stays.append(self.take(size))

    def tensor(self, size: int, *, needs_grad: bool = False) -> Shadow:
        """A tensor that no op made."""
        return Shadow(self.take(size), size, _Node(self, next(self._order)) if needs_grad else None)

    # ---- ops

    def op(
        self,
        inputs: Sequence[Shadow],
        size: int,
        *,
        saved: Sequence[Shadow | int] = (),
        save_output: bool = False,
        grads: Sequence[str | None] = (),
        view: bool = False,
        flops: float = 0.0,
        scratch: int = 0,
        trained: bool = False,
        back_flops: float | None = None,
        back_scratch: int | None = None,
        leaves: int = 0,
        packs: bool = True,
    ) -> Shadow:
        """Run an op.

        Args:
            inputs: what it reads.
            size: bytes of its result.
            saved: inputs, or bytes made by the op itself, that are kept for backward.
            save_output: its result is kept, too.
            grads: for each input, what backward gives it: ``new``: a tensor of its size; ``same``: the memory of the
                gradient that came in, or a part of it; None: nothing.
            view: the result shares the first input's memory.
            flops: of forward.
            scratch: taken and given back in forward.
            trained: a parameter of its own gets a gradient, so it has a backward whatever its inputs are.
            back_flops: of backward; twice forward's if a parameter is trained, else as forward.
            back_scratch: of backward; forward's unless given.
            leaves: bytes of its parameters' gradients, which stay after backward.
            packs: keeps something for backward, be it only a weight: recomputation must come this far. It stops before
                the last such op computes, where that keeps nothing of its own making.
        """
        needs = trained or any(x.node is not None for x in inputs)
        kept = [x.storage for x in saved if isinstance(x, Shadow)]
        own = save_output or len(kept) < len(saved)
        frame = self._frame if needs and packs else None
        slot = frame.pack(kept) if frame is not None and not own else 0
        self.flops += flops
        if scratch:
            self.scratch(scratch)
        storage = inputs[0].storage if view else self.take(size)
        out = Shadow(storage, size, None)
        if not needs:
            return out
        kept += [self.take(x) for x in saved if isinstance(x, int)]
        if save_output:
            kept.append(storage)
        if frame is not None and own:
            slot = frame.pack(kept)
        node = _Node(self, next(self._order))
        node.parents = [x.node for x in inputs]
        node.sizes = [x.size for x in inputs]
        node.grads = list(grads)
        node.flops = back_flops if back_flops is not None else flops * (2 if trained else 1)
        node.scratch = scratch if back_scratch is None else back_scratch
        node.leaves = leaves
        if self._frame is None:
            node.kept = kept
        elif frame is not None:
            node.frame, node.slot = frame, slot
        out.node = node
        return out

    def recomputed(self, unit: Callable[..., Shadow], *inputs: Shadow) -> Shadow:
        """Run ``unit``, keep its inputs alone, and run it again in backward, up to the last op that keeps something.

        As ``torch.utils.checkpoint`` does without re-entrance.
        """
        if self._frame is not None:
            return unit(*inputs)
        frame = _Frame(self, unit, inputs)
        self._frame = frame
        try:
            return unit(*inputs)
        finally:
            self._frame = None

    def backward(self, out: Shadow, size: int) -> None:
        """Follow the gradients from ``out``, whose own has ``size`` bytes; the caller must have let go of it."""
        root = out.node
        if root is None:
            return
        root.gradient = self.take(size)
        ready = [(-root.order, root)]
        waiting = _uses(root)
        del out, root
        while ready:
            node = heapq.heappop(ready)[1]
            gradient, node.gradient = node.gradient, None
            parents = node.parents
            if gradient is not None:
                node.run(gradient)
            del gradient
            node.release()
            for parent in parents:
                if parent is not None:
                    waiting[parent.order] -= 1
                    if waiting[parent.order] == 0:
                        heapq.heappush(ready, (-parent.order, parent))


class Storage:
    """Memory; alive while referred to."""

    __slots__ = ("ledger", "size")

    def __init__(self, ledger: Ledger, size: int) -> None:
        self.ledger = ledger
        self.size = size
        ledger.live += size
        if ledger.live > ledger.peak:
            ledger.peak = ledger.live

    def __del__(self) -> None:
        self.ledger.live -= self.size


class Shadow:
    """A tensor without content: memory, bytes of its own, and the op that made it if a gradient is wanted."""

    __slots__ = ("node", "size", "storage")

    def __init__(self, storage: Storage, size: int, node: _Node | None) -> None:
        self.storage = storage
        self.size = size
        self.node = node


class _Node:
    """Backward of one op."""

    __slots__ = (
        "flops", "frame", "gradient", "grads", "kept", "leaves", "ledger", "order", "parents", "scratch", "sizes",
        "slot",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, order: int) -> None:
        self.ledger = ledger
        self.order = order
        self.parents: list[_Node | None] = []
        self.sizes: list[int] = []
        self.grads: list[str | None] = []
        self.kept: list[Storage] = []
        self.frame: _Frame | None = None
        self.slot = 0
        self.flops = 0.0
        self.scratch = 0
        self.leaves = 0
        self.gradient: Storage | None = None

    def run(self, gradient: Storage) -> None:
        """Give the inputs' nodes their gradients."""
        if self.frame is not None:
            self.kept = self.frame.unpack(self.slot)
        self.ledger.flops += self.flops
        if self.scratch:
            self.ledger.scratch(self.scratch)
        if self.leaves:
            self.ledger.stay(self.leaves)
        made = []
        for parent, size, kind in zip(self.parents, self.sizes, self.grads, strict=True):
            if parent is not None and kind is not None:
                made.append((parent, self.ledger.take(size) if kind == "new" else gradient, size))
        del gradient
        for parent, storage, size in made:
            parent.accept(storage, size)

    def accept(self, gradient: Storage, size: int) -> None:
        """Add up gradients; the sum is new memory."""
        self.gradient = gradient if self.gradient is None else self.ledger.take(size)

    def release(self) -> None:
        """Let go of what was kept."""
        self.kept = []
        self.frame = None
        self.parents = []

    def __lt__(self, other: _Node) -> bool:
        return self.order > other.order


def _uses(root: _Node) -> dict[int, int]:
    """For each node, how many others will give it a gradient."""
    uses: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        for parent in stack.pop().parents:
            if parent is None:
                continue
            uses[parent.order] = uses.get(parent.order, 0) + 1
            if parent.order not in seen:
                seen.add(parent.order)
                stack.append(parent)
    return uses


class _Stop(Exception):
    """All that backward needs was computed again."""


class _Frame:
    """One recomputed unit: its inputs, and what the second run keeps."""

    def __init__(self, ledger: Ledger, unit: Callable[..., Shadow], inputs: Sequence[Shadow]) -> None:
        self.ledger = ledger
        self.unit = unit
        self.inputs = [(x.storage, x.size, x.node is not None) for x in inputs]
        self.packed = 0
        self.again: _Again | None = None

    def pack(self, kept: Sequence[Storage]) -> int:
        """Note, in the first run, that an op keeps something; hold nothing of it."""
        self.packed += 1
        return self.packed - 1

    def unpack(self, slot: int) -> list[Storage]:
        """What the op of this slot keeps, computed again on the first call."""
        if self.again is None:
            self.again = _Again(self.packed)
            outer, self.ledger._frame = self.ledger._frame, self.again
            try:
                self.unit(*(self._detached(*x) for x in self.inputs))
            except _Stop:
                pass
            finally:
                self.ledger._frame = outer
        return self.again.kept.pop(slot, [])

    def _detached(self, storage: Storage, size: int, needs_grad: bool) -> Shadow:
        return Shadow(storage, size, _Node(self.ledger, 0) if needs_grad else None)


class _Again(_Frame):
    """The second run of a unit."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.kept: dict[int, list[Storage]] = {}

    def pack(self, kept: Sequence[Storage]) -> int:
        """Keep it, and stop after the last."""
        slot = len(self.kept)
        self.kept[slot] = list(kept)
        if slot + 1 == self.wanted:
            raise _Stop
        return slot
