"""Recording on a GPU: the same bits as without, and a failure that costs nothing but speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from craft_fast.sdxl.graph import Replay
from craft_fast.sdxl.load import free_memory

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(autouse=True)
def _stream_stays() -> Iterator[None]:
    before = torch.cuda.current_stream()
    yield
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def test_a_recorded_function_follows_its_inputs() -> None:
    runs: list[int] = []

    def fn(*, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        runs.append(1)
        return torch.softmax(x @ y, -1), x.sum()

    replay = Replay(fn, record=True)
    for seed in range(8):
        x, y = randn(64, 32, seed=seed), randn(32, 16, seed=seed + 100)
        product, total = replay(x=x, y=y)
        assert replay.recorded == (seed >= 2)
        assert torch.equal(product, torch.softmax(x @ y, -1))
        assert torch.equal(total, x.sum())
    assert len(runs) == 3  # two that warm up, one that is recorded
    assert not replay.fallback


def test_an_input_that_was_changed_in_place_is_seen() -> None:
    replay = Replay(lambda *, x: x * 2, record=True)
    x = torch.zeros(4, device="cuda")
    for value in range(6):
        x.fill_(value)
        assert torch.equal(replay(x=x), torch.full_like(x, 2 * value))
        assert torch.equal(replay(x=x), torch.full_like(x, 2 * value))


def test_a_graph_s_result_is_another_one_s_input() -> None:
    """The same tensor each time, filled by the graph and not by torch: it has to be copied nevertheless."""
    first, second = (Replay(lambda *, x: x + 1, record=True) for _ in range(2))
    for value in range(8):
        middle = first(x=torch.full((4,), float(value), device="cuda"))
        assert torch.equal(second(x=middle), torch.full((4,), value + 2.0, device="cuda"))
    assert first.recorded
    assert second.recorded


@pytest.mark.parametrize("record", [False, True])
def test_backward_into_static_gradients(record: bool) -> None:
    layer = torch.nn.Linear(32, 32).cuda()
    flat = torch.zeros(32 * 32 + 32, device="cuda")
    layer.weight.grad, layer.bias.grad = flat[: 32 * 32].view(32, 32), flat[32 * 32 :]

    def fn(*, x: torch.Tensor) -> torch.Tensor:
        loss = layer(x).square().mean()
        loss.backward()
        return loss.detach()

    replay = Replay(fn, record=record)
    for seed in range(6):
        flat.zero_()
        x = randn(8, 32, seed=seed)
        losses = [replay(x=x).clone() for _ in range(2)]  # gradients add up, as those of two micro-batches
        expected = torch.autograd.grad(layer(x).square().mean(), [layer.weight, layer.bias])
        assert torch.equal(losses[0], losses[1])
        assert torch.allclose(flat[: 32 * 32].view(32, 32), 2 * expected[0], atol=1e-6)
        assert torch.allclose(flat[32 * 32 :], 2 * expected[1], atol=1e-6)


def test_weights_that_change_between_calls_are_seen() -> None:
    weight = torch.ones(4, device="cuda")
    replay = Replay(lambda *, x: x * weight, record=True)
    x = torch.full((4,), 3.0, device="cuda")
    for factor in range(6):
        weight.fill_(factor)
        assert torch.equal(replay(x=x), 3 * weight)


def test_what_cannot_be_recorded_goes_on_without() -> None:
    told: list[str] = []

    def fn(*, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum().item())  # takes a value from the device

    replay = Replay(fn, record=True, on_fallback=told.append)
    for value in range(1, 7):
        x = torch.full((3,), float(value), device="cuda")
        assert torch.equal(replay(x=x), x * 3 * value)
    assert len(told) == 1
    assert replay.fallback
    assert not replay.recorded
    # And another function can still be recorded.
    other = Replay(lambda *, x: x + 1, record=True, on_fallback=told.append)
    for value in range(5):
        assert torch.equal(other(x=torch.full((3,), float(value), device="cuda")), torch.full_like(x, value + 1))
    assert other.recorded
    assert len(told) == 1


def test_any_error_while_recording_goes_on_without() -> None:
    told: list[str] = []

    def fn(*, x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("not while recording")
        return x + 1

    replay = Replay(fn, record=True, on_fallback=told.append)
    for value in range(5):
        assert torch.equal(replay(x=torch.full((3,), float(value), device="cuda")).cpu(), torch.full((3,), value + 1.0))
    assert told == ["'not while recording'"]


def test_a_shortage_while_recording_is_the_caller_s_and_can_be_tried_again() -> None:
    told: list[str] = []
    fail = [True]

    def fn(*, x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and fail[0]:
            return x + torch.empty(2**50, device="cuda", dtype=torch.uint8)[:1]
        return x + 1

    replay = Replay(fn, record=True, on_fallback=told.append)
    x = torch.zeros(3, device="cuda")
    for _ in range(2):
        replay(x=x)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            replay(x=x)
    fail[0] = False
    assert torch.equal(replay(x=x), torch.ones_like(x))
    assert replay.recorded
    assert told == []


def test_memory_comes_back() -> None:
    def fn(*, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x * i for i in range(1, 9)]).sum()

    x = torch.ones(8 * MIB, device="cuda")  # 32 MiB
    free_memory()
    before = torch.cuda.memory_reserved()
    replay = Replay(fn, record=True)
    for _ in range(4):
        replay(x=x)
    assert torch.cuda.memory_reserved() - before > 256 * MIB
    replay.release()
    assert torch.cuda.memory_reserved() - before < 64 * MIB
    assert float(replay(x=x)) == pytest.approx(36 * 8 * MIB)
    replay.release()
    for _ in range(4):
        replay(x=x)
    assert replay.recorded
    del replay
    free_memory()
    assert torch.cuda.memory_reserved() - before < 64 * MIB


def test_memory_of_a_failed_recording_comes_back() -> None:
    def fn(*, x: torch.Tensor) -> torch.Tensor:
        big = torch.stack([x * i for i in range(1, 9)])
        return big.sum() * float(big[0, 0].item())

    x = torch.ones(8 * MIB, device="cuda")
    free_memory()
    before = torch.cuda.memory_reserved()
    replay = Replay(fn, record=True)
    for _ in range(4):
        replay(x=x)
    assert replay.fallback
    replay.release()
    del replay
    free_memory()
    assert torch.cuda.memory_reserved() - before < 64 * MIB


def test_graphs_share_memory() -> None:
    def fn(*, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x * i for i in range(1, 9)]).sum()

    x = torch.ones(8 * MIB, device="cuda")
    used: list[int] = []
    for shared in (False, True):
        free_memory()
        before = torch.cuda.memory_reserved()
        pool: Any = torch.cuda.graph_pool_handle() if shared else None
        replays = [Replay(fn, record=True, pool=pool) for _ in range(3)]
        for _ in range(4):
            assert [float(replay(x=x)) for replay in replays] == pytest.approx([36.0 * 8 * MIB] * 3)
        free_memory()
        used.append(torch.cuda.memory_reserved() - before)
        for replay in replays:
            replay.release()
    assert used[1] < 0.6 * used[0]


def test_in_inference_mode() -> None:
    weight = torch.nn.Parameter(torch.full((4,), 2.0, device="cuda"))
    replay = Replay(lambda *, x: x * weight, record=True)
    with torch.inference_mode():
        x = torch.ones(4, device="cuda")
        for value in range(5):
            x.fill_(value)
            assert torch.equal(replay(x=x), torch.full((4,), 2.0 * value, device="cuda"))
    assert replay.recorded
