"""Composite reward filter, advantages and sample weights: design.md section 1, items 2 to 5.

Legend: i group (base prompt), j = 0..K member (0 is generated from the base prompt itself), m reward,
r_m,ij score, S the set of rewards that filter, w_m weight of a reward in the total.
Plain Python floats: a run has thousands of scores, not millions. The mapping ``Scores`` holds r_m,ij as
``scores[candidate_id][m]``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from craft_fast.asking import factors, lacking
from craft_fast.config import FilterSettings, TrainSettings
from craft_fast.errors import CraftError, IntegrityError
from craft_fast.records import Candidate, Group, Provenance, Sample, Selection

EPSILON = 1e-4

Scores = Mapping[str, Mapping[str, float]]
ScoredBy = Mapping[str, Mapping[str, Provenance | None]]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What the filter made of the candidates scored so far.

    Attributes:
        selections: one for every candidate, in (group, member) order; ``accepted`` is the final choice.
        accepted: ids of the accepted candidates, in the same order.
        passing: variants that pass the filter, chosen or not.
        tried: variants (members 1..K) that could be judged.
        acceptance: share of variants that beat member 0, by reward of S among those it was asked about, and under
            ``all`` on every one of them among those tried.
        done: enough are accepted and nothing later can change which.
        asked: variants that each reward of S was asked about; a lazy one, fewer than ``tried``.
    """

    selections: tuple[Selection, ...]
    accepted: tuple[str, ...]
    passing: int
    tried: int
    acceptance: Mapping[str, float]
    done: bool
    asked: Mapping[str, int] = field(default_factory=dict)


def indicator(scores: Mapping[str, float], base: Mapping[str, float], rewards: Iterable[str]) -> dict[str, bool]:
    """Whether a variant beats member 0, by reward: the factors 1[r_m,ij > r_m,i0] of item 2.

    Args:
        scores: r_m,ij by reward.
        base: r_m,i0 by reward.
        rewards: S.

    Returns:
        One factor a reward; ``all(...)`` of them is I_S(i, j). A tie does not pass.
    """
    return {name: scores[name] > base[name] for name in rewards}


def r_total(scores: Scores, weights: Mapping[str, float]) -> dict[str, float]:
    """r_total = sum_m w_m (r_m - mean_m) / std_m over all scored candidates (item 3).

    Args:
        scores: r_m by candidate.
        weights: w_m by reward; only these rewards count.

    Returns:
        Total by candidate, population std. A reward that gave every candidate the same score adds nothing.

    Raises:
        CraftError: a score is not a finite number.
    """
    totals = dict.fromkeys(scores, 0.0)
    for name, weight in weights.items():
        values = [row[name] for row in scores.values()]
        if bad := [key for key, row in scores.items() if not math.isfinite(row[name])]:
            raise CraftError("A reward gave a score that is not a number.", where=f"reward {name}, candidate {bad[0]}")
        mean, std = _mean_std(values)
        if std > 1e-12 * max(1.0, abs(mean)):
            for key, row in scores.items():
                totals[key] += weight * (row[name] - mean) / std
    return totals


def advantages(totals: Sequence[float]) -> list[float]:
    """A_ij = (r_total,ij - mean_j) / (std_j + 1e-4), population std over all K+1 members of a group (item 4)."""
    mean, std = _mean_std(totals)
    return [(value - mean) / (std + EPSILON) for value in totals]


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def sample_weights(
    advantage: Sequence[float],
    accepted: Sequence[bool],
    weighting: str,
    *,
    clip: float = 2.0,
    temperature: float = 1.0,
) -> list[float]:
    """w_ij = I * phi(A) (item 5), before the normalisation by mean(w).

    Args:
        advantage: A_ij.
        accepted: I, the filter's verdict.
        weighting: positive max(A, 0); signed A; uniform 1; clipped A within +-clip;
            exponential exp(A / temperature), its exponent at most ``clip`` and at least ``-clip``.
        clip: bound of clipped and exponential.
        temperature: of exponential.

    Returns:
        One weight a sample, 0 where not accepted.
    """

    def phi(value: float) -> float:
        if weighting == "positive":
            return max(value, 0.0)
        if weighting == "signed":
            return value
        if weighting == "clipped":
            return min(max(value, -clip), clip)
        if weighting == "exponential":
            return math.exp(min(max(value / temperature, -clip), clip))
        return 1.0

    return [phi(value) if keep else 0.0 for value, keep in zip(advantage, accepted, strict=True)]


def select(passing: Sequence[str], totals: Mapping[str, float], mode: str, target: int) -> list[str]:
    """Choose at most ``target`` of the passing candidates.

    Args:
        passing: candidate ids in (group, member) order.
        totals: r_total by candidate.
        mode: first, the first ones; top, those of highest r_total, an earlier one before a later of equal total.
        target: how many.

    Returns:
        The chosen ids in (group, member) order.
    """
    if mode == "first":
        return list(passing[:target])
    best = set(sorted(passing, key=lambda key: -totals[key])[:target])
    return [key for key in passing if key in best]


