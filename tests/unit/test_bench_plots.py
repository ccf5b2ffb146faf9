"""A plot an op: a sweep as lines, cases that are no sweep as points, and no plot without matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from craft_bench.plots import draw
from craft_bench.rows import blank_row


def plotted(name: str, sizes: list[int]) -> list[dict[str, Any]]:
    return [
        blank_row(
            name=name, impl=impl, case=f"case {index}", dtype="bfloat16", mode=mode, size=size, unit="elements",
            p20_ms=0.9 * size * speed, p50_ms=size * speed, p80_ms=1.2 * size * speed, floor_ms=size * 1e-7,
            graph_ms=size * speed / 2 if impl == "triton" else None, device="h100", date="2026-11-24",
        )
        for mode in ("forward", "both")
        for impl, speed in (("eager", 3e-6), ("triton", 1e-6))
        for index, size in enumerate(sizes)
    ]  # fmt: skip


def test_each_op_is_drawn_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    labels: list[str] = []
    set_label = Axes.set_xlabel
    monkeypatch.setattr(Axes, "set_xlabel", lambda axes, text: (labels.append(text), set_label(axes, text))[1])
    notes: list[str] = []
    rows = plotted("sweep", [10, 1000, 100000]) + plotted("shapes", [500, 500, 900])
    failed = blank_row(name="failed", impl="eager", failed="no memory")
    files = draw([*rows, failed], tmp_path / "new", "kernels-h100", notes)
    assert [path.name for path in files] == ["kernels-h100-sweep.png", "kernels-h100-shapes.png"]
    for path in files:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1_000_000) or ()) > 20
    assert labels == ["size (elements)"] * 2
    assert notes == []


def test_without_matplotlib_the_command_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    notes: list[str] = []
    assert draw(plotted("sweep", [1, 2, 3]), tmp_path, "kernels", notes) == []
    assert len(notes) == 1
    assert "pip install" in notes[0]


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    assert draw([blank_row(name="op", failed="no")], tmp_path, "kernels", []) == []
    assert list(tmp_path.iterdir()) == []
