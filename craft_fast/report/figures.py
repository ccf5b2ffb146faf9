"""The report's arithmetic: pure functions on records and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from craft_fast.records import EvalRow, Selection
from craft_fast.report.inputs import Pair

T = TypeVar("T")

Z_95 = 1.959964
"""Two-sided 95 % point of the standard normal distribution."""

Direction = Literal["better", "worse", "mixed", "unclear", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to "did it get better?", with the row it rests on."""

    direction: Direction
    headline: str
    row: EvalRow | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """One reward over all candidates and over the accepted ones, as shares of each (0 to 1) by bin."""

    reward: str
    low: float
    high: float
    candidates: Sequence[float]
    accepted: Sequence[float]
    candidates_mean: float
    accepted_mean: float | None


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """How the variants fare at one more condition.

    Attributes:
        label: of the condition.
        left: variants that neither this condition nor one before it has rejected.
        alone: variants that meet this condition.
        asked: variants that were held against it; a lazy reward is asked about those alone that others let through.
        only: variants that this condition alone rejects, of those that every reward was asked about.
    """

    label: str
    left: int
    alone: int
    asked: int
    only: int = 0


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a rate, 95 %.

    ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``; ties that count one half make it a little wide.

    Args:
        rate: p, 0 to 1.
        n: number of pairs, at least 1.

    Returns:
        Low and high end, 0 to 1.
    """
    spread = Z_95 * math.sqrt(rate * (1 - rate) / n + Z_95**2 / (4 * n**2))
    middle, scale = rate + Z_95**2 / (2 * n), 1 + Z_95**2 / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def is_rate(row: EvalRow) -> bool:
    """Whether a metric's means are rates from 0 to 1 that read best as per cent (the oracle's are)."""
    return is_rate_name(row.metric)


def is_rate_name(metric: str) -> bool:
    """Whether the metric of this name is a rate."""
    return metric == "oracle" or metric.startswith("oracle_")


def is_measured(row: EvalRow) -> bool:
    """Whether a row holds figures at all: at least one pair, and every value finite."""
    values = (row.base_mean, row.tuned_mean, row.win_rate, row.ci_low, row.ci_high)
    return row.n >= 1 and all(math.isfinite(value) for value in values)


def primary_row(rows: Sequence[EvalRow]) -> EvalRow | None:
    """The metric that the headline is about: the oracle, else the first held-out one, else the first."""
    held_out = [row for row in rows if row.held_out] or list(rows)
    return next((row for row in held_out if row.metric == "oracle"), held_out[0] if held_out else None)


def ranking_metric(rows: Sequence[EvalRow]) -> str:
    """The judge by which prompts are ranked, worst first: a held-out one whose scores are finer than pass and fail."""
    row = primary_row(rows)
    fine = [item.metric for item in rows if item.held_out and not is_rate(item)]
    return fine[0] if fine else row.metric if row is not None else ""


def verdict(rows: Sequence[EvalRow]) -> Verdict:
    """Judge by held-out metrics alone, where there are any: a training reward can rise by being exploited."""
    row = primary_row(rows)
    if row is None:
        return Verdict("none", "Not evaluated yet", None)
    judges = [item for item in rows if item.held_out] or list(rows)
    up = [item for item in judges if item.ci_low > 0]
    down = [item for item in judges if item.ci_high < 0]
    if up and down:
        return Verdict("mixed", f"Better by {len(up)} of {len(judges)} judges, worse by {len(down)}", row)
    if up:
        return Verdict("better", "Better" if row in up else f"Better by {len(up)} of {len(judges)} judges", row)
    if down:
        return Verdict("worse", "Worse" if row in down else f"Worse by {len(down)} of {len(judges)} judges", row)
    return Verdict("unclear", "No clear difference", row)


def histogram(reward: str, all_values: Sequence[float], accepted: Sequence[float]) -> Histogram:
    """Shares by bin of one reward.

    Args:
        reward: its name.
        all_values: finite values of all candidates, at least one.
        accepted: those of the accepted ones.
    """
    # Few values in many bins would draw a comb: as many bins as twice the root of the smaller number.
    bins = max(8, min(28, round(2 * math.sqrt(len(accepted) or len(all_values)))))
    low, high = min(all_values), max(all_values)
    width = (high - low) / bins or 1.0

    def shares(values: Sequence[float]) -> list[float]:
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, int((value - low) / width))] += 1
        return [count / max(1, len(values)) for count in counts]

    means = _mean(all_values), _mean(accepted) if accepted else None
    return Histogram(reward, low, high, shares(all_values), shares(accepted), *means)


def histograms(scores: Mapping[str, Mapping[str, float]], selections: Sequence[Selection]) -> list[Histogram]:
    """One histogram a reward, in the order in which the rewards scored."""
    accepted_ids = {row.candidate_id for row in selections if row.accepted}
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    result = []
    for name in names:
        finite = {key: row[name] for key, row in scores.items() if math.isfinite(row.get(name, math.nan))}
        if finite:
            kept = [value for key, value in finite.items() if key in accepted_ids]
            result.append(histogram(name, list(finite.values()), kept))
    return result


def funnel(selections: Sequence[Selection], rewards: Sequence[str]) -> list[FunnelStep]:
    """How the filter narrows the variants (members 1..K), condition by condition.

    The order is the filter's, but a reward that was asked about fewer variants comes after those asked about more: it
    was asked about what they had left. Of which a reward was not asked, it rejects none.

    Args:
        selections: the filter's verdicts.
        rewards: the set S of the filter.
    """
    left = [row for row in selections if row.member >= 1]
    if not left:
        return []
    variants = left
    asked = {name: sum(name in row.passed for row in variants) for name in rewards}
    steps = [FunnelStep("variants", len(variants), len(variants), len(variants))]
    for name in sorted(rewards, key=lambda name: -asked[name]):
        left = [row for row in left if row.passed.get(name, True)]
        alone = sum(row.passed.get(name, False) for row in variants)
        others = [other for other in rewards if other != name]
        only = sum(
            not row.passed.get(name, True) and all(row.passed.get(other, False) for other in others) for row in variants
        )
        steps.append(FunnelStep(name, len(left), alone, asked[name], only))
    accepted = sum(row.accepted for row in selections)
    return [*steps, FunnelStep("accepted", accepted, accepted, len(variants))]


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with ``alpha = 2 / (span + 1)``, its start corrected for bias."""
    alpha = 2 / (span + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = (1 - alpha) * total + alpha * value
        weight = (1 - alpha) * weight + alpha
        result.append(total / weight)
    return result


def worst_pairs(pairs: Sequence[Pair], metric: str, count: int) -> list[Pair]:
    """The pairs that lost most on ``metric``, worst first; only those that lost."""
    losses = [(pair.tuned_scores[metric] - pair.base_scores[metric], number, pair) for number, pair in enumerate(pairs)
              if metric in pair.base_scores and metric in pair.tuned_scores]  # fmt: skip
    return [pair for change, _, pair in sorted(losses, key=lambda item: item[:2])[:count] if change < 0]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``items``, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in ``[low, high]``, about ``count`` of them: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
