"""Evaluations made of numbers, for tests of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from craft_fast.config import Settings
from craft_fast.records import FileRef, Provenance, StageRow
from craft_fast.report.compare_inputs import Evaluated
from craft_fast.store.digest import digest_json

WAY = Provenance("native", "a" * 64, "pil/224", "bpe", "float32")
SETTINGS = Settings.model_validate(
    {
        "rewards": {
            "h": {"kind": "hpsv2.1"},
            "eye": {"kind": "image-reward", "held_out": True},
            "oracle": {"kind": "pickscore", "held_out": True},
        },
        "filter": {"rewards": ["h"]},
        "evaluate": {"bootstrap_samples": 200},
    }
)
NAMES = [f"p{i}" for i in range(8)]


def evaluated(
    label: str,
    gain: float | Mapping[str, Sequence[float]] = 0.0,
    *,
    settings: Settings = SETTINGS,
    names: Sequence[str] = NAMES,
    noise: str = "seed 0",
    root: Path = Path("runs"),
    **changes: Any,
) -> Evaluated:
    """A run whose tuned scores are the base's plus ``gain``: of all prompts, or by reward and prompt."""
    rewards = list(settings.rewards)
    base = {reward: {name: 0.1 * i for i, name in enumerate(names)} for reward in rewards}
    gains = gain if isinstance(gain, Mapping) else {reward: [gain] * len(names) for reward in rewards}
    tuned = {
        reward: {name: base[reward][name] + gains.get(reward, [0.0] * len(names))[i] for i, name in enumerate(names)}
        for reward in rewards
    }
    pictures = {
        "base": {name: FileRef(f"base/{name}.png", digest_json([noise, name]), 1) for name in names},
        "tuned": {name: FileRef(f"tuned/{name}.png", digest_json([label, name]), 1) for name in names},
    }
    made = Evaluated(
        label=label, root=root / label, settings=settings, seed=settings.seed,
        prompts={name: f"prompt {name}" for name in names}, pictures=pictures, scores={"base": base, "tuned": tuned},
        provenances=dict.fromkeys(rewards, WAY), stages=[StageRow("filter", "k", "done", 2.5, 1.5, {"accepted": 3})],
        trained_on=frozenset({"x", label}), loras=[],
    )  # fmt: skip
    return replace(made, **changes)


def never(one: Path, two: Path) -> float:
    raise AssertionError("no picture has to be read")
