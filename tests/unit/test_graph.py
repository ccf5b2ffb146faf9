"""Static buffers and what is refused; recording itself needs a GPU and is in ``tests/gpu/test_graph_gpu.py``."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from craft_fast.sdxl import graph
from craft_fast.sdxl.graph import Replay, compile_blocks
from craft_fast.tiny.random_model import _unet


class Copies(TorchDispatchMode):
    """Counts copies between tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_results_are_those_of_the_function() -> None:
    replay = Replay(lambda *, x, y: (x @ y, x.sum()), record=False)
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(3, 5, generator=draw), torch.randn(5, 2, generator=draw)
        product, total = replay(x=x, y=y)
        assert torch.equal(product, x @ y)
        assert torch.equal(total, x.sum())
    assert not replay.recorded


def test_the_function_always_sees_the_same_memory_and_never_the_caller_s() -> None:
    seen: list[int] = []

    def spoil(*, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x.mul_(2).clone()

    replay = Replay(spoil, record=True)  # on a CPU nothing is recorded
    inputs = [torch.full((4,), float(value)) for value in range(4)]
    for value, tensor in enumerate(inputs):
        assert torch.equal(replay(x=tensor), torch.full((4,), 2.0 * value))
        assert torch.equal(tensor, torch.full((4,), float(value)))
    assert len(set(seen)) == 1
    assert not replay.recorded
    assert not replay.fallback


def test_backward_inside() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    weight.grad = buffer = torch.zeros(3)

    def step(*, x: torch.Tensor) -> torch.Tensor:
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach()

    replay = Replay(step, record=False)
    for _ in range(3):
        replay(x=torch.tensor([1.0, 0.0, -1.0]))
    assert weight.grad is buffer
    assert torch.equal(buffer, torch.tensor([3.0, 0.0, -3.0]))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(3), "y": torch.zeros(2)},
        {"x": torch.zeros(2, dtype=torch.float64), "y": torch.zeros(2)},
        {"x": torch.zeros(2, device="meta"), "y": torch.zeros(2)},
        {"x": torch.zeros(2)},
        {"x": torch.zeros(2), "y": torch.zeros(2), "z": torch.zeros(2)},
    ],
    ids=["shape", "dtype", "device", "missing", "more"],
)
def test_other_inputs_are_refused(other: dict[str, torch.Tensor]) -> None:
    calls: list[int] = []
    replay = Replay(lambda *, x, y: calls.append(1), record=False)
    replay(x=torch.zeros(2), y=torch.zeros(2))
    with pytest.raises(ValueError, match="each time"):
        replay(**other)
    assert calls == [1]
    replay.release()
    if len(other) == 2 and other["x"].device.type == "cpu":
        replay(**other)
        assert calls == [1, 1]


def test_inputs_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device"):
        Replay(lambda **_: None, record=False)(x=torch.zeros(2), y=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="warmup"):
        Replay(lambda **_: None, record=False, warmup=0)


def test_what_has_not_changed_is_not_copied_again() -> None:
    replay = Replay(lambda *, x, y: x + y, record=False)
    x, y = torch.zeros(2), torch.ones(2)
    with Copies() as copies:
        for add in (0, 0, 1, 0):
            if add:
                y.add_(add)
            assert torch.equal(replay(x=x, y=y), x + y)
    assert copies.count == 3  # both once, and one of them after it had changed
    with Copies() as copies:
        assert torch.equal(replay(x=torch.full((2,), 5.0), y=y), torch.full((2,), 7.0))
        assert torch.equal(replay(x=x, y=y), x + y)
    assert copies.count == 2


def test_results_that_a_graph_fills_are_found() -> None:
    one, two = torch.zeros(1), torch.zeros(1)
    with torch.inference_mode():
        uncounted = torch.zeros(1)
    result = {"a": one, "b": [(two, None), uncounted], "c": 3.0}
    assert [id(tensor) for tensor in graph._tensors(result)] == [id(one), id(two)]


def test_inputs_are_not_kept() -> None:
    replay = Replay(lambda *, x: x.sum(), record=False)
    x = torch.zeros(2)
    replay(x=x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_first_call_in_inference_mode() -> None:
    """Tensors of that mode do not count their changes, and buffers made in it could not be written to outside."""
    replay = Replay(lambda *, x: x * 2, record=False)
    with torch.inference_mode():
        x = torch.ones(2)
        for value in (1.0, 3.0):
            x.fill_(value)
            assert torch.equal(replay(x=x), torch.full((2,), 2 * value))
    assert torch.equal(replay(x=torch.full((2,), 4.0)), torch.full((2,), 8.0))


def test_an_error_of_the_function_is_the_caller_s() -> None:
    fail = [True]

    def fn(*, x: torch.Tensor) -> torch.Tensor:
        if fail[0]:
            raise torch.OutOfMemoryError("injected")
        return x + 1

    replay = Replay(fn, record=False)
    with pytest.raises(torch.OutOfMemoryError):
        replay(x=torch.zeros(1))
    fail[0] = False
    assert replay(x=torch.zeros(1)) == 1


def test_a_shortage_of_memory_is_found_behind_the_error_that_hides_it() -> None:
    hidden, shown = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore"),
        RuntimeError("ended"),
    )
    shown.__context__ = hidden
    assert graph._is_out_of_memory(shown)
    assert graph._first_line(shown) == "CUDA out of memory. Tried to allocate 2.00 MiB"
    assert graph._is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not graph._is_out_of_memory(RuntimeError("operation not permitted when stream is capturing"))


def test_each_block_is_compiled_once() -> None:
    """Whether or not it recomputes, and whenever that is told."""
    from craft_fast.qlora.recompute import recompute, unit_names

    unet = _unet()
    names = [name for name in unit_names(unet) if "transformer_blocks" in name]
    recompute(unet, kept=[name for name in unit_names(unet) if name != names[0]])
    assert compile_blocks(unet) == len(names)
    recompute(unet, kept=[name for name in unit_names(unet) if name != names[1]])
    assert compile_blocks(unet) <= 1  # the one of which recomputation was undone
    recompute(unet, kept=[])
    assert compile_blocks(unet) == 0
