"""Where the judges agree and where they part: pure functions on scores before and after.

Rewards that rise while held-out judges fall are how exploitation begins, so prompts on which that happened are named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from craft_fast.records import Candidate
from craft_fast.report.inputs import Pair

CLEAR = 0.25
"""A smaller share of a judge's usual change is no movement: half of all prompts would be named by chance."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two judges on the same prompts.

    Attributes:
        first: name.
        second: name.
        same: share of the prompts on which both scores changed, where both rose or both fell; None without any.
        moved: how many those prompts are.
        rho: Spearman's rank correlation of the changes over all prompts that both judged; None where it is not defined.
    """

    first: str
    second: str
    same: float | None
    moved: int
    rho: float | None


@dataclass(frozen=True, slots=True)
class Within:
    """Two rewards on candidates: correlation of ranks within groups, pooled; None where it is not defined."""

    first: str
    second: str
    rho: float | None
    groups: int


@dataclass(frozen=True, slots=True)
class Parting:
    """A prompt on which the training rewards clearly rose and the held-out judges clearly fell.

    Attributes:
        n: number of the prompt, from 1.
        pair: the prompt.
        training: mean change over the training rewards, each in units of its root mean square change.
        held_out: likewise of the held-out judges.
    """

    n: int
    pair: Pair
    training: float
    held_out: float


def change(pair: Pair, reward: str) -> float | None:
    """``tuned - base`` of one reward on one prompt; None where a score is missing or not finite."""
    if reward not in pair.base_scores or reward not in pair.tuned_scores:
        return None
    value = pair.tuned_scores[reward] - pair.base_scores[reward]
    return value if math.isfinite(value) else None


def changes(pairs: Sequence[Pair], reward: str) -> list[float]:
    """Every change of one reward that there is, in the prompts' order."""
    return [value for pair in pairs if (value := change(pair, reward)) is not None]


def size_of_change(pairs: Sequence[Pair], reward: str) -> float:
    """Root mean square change of a reward over the prompts: what its changes are held against; 0 where none moved."""
    found = changes(pairs, reward)
    return math.sqrt(math.fsum(value * value for value in found) / len(found)) if found else 0.0


def agreements(pairs: Sequence[Pair], rewards: Sequence[str]) -> list[Agreement]:
    """Every two judges, in the order of ``rewards``."""
    return [_agreement(pairs, first, second) for first, second in combinations(rewards, 2)]


def _agreement(pairs: Sequence[Pair], first: str, second: str) -> Agreement:
    found = [(change(pair, first), change(pair, second)) for pair in pairs]
    both = [(one, two) for one, two in found if one is not None and two is not None]
    moved = [(one > 0) == (two > 0) for one, two in both if one and two]
    same = sum(moved) / len(moved) if moved else None
    return Agreement(first, second, same, len(moved), spearman([one for one, _ in both], [two for _, two in both]))


def lowest(found: Sequence[Agreement], held_out: Mapping[str, bool], *, least: int = 6) -> Agreement | None:
    """The two judges that agree least: a training reward and a held-out one where there are such, else any two.

    Args:
        found: all pairs.
        held_out: by judge.
        least: pairs that have fewer prompts in common say too little.
    """
    known = [item for item in found if item.same is not None and item.moved >= least]
    across = [item for item in known if held_out.get(item.first) is not held_out.get(item.second)]
    return min(across or known, key=lambda item: item.same or 0.0, default=None)


def partings(pairs: Sequence[Pair], held_out: Mapping[str, bool]) -> list[Parting]:
    """Prompts on which the training rewards rose and the held-out judges fell by ``CLEAR``, the widest apart first.

    Args:
        pairs: the evaluated prompts.
        held_out: by judge.
    """
    scale = {name: size_of_change(pairs, name) for name in held_out}

    def mean(pair: Pair, which: bool) -> float:
        values = [
            value / scale[name]
            for name, is_held_out in held_out.items()
            if is_held_out is which and scale[name] and (value := change(pair, name)) is not None
        ]
        return math.fsum(values) / len(values) if values else 0.0

    found = [Parting(n, pair, mean(pair, False), mean(pair, True)) for n, pair in enumerate(pairs, 1)]
    apart = [item for item in found if item.training > CLEAR and item.held_out < -CLEAR]
    return sorted(apart, key=lambda item: item.held_out - item.training)


def within_groups(
    candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, float]], rewards: Sequence[str]
) -> list[Within]:
    """Every two rewards on the candidates, ranked within each group.

    Ranks less their group's mean are pooled over all groups before they are correlated, so that easy and hard prompts
    do not count as agreement.

    Args:
        candidates: all members of all groups.
        scores: by candidate and reward.
        rewards: names.
    """
    groups: dict[str, list[str]] = {}
    for row in candidates:
        groups.setdefault(row.prompt_id, []).append(row.candidate_id)
    return [_within(groups, scores, first, second) for first, second in combinations(rewards, 2)]


def _within(
    groups: Mapping[str, Sequence[str]], scores: Mapping[str, Mapping[str, float]], first: str, second: str
) -> Within:
    one: list[float] = []
    two: list[float] = []
    used = 0
    for members in groups.values():
        rows = [scores[name] for name in members if name in scores]
        rows = [row for row in rows if all(math.isfinite(row.get(name, math.nan)) for name in (first, second))]
        if len(rows) < 2:
            continue
        used += 1
        middle = (len(rows) + 1) / 2
        one += [rank - middle for rank in ranks([row[first] for row in rows])]
        two += [rank - middle for rank in ranks([row[second] for row in rows])]
    return Within(first, second, pearson(one, two), used)


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None below three pairs or where one does not vary."""
    return pearson(ranks(one), ranks(two)) if len(one) >= 3 else None


def pearson(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one of them does not vary."""
    if not one:
        return None
    mean_one, mean_two = math.fsum(one) / len(one), math.fsum(two) / len(two)
    left, right = [value - mean_one for value in one], [value - mean_two for value in two]
    norm = math.sqrt(math.fsum(a * a for a in left) * math.fsum(b * b for b in right))
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(left, right, strict=True)) / norm)) if norm else None


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties at the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in order[start : end + 1]:
            result[position] = (start + end) / 2 + 1
        start = end + 1
    return result
