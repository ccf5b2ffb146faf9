"""The figures that scoring is to reach on one H100-class GPU, as data."""

from __future__ import annotations

from collections.abc import Sequence

from craft_bench.rewards.cases import OURS, PACKAGE, TRAINING
from craft_bench.rows import Row
from craft_bench.sdxl.gates import Gate, Metric, Reached, field_of
from craft_bench.sdxl.gates import judge as judge_by

# Batch at which a candidate's block is scored by the presets for the larger cards.
ASKED_BATCH = 16

GATES: tuple[Gate, ...] = (
    Gate(
        "images/s against hpsv2.score, batch 16", "versus_package", 10.0, "least", "x", "",
        {"name": "hpsv2.1", "impl": OURS, "mode": "score", "batch": ASKED_BATCH, "attention": "sdpa"},
    ),
    Gate(
        "matrix rate of the ViT-H tower, batch 64", "matrix_fraction", 0.50, "least", "%", "",
        {"name": ("hpsv2.1", "pickscore"), "impl": OURS, "mode": "network", "batch": 64, "attention": "sdpa",
         "dtype": "float16"},
    ),
    Gate(
        "peak of scoring, three training rewards one at a time", "peak_gib", 2.5, "most", "GiB", "",
        {"name": TRAINING, "impl": OURS, "mode": "score", "batch": ASKED_BATCH, "attention": "sdpa",
         "dtype": ("float16", "bfloat16")},
    ),
)  # fmt: skip
METRICS: dict[str, Metric] = {
    "versus_package": field_of("versus", PACKAGE),
    "matrix_fraction": field_of("matrix_fraction"),
    "peak_gib": field_of("peak_gib"),
}


def judge(rows: Sequence[Row]) -> list[Reached]:
    """What a run's rows say of all figures."""
    return judge_by(rows, GATES, METRICS)
