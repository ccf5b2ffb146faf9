"""Steps that became many times slower are told of, once; what is slow for a reason is not."""

from __future__ import annotations

import pytest

from craft_fast.guards import BASELINE_STEPS, IN_A_ROW, SLOWDOWN, StepWatch, memory_warning, typical

GIB = 2**30


def told(seconds: list[float]) -> list[int]:
    watch = StepWatch()
    return [i for i, value in enumerate(seconds) if watch.observe(value) is not None]


def test_a_spill_is_told_once() -> None:
    steps = [1.2] * 10 + [140.0] * 8
    assert told(steps) == [10 + IN_A_ROW - 1]
    watch = StepWatch()
    text = next(filter(None, map(watch.observe, steps)))
    assert "140.00 s each, 117 times the 1.20 s" in text
    for word in ("CUDA - Sysmem Fallback Policy", "WSL", "--vram", "train.micro_batch_size"):
        assert word in text


@pytest.mark.parametrize("factor", [30, 200])
def test_reported_slowdowns_are_found(factor: int) -> None:
    assert told([1.0] * BASELINE_STEPS + [float(factor)] * 3) == [BASELINE_STEPS + 2]


def test_what_is_not_a_spill() -> None:
    usual = [1.0] * 20
    assert told(usual + [0.9 * SLOWDOWN] * 10) == []
    # Single slow steps: something else used the machine for a while.
    assert told(usual + [50.0, 50.0, 1.0] * 10) == []
    # A shared machine whose speed goes up and down.
    assert told([1.0, 3.0, 2.0, 6.0, 1.5, 4.0] * 10) == []
    # Slow from the first step on: nothing to compare with, that is the memory's matter.
    assert told([100.0] * 30) == []


def test_no_verdict_before_there_is_a_usual() -> None:
    assert told([1.0] * (BASELINE_STEPS - 1) + [100.0]) == []
    # One slow step while the usual is found does not hide what comes later.
    assert told([1.0, 60.0, 1.0, 1.0, 1.0, 1.0, 1.0] + [60.0] * 3) == [9]


def test_slow_steps_do_not_become_the_usual() -> None:
    assert told([1.0] * 6 + [20.0, 20.0, 1.0] * 30 + [20.0] * 3) == [98]


def test_steps_may_become_slower_in_small_steps() -> None:
    """A smaller micro-batch, then recomputation, then a longer prompt: each new, none a spill."""
    assert told([2.0**i for i in range(8) for _ in range(40)]) == []


def test_typical() -> None:
    assert typical([]) == 0.0
    assert typical([4.0]) == 4.0
    assert typical([9.0, 1.0, 2.0, 8.0]) == 2.0


@pytest.mark.parametrize(
    ("allocated", "reserved", "total", "word"),
    [
        (5.0, 5.5, 8.0, None),
        (7.5, 9.0, 8.0, "CUDA - Sysmem Fallback Policy"),
        (2.0, 5.0, 8.0, "cut into pieces"),
        (0.01, 0.1, 8.0, None),  # little models: nothing to save there
    ],
)
def test_memory_after_the_first_steps(allocated: float, reserved: float, total: float, word: str | None) -> None:
    text = memory_warning(
        allocated_bytes=int(allocated * GIB), reserved_bytes=int(reserved * GIB), total_bytes=int(total * GIB)
    )
    if word is None:
        assert text is None
    else:
        assert text is not None
        assert word in text