def filter_candidates(
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    scores: Scores,
    settings: FilterSettings,
    rewards: Mapping[str, float],
    final: bool,
    *,
    lazy: Collection[str] = (),
    scored_by: ScoredBy | None = None,
) -> FilterResult:
    """Judge all candidates scored so far (items 2 to 4).

    Args:
        groups: in the run's order; groups whose members are not all there and scored are left out.
        candidates: of these groups, any order.
        scores: r_m by candidate; more rewards than needed may be there.
        settings: S, keep, select and the target.
        rewards: w_m by reward, held-out rewards left out by the caller; each must have scored every candidate.
        final: False while more blocks may come; then ``top`` accepts all that pass, since what comes may be better.
        lazy: rewards of S whose scores may be missing where another one has rejected a variant (under ``all``, its
            group). ``Selection.passed`` then says nothing of them.
        scored_by: how the scores came about, by candidate and reward; None: not looked at.

    Returns:
        Verdicts, counts and rates.

    Raises:
        CraftError: a score is missing or not a finite number.
        IntegrityError: scores of one reward came about in different ways, so they cannot be compared.
    """
    complete = _complete_groups(groups, candidates, scores)
    used = {row.candidate_id: scores[row.candidate_id] for members in complete for row in members}
    _check_rewards(used, [*(name for name in settings.rewards if name not in lazy), *rewards])
    if scored_by is not None:
        _check_provenances({key: scored_by.get(key, {}) for key in used}, [*settings.rewards, *rewards])
    totals = r_total(used, rewards)
    passed: dict[str, dict[str, bool]] = {}
    passing: list[str] = []
    for members in complete:
        verdicts = _verdicts(members, used, settings)
        passed.update(verdicts)
        good = [key for key, found in verdicts.items() if len(found) == len(settings.rewards) and all(found.values())]
        if settings.keep == "each" or len(good) == len(verdicts):
            passing += good
    cut = final or settings.select == "first"
    accepted = select(passing, totals, settings.select, settings.target_samples) if cut else passing
    asked = {name: sum(name in found for found in passed.values()) for name in settings.rewards}
    return FilterResult(
        _selections(complete, totals, passed, set(accepted)),
        tuple(accepted),
        len(passing),
        len(passed),
        _rates(passed, asked, len(passing)),
        settings.select == "first" and len(passing) >= settings.target_samples,
        asked,
    )


def _verdicts(members: Sequence[Candidate], scores: Scores, settings: FilterSettings) -> dict[str, dict[str, bool]]:
    """The known factors of a group's variants; those that are not known cannot change a verdict."""
    values = [scores[member.candidate_id] for member in members]
    if missing := lacking(values, settings.rewards, settings.keep):
        j, name = missing[0]
        raise _bad_score("missing", name, members[j].candidate_id)
    for member, row in zip(members, values, strict=True):
        for name in settings.rewards:
            if not math.isfinite(row.get(name, 0.0)):
                raise _bad_score("not a finite number", name, member.candidate_id)
    return {m.candidate_id: factors(scores[m.candidate_id], values[0], settings.rewards) for m in members[1:]}


def _selections(
    complete: Sequence[Sequence[Candidate]],
    totals: Mapping[str, float],
    passed: Mapping[str, Mapping[str, bool]],
    accepted: Collection[str],
) -> tuple[Selection, ...]:
    selections = []
    for members in complete:
        values = advantages([totals[m.candidate_id] for m in members])
        for member, value in zip(members, values, strict=True):
            key, known = member.candidate_id, passed.get(member.candidate_id, {})
            selections.append(
                Selection(key, member.prompt_id, member.member, key in accepted, known, totals[key], value)
            )
    return tuple(selections)


def _complete_groups(groups: Sequence[Group], candidates: Sequence[Candidate], scores: Scores) -> list[list[Candidate]]:
    by_prompt: dict[str, dict[int, Candidate]] = {}
    for row in candidates:
        if row.candidate_id in scores:
            by_prompt.setdefault(row.prompt_id, {})[row.member] = row
    complete = []
    for group in groups:
        members = by_prompt.get(group.prompt.prompt_id, {})
        if len(group.variants) > 1 and all(variant.member in members for variant in group.variants):
            complete.append([members[variant.member] for variant in group.variants])
    return complete


def _check_rewards(scores: Scores, names: Iterable[str]) -> None:
    for name in names:
        for key, row in scores.items():
            if name not in row or not math.isfinite(row[name]):
                raise _bad_score("missing" if name not in row else "not a finite number", name, key)


def _bad_score(found: str, reward: str, candidate: str) -> CraftError:
    return CraftError(
        f"A score is {found}.",
        where=f"reward {reward}, candidate {candidate}",
        hint="run the score stage again: craft-fast score",
    )


