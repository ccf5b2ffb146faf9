"""The run as JSON: design.md section 7."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from craft_fast.report.advice import advise
from craft_fast.report.agreement import agreements, partings, within_groups
from craft_fast.report.figures import funnel
from craft_fast.report.inputs import Pair, ReportData
from craft_fast.report.page import measured
from craft_fast.report.table import judges_in_order


def report_json(data: ReportData) -> dict[str, Any]:
    """The content of ``report.json``; figures that were not measured are null.

    Args:
        data: the gathered run.

    Returns:
        ``selection.accepted``, ``stages`` (name, seconds, peak_gib), ``evaluation`` (one object a metric; the interval
        is that of the mean paired difference, tuned minus base), then the run's name, seed, settings, versions,
        digests and losses. ``rewards`` says of each how its scores came about (``provenance``, null where that was not
        recorded), and whether it is held out.

        ``per_prompt``: one object a prompt, in the file's order: prompt_id, prompt, noise_seed, and ``scores`` by
        reward as ``{base, tuned}``.
        ``agreement.evaluation``: of every two judges, ``same`` (share of the ``moved`` prompts on which both changed,
        where both rose or both fell) and ``rho`` (Spearman's correlation of the changes over all prompts);
        ``agreement.candidates``: of every two training rewards, ``rho`` of ranks within ``groups`` groups;
        ``agreement.parted``: prompts on which training rewards clearly rose and held-out judges fell, the widest apart
        first, with the mean changes ``training`` and ``held_out``, in units of each judge's root mean square change.
        ``advice``: what to try next, as on the page: rule, title, why, commands.
    """
    steps = funnel(data.selections, data.filter_rewards)
    return {
        "selection": {
            "accepted": sum(row.accepted for row in data.selections),
            "candidates": len(data.candidates),
            "funnel": [asdict(step) for step in steps],
            "r_total": data.total_of,
        },
        "stages": [{"name": row.name, "seconds": row.seconds, "peak_gib": row.peak_gib} for row in data.stages],
        "evaluation": [{key: _finite(value) for key, value in asdict(row).items()} for row in data.evaluation],
        "per_prompt": [_prompt(pair) for pair in data.pairs],
        "agreement": _agreement(measured(data)),
        "advice": [{**asdict(item), "commands": list(item.commands)} for item in advise(measured(data))],
        "rewards": {name: _reward(data, name) for name in data.provenances},
        "training": {"steps": [step for step, _ in data.losses], "loss": [loss for _, loss in data.losses]},
        "run": {"name": data.name, "title": data.title, "seed": data.seed, "made": data.made},
        "settings": data.settings,
        "versions": dict(data.versions),
        "digests": {
            "stages": {row.name: row.key for row in data.stages},
            "model": data.model_digest,
            "rewards": dict(data.reward_keys),
            "lora": {ref.path: ref.sha256 for ref in data.loras},
        },
    }


def _prompt(pair: Pair) -> dict[str, Any]:
    names = dict.fromkeys([*pair.base_scores, *pair.tuned_scores])
    sides = {"base": pair.base_scores, "tuned": pair.tuned_scores}
    return {
        "prompt_id": pair.prompt_id,
        "prompt": pair.prompt,
        "noise_seed": pair.noise_seed,
        "scores": {name: {side: _finite(scores.get(name)) for side, scores in sides.items()} for name in names},
    }


def _agreement(data: ReportData) -> dict[str, Any]:
    judges = judges_in_order(data)
    training = [name for name, held_out in judges.items() if not held_out]
    return {
        "evaluation": [asdict(item) for item in agreements(data.pairs, list(judges))],
        "candidates": [asdict(item) for item in within_groups(data.candidates, data.scores, training)],
        "parted": [
            {"prompt_id": item.pair.prompt_id, "training": item.training, "held_out": item.held_out}
            for item in partings(data.pairs, judges)
        ],
    }


def _reward(data: ReportData, name: str) -> dict[str, Any]:
    ways = [asdict(way) if way is not None else None for way in data.provenances[name]]
    spec = data.settings["rewards"][name]
    return {
        "kind": spec["kind"],
        "held_out": spec["held_out"],
        "provenance": ways[0] if ways else None,
        # A run that moved may have judged candidates in one way and the evaluation in another.
        **({"also": ways[1:]} if len(ways) > 1 else {}),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
