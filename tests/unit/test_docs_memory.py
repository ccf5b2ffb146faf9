"""The figures of docs/low-memory.md are what the plan's formulas give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from craft_fast.budget import GIB, Machine, ModelShape, with_changes
from craft_fast.plan.amounts import recompute_factor
from craft_fast.plan.stages import Costs
from craft_fast.sdxl import published
from craft_fast.settings_io import load_settings

PAGE = (Path(__file__).parents[2] / "docs/low-memory.md").read_text()
SDXL = ModelShape(published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2)
# Larger than any of them, so that nothing is chosen by the card.
CARD = Machine("a card", gpu=True, total_bytes=80 * GIB)
BASE = {
    "train.method": "lora", "train.micro_batch_size": 1, "train.gradient_checkpointing": "none",
    "generate.batch_size": 4, "engine.resident": "never", "engine.vae_tiling": "never",
}  # fmt: skip


def planned(**changes: Any) -> Costs:
    return Costs.of(with_changes(load_settings("sdxl"), {**BASE, **changes}), CARD, SDXL)


def gib(stage: str, **changes: Any) -> float:
    costs = planned(**changes)
    peak = costs.drawing_peak() if stage == "Drawing" else costs.peaks()[stage.lower()]
    assert peak is not None
    return round(peak.reserved / GIB, 1)


def rows(section: str) -> list[tuple[dict[str, Any], float]]:
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (none|`.*?`) \| ([\d.]+) GiB \|", text, re.MULTILINE)
    return [
        ({key: yaml.safe_load(value) for key, value in re.findall(r"`([\w.]+)=(\S+?)`", cell)}, float(figure))
        for cell, figure in found
    ]


@pytest.mark.parametrize(("section", "stage", "many"), [("Drawing", "Drawing", 5), ("Training", "train", 8)])
def test_the_tables(section: str, stage: str, many: int) -> None:
    found = rows(section)
    assert len(found) == many
    assert found[0][0] == {}
    assert [(changes, gib(stage, **changes)) for changes, _ in found] == found


def test_the_figures_in_the_text() -> None:
    assert f"takes {gib('Drawing', **{'engine.resident': 'always'})} GiB instead of {gib('Drawing')}" in PAGE
    assert f"{gib('train', **{'train.rank': 16, 'train.lora_alpha': 16.0})} GiB at rank 16" in PAGE
    large, small = (gib("score", **{"score.batch_size": size}) for size in (16, 1))
    assert f"`score.batch_size` from 16 to 1 lowers the peak from {large} to {small} GiB" in PAGE
    costs = planned()
    assert f"{recompute_factor(costs):.2f} times the operations of a step" in PAGE
    strips, whole = costs.decode(tiled=True), costs.decode(tiled=False)
    assert f"{strips.flops / whole.flops:.2f} times its operations" in PAGE
    assert f"{costs.dense_unet_weights() / GIB:.1f} GiB" in PAGE
    assert gib("Drawing", **{"engine.vae_tiling": "always"}) == gib("Drawing")
