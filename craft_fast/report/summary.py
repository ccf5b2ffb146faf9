"""The run as JSON: design.md section 7."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from craft_fast.report.figures import funnel
from craft_fast.report.inputs import ReportData


def report_json(data: ReportData) -> dict[str, Any]:
    """The content of ``report.json``; figures that were not measured are null.

    Args:
        data: the gathered run.

    Returns:
        ``selection.accepted``, ``stages`` (name, seconds, peak_gib), ``evaluation`` (one object a metric; the interval
        is that of the mean paired difference, tuned minus base), then the run's name, seed, settings, versions,
        digests and losses. ``rewards`` says of each how its scores came about (``provenance``, null where that was not
        recorded), and whether it is held out.
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
