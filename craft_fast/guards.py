"""What watches a training from outside: steps that become many times slower, memory that is more than the card has.

Drivers on Windows, and in its Linux subsystem, do not let a program run out of GPU memory: they move some of it into
the machine's, and every step waits for it. Reported are 73 to 295 s a step where 1 to 2 s are usual (kohya_ss issues
1730, 1524 and 3296), a slowdown of 30 to 200 times that nothing says the reason of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

SLOWDOWN = 8.0
IN_A_ROW = 3
BASELINE_STEPS = 5
_RECENT = 20
_FAR_ABOVE = 2.0
_FAR_ABOVE_BYTES = 2 * 2**30

SPILL_HINT = (
    "On Windows, for WSL too, set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback' in the "
    "NVIDIA control panel. To need less: a cap below the card's size with --vram, a smaller train.micro_batch_size, "
    "train.gradient_checkpointing: all, and no other programs on this GPU."
)


class StepWatch:
    """Tells once when steps take more than ``SLOWDOWN`` times what they did, several in a row.

    It has no clock: whoever measures leaves out what is no step, such as sample images, checkpoints and steps in which
    something is compiled or recorded.
    """

    def __init__(self) -> None:
        self._normal: deque[float] = deque(maxlen=_RECENT)
        self._slow: list[float] = []
        self._told = False

    def observe(self, seconds: float) -> str | None:
        """Take note of one step.

        Args:
            seconds: what it took, > 0.

        Returns:
            What to tell the user, with what to do about it; None where there is nothing to tell.
        """
        if self._told:
            return None
        usual = typical(self._normal)
        if len(self._normal) < BASELINE_STEPS or seconds <= SLOWDOWN * usual:
            # A slow step is no part of what is usual, or a lasting slowdown would become it.
            self._normal.append(seconds)
            self._slow.clear()
            return None
        self._slow.append(seconds)
        if len(self._slow) < IN_A_ROW:
            return None
        self._told = True
        slow = typical(self._slow)
        return (
            f"The last {len(self._slow)} steps took {slow:.2f} s each, {slow / usual:.0f} times the {usual:.2f} s "
            f"of those before. Most likely the driver is moving GPU memory to system RAM. {SPILL_HINT}"
        )


def typical(seconds: Sequence[float]) -> float:
    """Median of the faster half: what a step takes where nothing is in its way; 0 without any."""
    if not seconds:
        return 0.0
    ordered = sorted(seconds)
    best = ordered[: (len(ordered) + 1) // 2]
    return best[len(best) // 2]


def memory_warning(*, allocated_bytes: int, reserved_bytes: int, total_bytes: int) -> str | None:
    """What a process's GPU memory after its first steps says about the rest of a training.

    Args:
        allocated_bytes: the most that tensors took.
        reserved_bytes: the most that was taken from the driver.
        total_bytes: what the card has.

    Returns:
        What to tell the user, or None.
    """
    if reserved_bytes > total_bytes:
        return (
            f"{_gib(reserved_bytes)} of GPU memory are in use on a card of {_gib(total_bytes)}: the driver keeps the "
            f"rest in system RAM, and steps are many times slower for it. {SPILL_HINT}"
        )
    if reserved_bytes > _FAR_ABOVE * allocated_bytes and reserved_bytes - allocated_bytes > _FAR_ABOVE_BYTES:
        return (
            f"{_gib(reserved_bytes)} of GPU memory are reserved for {_gib(allocated_bytes)} of tensors: it is cut into "
            "pieces. If memory becomes short, set the environment variable "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
        )
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
