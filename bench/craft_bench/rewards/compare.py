"""Are two forms' scores the same? Asked of every form before it is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from craft_bench.rewards.cases import OURS
from craft_bench.rows import Row

# Largest deviation from ours in float32, of a cosine. Measured on a CPU with random weights: ViT-H/14 9.8e-5 in float16
# and 1.0e-3 in bfloat16, ViT-B/32 1.2e-4 and 1.6e-3, MPS 9.6e-5 and 4.5e-4 (4 pictures each).
ALLOWED = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# A rival prepares its pixels by another library, and computes in its own precision.
ALLOWED_RIVAL = {"float32": 1e-3, "amp": 3e-3}
# Where a head ends the network, a score has no scale of its own: of the scores' spread over the pictures. Measured:
# 1 % and 8 % with LAION's head, 0.3 % and 2.7 % with ImageReward's.
ALLOWED_OF_SPREAD = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4, "amp": 0.1}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far scores are from the reference's.

    Attributes:
        largest, mean: of the absolute differences, in the score's unit.
        spread: standard deviation of the reference's scores over the pictures: what a deviation is to be seen beside.
        allowed: the most that counts as right.
        pictures: how many.
        finite: whether all are numbers.
    """

    largest: float
    mean: float
    spread: float
    allowed: float
    pictures: int
    finite: bool

    @property
    def right(self) -> bool:
        """Whether they are the same scores; where all pictures score alike, that cannot be said."""
        return self.finite and self.spread > 0 and self.largest <= self.allowed

    def fields(self) -> Row:
        """For a row."""
        found = asdict(self)
        found.pop("finite")
        return found if self.finite else found | {"largest": None, "mean": None}


def compare(found: Tensor, reference: Tensor, unit: float | None, impl: str, dtype: str) -> Deviation:
    """Hold scores against ours in float32.

    Args:
        found: float [N].
        reference: float [N], of the same pictures and prompts.
        unit: score of a cosine of 1; None where a head ends the network.
        impl: whose they are.
        dtype: that they were computed in.

    Raises:
        ValueError: there are not equally many.
    """
    if found.shape != reference.shape:
        raise ValueError(f"{tuple(found.shape)} scores instead of {tuple(reference.shape)}")
    apart = (found.double() - reference.double()).abs()
    spread = float(reference.double().std())
    if unit is None:
        allowed = ALLOWED_OF_SPREAD[dtype] * spread
    else:
        allowed = (ALLOWED if impl == OURS else ALLOWED_RIVAL)[dtype] * unit
    finite = bool(found.isfinite().all())
    return Deviation(float(apart.max()), float(apart.mean()), spread, allowed, len(found), finite)
