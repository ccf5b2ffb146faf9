"""The page of a comparison in a headless Chromium: wide, narrow, printed; nothing is asked for and nothing runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from craft_fast.report.compare_figures import compare
from craft_fast.report.compare_inputs import Evaluated, match
from craft_fast.report.compare_page import write_page
from craft_fast.sdxl.vae import png_bytes
from tests.unit.chromium import chromium
from tests.unit.compared_runs import NAMES, evaluated, never

EVIL = "<img src=x onerror=\"document.title='owned'\"> " + "x" * 3_000


def with_pictures(run: Evaluated, shade: int) -> Evaluated:
    for refs in run.pictures.values():
        for ref in refs.values():
            path = run.root / ref.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_bytes(torch.full((3, 16, 16), shade, dtype=torch.uint8)))
    return replace(run, prompts=dict.fromkeys(NAMES, EVIL))


def test_the_page_is_read_on_any_screen(tmp_path: Path) -> None:
    labels = ("one", "two", "a_run_whose_name_is_very_long_" + "x" * 60)
    runs = [with_pictures(evaluated(label, 0.1 * i, root=tmp_path), 80 * i) for i, label in enumerate(labels)]
    page = tmp_path / "c.html"
    write_page(compare(runs, match(runs, never)), page, prompts=4)
    assert page.stat().st_size < 5_000_000
    with chromium(tmp_path / "profile") as browser:
        tab = browser.page()
        tab.open(page)
        for width in (1100, 420):
            tab.resize(width, 900)
            assert tab.run("document.documentElement.scrollWidth") <= width
            # Names of judges stay on one line.
            assert tab.run("document.querySelector('.compared tbody tr + tr th').clientHeight") < 90
            assert tab.run("document.images.length") == 8 * 4
            assert tab.run("[...document.images].every(one => !one.complete || one.naturalWidth === 16)")
        shades = []
        for scheme in ("light", "dark"):
            tab.media(prefers_color_scheme=scheme)
            shades.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert shades[0] != shades[1]
        tab.resize(720, 900)
        tab.media("print")
        assert tab.run("document.documentElement.scrollWidth") <= 720
        assert tab.asked_for() == [page.as_uri()]
        assert tab.said() == []
        assert tab.run("document.title").startswith("Comparison of one")
