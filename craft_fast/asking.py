"""Which candidates which reward is asked about, so that the filter's verdicts come out the same with fewer questions.

Rewards that nothing but the filter needs are asked lazily: about member 0 of a group and the variants that every
reward asked before has let through. A verdict I_S(i, j) (design.md section 1, item 2) is a product: one factor 0
decides it. Pure functions on names and numbers; no torch here. ``members`` are the scores of one group's members, by
reward, with member 0 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from craft_fast.config import FilterSettings, RewardSettings, ScoreSettings, TrainSettings
from craft_fast.errors import CraftError, ResourceError

Members = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Asked:
    """Which rewards judge candidates, and how; held-out rewards are not among them.

    Attributes:
        everyone: rewards that are asked about every candidate.
        lazy: rewards that are asked about candidates which the others let through, in the filter's order.
        weights: w_m of the rewards that make r_total: those that every candidate has, and whose weight is not 0.
    """

    everyone: tuple[str, ...]
    lazy: tuple[str, ...]
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Lazily:
    """How one block's lazy rewards are asked.

    Attributes:
        rewards: the lazy ones.
        others: the other rewards of S, which have been asked about everyone.
        keep: ``filter.keep``.
        rejected: by lazy reward, of how many variants of earlier blocks it rejected how many: (rejected, asked).
    """

    rewards: tuple[str, ...]
    others: tuple[str, ...]
    keep: str
    rejected: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def who_is_asked(
    rewards: Mapping[str, RewardSettings], filtering: FilterSettings, train: TrainSettings, score: ScoreSettings
) -> Asked:
    """Who must be asked about everyone.

    r_total needs every candidate's score of each reward with a weight, as its means are over all of them. Under uniform
    weights and the first N accepted, r_total decides nothing; then every reward of the filter may be lazy, and r_total
    and the advantages, which are recorded all the same, are made of the rewards that every candidate has: 0 where there
    are none.
    """
    judging = [name for name, reward in rewards.items() if not reward.held_out]
    weights = {name: rewards[name].weight for name in judging if rewards[name].weight != 0}
    if not score.lazy:
        return Asked(tuple(judging), (), weights)
    decides = train.weighting != "uniform" or filtering.select != "first"
    lazy = tuple(name for name in filtering.rewards if name in judging and not (decides and name in weights))
    everyone = tuple(name for name in judging if name not in lazy)
    return Asked(everyone, lazy, {name: weight for name, weight in weights.items() if name in everyone})


def factors(scores: Mapping[str, float], base: Mapping[str, float], rewards: Iterable[str]) -> dict[str, bool]:
    """The factors 1[r_m,ij > r_m,i0] that are known: of rewards that were asked about both."""
    return {name: scores[name] > base[name] for name in rewards if name in scores and name in base}


def survivors(members: Members, rewards: Sequence[str], keep: str) -> list[int]:
    """Members that the next reward is asked about, when all of ``rewards`` were asked as they should.

    Returns:
        0 and the variants that passed; under ``keep`` all, everyone or nobody. Empty when no variant is left.
    """
    passed = [
        j
        for j in range(1, len(members))
        if len(known := factors(members[j], members[0], rewards)) == len(rewards) and all(known.values())
    ]
    if not passed or (keep == "all" and len(passed) < len(members) - 1):
        return []
    return [0, *passed]


def lacking(members: Members, rewards: Sequence[str], keep: str) -> list[tuple[int, str]]:
    """The scores that a group's verdicts still wait for: (member, reward); empty once the group is decided.

    Under ``all`` a reward counts once it was asked about the whole group: a kill in the middle of one then leaves the
    group undecided, so that a resumed run asks what an undisturbed one would have asked.
    """
    everyone = range(len(members))
    if keep == "all":
        whole = [name for name in rewards if all(name in scores for scores in members)]
        if not all(all(factors(scores, members[0], whole).values()) for scores in members[1:]):
            return []
        return [(j, name) for name in rewards if name not in whole for j in everyone if name not in members[j]]
    open_ones = [j for j in everyone[1:] if all(factors(members[j], members[0], rewards).values())]
    asked = [0, *open_ones] if open_ones else []
    return [(j, name) for name in rewards for j in asked if name not in members[j]]


def rejections(groups: Iterable[Members], rewards: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of how many variants each reward rejected how many: (rejected, asked)."""
    found = {name: (0, 0) for name in rewards}
    for members in groups:
        for scores in members[1:]:
            for name, passed in factors(scores, members[0], found).items():
                rejected, asked = found[name]
                found[name] = (rejected + (not passed), asked + 1)
    return found


def cheapest_first(costs: Mapping[str, float], rejected: Mapping[str, tuple[int, int]]) -> list[str]:
    """The order in which rewards are asked: by cost / share rejected, which makes the whole cheapest.

    The share is (rejected + 1) / (asked + 2): one half before anything is known.

    Args:
        costs: GFLOP a picture by reward; 0, not known, counts as much as the dearest that is known.
        rejected: (rejected, asked) so far.

    Returns:
        The names; of equal ones, in the order of ``costs``.
    """
    dearest = max(costs.values(), default=0.0) or 1.0

    def price(name: str) -> float:
        out, asked = rejected.get(name, (0, 0))
        return (costs[name] or dearest) * (asked + 2) / (out + 1)

    return sorted(costs, key=price)


def answers(reward: str, question: Callable[[], Any], texts: Sequence[str]) -> list[float]:
    """Ask a reward, and check what it says.

    Args:
        reward: its name, for errors.
        question: asks it; gives B numbers (a tensor or a list).
        texts: the B prompts.

    Raises:
        CraftError: it failed, or did not give B finite numbers. ResourceError: it ran out of memory.
    """
    try:
        found = question()
        values = [float(value) for value in (found.tolist() if hasattr(found, "tolist") else found)]
    except CraftError:
        raise
    except Exception as error:  # whatever a reward raises
        if type(error).__name__ == "OutOfMemoryError":
            raise ResourceError(
                "A reward ran out of memory",
                where=f"reward {reward}",
                why=str(error).partition("\n")[0],
                hint=f"a smaller --set score.batch_size (it judged {len(texts)} pictures at once)",
            ) from error
        raise CraftError(
            "A reward failed",
            where=f"reward {reward}",
            why=f"{type(error).__name__}: {error}",
            hint="once it is mended, the same command continues",
        ) from error
    if len(values) != len(texts):
        why = f"{len(values)} scores for {len(texts)} pictures"
        raise CraftError("A reward gave the wrong number of scores", where=f"reward {reward}", why=why)
    for text, value in zip(texts, values, strict=True):
        if not math.isfinite(value):
            raise CraftError(
                "A reward gave NaN or infinity",
                where=f"reward {reward}, prompt {text[:200]!r}",
                why=f"it said {value}",
                hint="check its weights; in half precision, try --set score.dtype=float32",
            )
    return values


def cut_note(reward: str, cut: Iterable[str], texts: Iterable[str]) -> str:
    """One line on the prompts that a reward did not read to their end; '' when there are none.

    Args:
        reward: its name.
        cut: prompts it has cut so far, of whatever it was asked.
        texts: the prompts in question.
    """
    number = len(set(cut) & set(texts))
    prompts = "1 prompt is" if number == 1 else f"{number} prompts are"
    return f"{reward}: {prompts} longer than it reads; it judged by the beginning" if number else ""
