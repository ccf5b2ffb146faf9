"""What a comparison of runs says in numbers: means, paired differences, win rates, and what they allow to claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import yaml

from craft_fast.pairs import paired_rows
from craft_fast.records import EvalRow, Provenance
from craft_fast.report.compare_inputs import Evaluated, Shared
from craft_fast.report.figures import is_rate
from craft_fast.report.inputs import _without_passwords
from craft_fast.report.text import points, signed
from craft_fast.settings_io import flat

Direction = Literal["better", "worse", "mixed", "unclear", "same", "none"]

FEWEST_PROMPTS = 6
"""Fewer pairs cannot reach 5 % in a two-sided sign test (2 / 2^5 = 6 %), however they come out: nothing is claimed."""


@dataclass(frozen=True, slots=True)
class Judge:
    """One reward on the shared prompts.

    Attributes:
        name: of the reward.
        held_out: by run, whether it was; a reward that filtered or weighted can rise by being exploited.
        provenance: how all the scores came about.
        base_mean: of the base model.
        runs: each run against the base model.
        pairs: by the positions of two runs, the second against the first (``base_mean`` is the first's).
    """

    name: str
    held_out: Sequence[bool]
    provenance: Provenance
    base_mean: float
    runs: Sequence[EvalRow]
    pairs: Mapping[tuple[int, int], EvalRow]


@dataclass(frozen=True, slots=True)
class Claim:
    """What may be said of two runs."""

    first: int
    second: int
    direction: Direction
    sentence: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took; None: not known."""

    seconds: float
    images: int | None
    accepted: int | None
    steps: int | None
    peak_gib: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything the page, the table and the JSON are made of.

    Attributes:
        runs: the first is what the others are held against.
        shared: what was compared.
        judges: rewards whose scores may be compared.
        left_out: reward and why its scores may not.
        claims: one for each pair of runs.
        settings: key and values of the settings that differ, in the runs' order; ``None`` where a run has no such key.
        costs: by run.
        overlap: by pair of runs, how many training pictures are in both.
        spread: by prompt_id, how far the runs' scores are apart; 1 is as far as they are on average.
    """

    runs: Sequence[Evaluated]
    shared: Shared
    judges: Sequence[Judge]
    left_out: Sequence[tuple[str, str]]
    claims: Sequence[Claim]
    settings: Sequence[tuple[str, Sequence[Any]]]
    costs: Sequence[Cost]
    overlap: Mapping[tuple[int, int], int]
    spread: Mapping[str, float]


def compare(runs: Sequence[Evaluated], shared: Shared) -> Comparison:
    """All figures of a comparison.

    Args:
        runs: at least two.
        shared: their prompts.
    """
    samples = max(run.settings.evaluate.bootstrap_samples for run in runs)
    judges: list[Judge] = []
    left_out: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for run in runs for name in (*run.settings.rewards, *run.scores["tuned"])):
        way, why = _common_way(name, runs)
        if way is None:
            left_out.append((name, why))
        else:
            judges.append(_judge(name, way, runs, shared, samples))
    positions = list(combinations(range(len(runs)), 2))
    return Comparison(
        runs=runs,
        shared=shared,
        judges=judges,
        left_out=left_out,
        claims=[_claim(pair, runs, shared, judges) for pair in positions],
        settings=_different_settings(runs),
        costs=[_cost(run) for run in runs],
        overlap={(i, j): len(runs[i].trained_on & runs[j].trained_on) for i, j in positions},
        spread=_spread(runs, shared, judges),
    )


# ---- scores


def _common_way(name: str, runs: Sequence[Evaluated]) -> tuple[Provenance | None, str]:
    """How the scores of all runs came about, or None and why they may not be compared."""
    without = [run.label for run in runs if name not in run.scores["tuned"]]
    if without:
        return None, f"not asked by {', '.join(without)}"
    unknown = [run.label for run in runs if run.provenances.get(name) is None]
    if unknown:
        return None, f"how its scores came about is not recorded, or not one way, in {', '.join(unknown)}"
    first = runs[0].provenances[name]
    assert first is not None
    for run in runs[1:]:
        way = run.provenances[name]
        if way is not None and way != first:
            return None, f"{runs[0].label} and {run.label} were judged in different ways: " + "; ".join(
                first.differences(way)
            )
    return first, ""


def _judge(name: str, way: Provenance, runs: Sequence[Evaluated], shared: Shared, samples: int) -> Judge:
    held_out = [run.held_out(name) for run in runs]
    base = [runs[0].scores["base"][name][prompt_id] for prompt_id in shared.prompts]
    tuned = [[run.scores["tuned"][name][prompt_id] for prompt_id in shared.prompts] for run in runs]

    def row(before: Sequence[float], after: Sequence[float], unseen: bool) -> EvalRow:
        # The seed that the first run's own report draws with: on all of its prompts its figures are the same ones.
        [found] = paired_rows(
            {name: before}, {name: after}, {name: unseen}, bootstrap_samples=samples, seed=runs[0].seed
        )
        return found

    against = [row(base, scores, unseen) for scores, unseen in zip(tuned, held_out, strict=True)]
    pairs = {(i, j): row(tuned[i], tuned[j], held_out[i] and held_out[j]) for i, j in combinations(range(len(runs)), 2)}
    return Judge(name, held_out, way, against[0].base_mean, against, pairs)


def _spread(runs: Sequence[Evaluated], shared: Shared, judges: Sequence[Judge]) -> dict[str, float]:
    total = dict.fromkeys(shared.prompts, 0.0)
    for judge in judges:
        reach = {}
        for name in shared.prompts:
            values = [run.scores["tuned"][judge.name][name] for run in runs]
            reach[name] = max(values) - min(values)
        scale = sum(reach.values()) / len(reach)
        for name, value in reach.items():
            total[name] += value / scale / len(judges) if scale else 0.0
    return total


# ---- what may be claimed


def _claim(pair: tuple[int, int], runs: Sequence[Evaluated], shared: Shared, judges: Sequence[Judge]) -> Claim:
    i, j = pair
    one, two = runs[i].label, runs[j].label
    count = len(shared.prompts)

    def claim(direction: Direction, sentence: str) -> Claim:
        return Claim(i, j, direction, sentence)

    if all(_same_picture(runs[i], runs[j], name) for name in shared.prompts):
        return claim("same", f"{two} and {one} drew the same pictures.")
    if count < FEWEST_PROMPTS:
        return claim("none", f"{count} shared prompts are too few to tell {two} from {one}.")
    if not judges:
        return claim("none", f"No reward judged {two} and {one} in the same way.")
    asked = [judge for judge in judges if judge.pairs[pair].held_out]
    note = "" if asked else " No reward was held out in both, so a gain may be one that training exploited."
    asked = asked or list(judges)
    kind = "held-out " if not note else ""
    up = [judge for judge in asked if judge.pairs[pair].ci_low > 0]
    down = [judge for judge in asked if judge.pairs[pair].ci_high < 0]
    if up and down:
        said = (
            f"The judges disagree: {two} is better than {one} by {_listed(up, pair)}, worse by {_listed(down, pair)}."
        )
        return claim("mixed", said + note)
    if up or down:
        # Of means: a run may score higher on average and win no more than half of the prompts.
        word = "higher" if up else "lower"
        said = f"{two} scores {word} than {one} on average by {_listed(up or down, pair)}"
        rest = len(asked) - len(up or down)
        if rest:
            said += f"; {_others(rest, kind)} no difference"
        return claim("better" if up else "worse", f"{said}.{note}")
    if len(asked) == 1:
        said = f"The {kind}judge {asked[0].name} does not tell {two} from {one} on {count} prompts: its"
    else:
        said = f"None of {len(asked)} {kind}judges tells {two} from {one} on {count} prompts: every"
    return claim("unclear", f"{said} 95 % interval includes zero.{note}")


def _others(count: int, kind: str) -> str:
    return f"the other {kind}judge shows" if count == 1 else f"the {count} other {kind}judges show"


def _same_picture(one: Evaluated, two: Evaluated, name: str) -> bool:
    return one.pictures["tuned"][name].sha256 == two.pictures["tuned"][name].sha256


def _listed(judges: Sequence[Judge], pair: tuple[int, int]) -> str:
    return ", ".join(f"{judge.name} ({change_text(judge.pairs[pair])})" for judge in judges)


def change_text(row: EvalRow) -> str:
    """A paired difference with its interval: ``+0.21, 95 % interval +0.05 to +0.36``; of rates in points."""
    show, unit = (points, " points") if is_rate(row) else (signed, "")
    change = row.tuned_mean - row.base_mean
    return f"{show(change)}{unit}, 95 % interval {show(row.ci_low)} to {show(row.ci_high)}"


# ---- settings and cost


def _different_settings(runs: Sequence[Evaluated]) -> list[tuple[str, Sequence[Any]]]:
    """Settings that differ, without passwords; titles and names of files are no difference between runs."""
    trees = []
    for run in runs:
        text = yaml.safe_dump(run.settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1 << 20)
        trees.append(flat(yaml.safe_load(_without_passwords(text))))
    keys = dict.fromkeys(key for tree in trees for key in tree if not key.startswith(("report.", "export.name")))
    found = [(key, [tree.get(key) for tree in trees]) for key in keys]
    return [(key, values) for key, values in found if any(value != values[0] for value in values[1:])]


def _cost(run: Evaluated) -> Cost:
    rows = {row.name: row for row in run.stages}

    def info(stage: str, name: str) -> int | None:
        value = rows[stage].info.get(name) if stage in rows else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    peaks = [row.peak_gib for row in run.stages if row.peak_gib is not None]
    return Cost(
        seconds=sum(row.seconds for row in run.stages),
        images=info("filter", "images"),
        accepted=info("filter", "accepted"),
        steps=info("train", "steps"),
        peak_gib=max(peaks, default=None),
    )


# ---- for scripts


def comparison_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values; every figure of the page, unrounded."""
    labels = [run.label for run in found.runs]
    return {
        "runs": [
            {
                "name": run.label,
                "path": str(run.root),
                "seed": run.seed,
                "cost": asdict(cost),
                "trained_on": len(run.trained_on),
                "lora": [asdict(ref) for ref in run.loras],
            }
            for run, cost in zip(found.runs, found.costs, strict=True)
        ],
        "prompts": len(found.shared.prompts),
        "prompts_equal_but_for_rounding": found.shared.rounded,
        "left_out": list(found.shared.left_out),
        "rewards": [_judge_json(judge, labels) for judge in found.judges],
        "rewards_left_out": [{"reward": name, "why": why} for name, why in found.left_out],
        "verdicts": [
            {"first": labels[claim.first], "second": labels[claim.second], "direction": claim.direction}
            | {"sentence": claim.sentence}
            for claim in found.claims
        ],
        "settings": {key: dict(zip(labels, values, strict=True)) for key, values in found.settings},
        "training_pictures_in_both": [
            {"first": labels[i], "second": labels[j], "pictures": count} for (i, j), count in found.overlap.items()
        ],
        "pictures": [
            {
                "prompt_id": name,
                "prompt": text,
                "spread": found.spread[name],
                "base_sha256": found.runs[0].pictures["base"][name].sha256,
                "scores": {
                    judge.name: {"base": found.runs[0].scores["base"][judge.name][name]}
                    | {run.label: run.scores["tuned"][judge.name][name] for run in found.runs}
                    for judge in found.judges
                },
            }
            for name, text in found.shared.prompts.items()
        ],
    }


def _judge_json(judge: Judge, labels: Sequence[str]) -> dict[str, Any]:
    def plain(row: EvalRow) -> dict[str, Any]:
        figures = {"difference": row.tuned_mean - row.base_mean, "ci_low": row.ci_low, "ci_high": row.ci_high}
        return {**figures, "win_rate": row.win_rate, "n": row.n}

    return {
        "reward": judge.name,
        "held_out": dict(zip(labels, judge.held_out, strict=True)),
        "provenance": asdict(judge.provenance),
        "base_mean": judge.base_mean,
        "means": {label: row.tuned_mean for label, row in zip(labels, judge.runs, strict=True)},
        "against_base": {label: plain(row) for label, row in zip(labels, judge.runs, strict=True)},
        "pairs": [{"first": labels[i], "second": labels[j], **plain(row)} for (i, j), row in judge.pairs.items()],
    }