def _check_provenances(scored_by: ScoredBy, rewards: Iterable[str]) -> None:
    """All scores of a reward are compared with one another: variants with member 0, and in r_total across the run."""
    for name in dict.fromkeys(rewards):
        found = {key: ways[name] for key, ways in scored_by.items() if name in ways}
        first = next(iter(found), "")
        other = next((key for key in found if found[key] != found[first]), None)
        if other is not None:
            one, two = found[first], found[other]
            differs = one.differences(two) if one and two else ["how some came about is not recorded"]
            raise IntegrityError(
                "Scores that came about in different ways are not compared",
                where=f"reward {name}, candidates {first} and {other}",
                why="; ".join(differs),
                hint="score again, which makes those anew that differ: craft-fast score",
            )


def _rates(passed: Mapping[str, Mapping[str, bool]], asked: Mapping[str, int], passing: int) -> dict[str, float]:
    tried = len(passed)
    rates = {
        name: sum(found.get(name, False) for found in passed.values()) / count if count else 0.0
        for name, count in asked.items()
    }
    return {**rates, "all": passing / tried if tried else 0.0}


def rates_in_words(result: FilterResult) -> str:
    """Acceptance by reward in one line, ``h 83%, p 67% of 5 asked, all 33%``."""
    said = []
    for name, rate in result.acceptance.items():
        asked = result.asked.get(name, result.tried)
        said.append(f"{name} {rate:.0%}" + (f" of {asked} asked" if asked < result.tried else ""))
    return ", ".join(said)


def what_to_loosen(result: FilterResult, settings: FilterSettings, images: int) -> str:
    """One plain sentence when fewer samples than wanted were accepted; '' when there are enough.

    Args:
        result: of the last call with ``final=True``.
        settings: the filter section.
        images: candidates made.
    """
    found, wanted = len(result.accepted), settings.target_samples
    if found >= wanted:
        return ""
    rates = rates_in_words(result)
    advice = []
    judged = {name: rate for name, rate in result.acceptance.items() if result.asked.get(name)}
    if len(judged) > 1:
        strictest = min(judged, key=lambda name: judged[name])
        rest = ", ".join(name for name in settings.rewards if name != strictest)
        advice.append(f"--set 'filter.rewards=[{rest}]' drops {strictest}, the strictest")
    if settings.keep == "all":
        advice.append("--set filter.keep=each")
    advice.append("more prompts or a larger budget (--max-images)")
    said = f"{found} of {wanted} samples accepted from {images} images (passing: {rates})."
    return f"{said} To get more: {'; '.join(advice)}."


def training_samples(
    selections: Sequence[Selection],
    candidates: Sequence[Candidate],
    settings: FilterSettings,
    train: TrainSettings,
    given: Mapping[str, float] | None = None,
) -> list[Sample]:
    """The accepted candidates as weighted training samples (items 5 and 6).

    A sample of weight 0 would take part in no gradient and is left out. With ``condition_on: both`` a candidate
    gives two samples of equal weight.

    Args:
        selections: the filter's verdicts.
        candidates: the candidates they are about.
        settings: the filter section, for what to say when nothing is left.
        train: weighting and ``condition_on``.
        given: weights by candidate that came with own pictures, in place of ``phi(A)``.

    Returns:
        Samples in the selections' order.

    Raises:
        CraftError: no sample has a weight, or the weights' mean is not positive, so that the loss cannot be
            normalised by it.
    """
    rows = {row.candidate_id: row for row in candidates}
    chosen = [selection for selection in selections if selection.accepted]
    if given is None:
        values, bounds = [s.advantage for s in chosen], {"clip": train.weight_clip}
        bounds["temperature"] = train.weight_temperature
        weights = sample_weights(values, [True] * len(chosen), train.weighting, **bounds)
    else:
        weights = [given[s.candidate_id] for s in chosen]
    samples = []
    for selection, weight in zip(chosen, weights, strict=True):
        if weight != 0.0:
            row = rows[selection.candidate_id]
            texts = {"base": [row.base_prompt], "expanded": [row.prompt]}.get(
                train.condition_on, [row.base_prompt, row.prompt]
            )
            samples += [Sample(_sample_id(row, text), row.candidate_id, text, weight) for text in texts]
    if not samples:
        loosen = "use --set train.weighting=uniform" if chosen else f"loosen filter.rewards (now {settings.rewards})"
        raise CraftError(
            "There is nothing to train on.",
            why=f"{len(chosen)} candidates were accepted, none has a weight under train.weighting={train.weighting}",
            hint=f"{loosen}, or give more prompts",
        )
    mean = math.fsum(sample.weight for sample in samples) / len(samples)
    if mean <= 0:
        raise CraftError(
            "The weights' mean is not positive, so the loss would push the model away from its samples.",
            why=f"mean weight {mean:.4f} of {len(samples)} samples under train.weighting={train.weighting}",
            hint="--set train.weighting=positive, or a stricter filter",
        )
    return samples


def _sample_id(row: Candidate, text: str) -> str:
    # By what the sample is of, not by the candidate's id: that follows the generate stage's key, and with it every
    # setting there will ever be, while training's draws follow this.
    return hashlib.sha256(f"{row.prompt_id}\n{row.member}\n{text}".encode()).hexdigest()[:20]
