"""One HTML file that needs no network, and the same as JSON: did it get better, by how much, at what cost?

``inputs`` reads the run; ``figures`` and ``agreement`` do the arithmetic, ``advice`` draws conclusions; ``charts``,
``images`` and ``text`` make what a page is made of; ``pictures``, ``judges``, ``table``, ``selection``, ``training``
and ``facts`` are its parts, ``page`` their order, ``document`` the frame that other pages use too. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from craft_fast.report.inputs import ReportInputs, find_inputs, gather
from craft_fast.report.page import render_page
from craft_fast.report.summary import report_json
from craft_fast.store import atomic

if TYPE_CHECKING:
    from craft_fast.config import Settings
    from craft_fast.store.run import Run

__all__ = ["ReportInputs", "build_report", "find_inputs"]


def build_report(run: Run, settings: Settings, inputs: ReportInputs | None = None) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the run's folder from what the run has so far.

    A part that is missing (no evaluation yet, nothing accepted) makes the page shorter.

    Args:
        run: the open run.
        settings: the run's resolved settings, shown and used for the title and the number of prompts.
        inputs: the keys to read under; None: those of the manifest's stage rows.

    Returns:
        The paths of the HTML file and of the JSON file.
    """
    data = gather(run, settings, inputs if inputs is not None else find_inputs(run.manifest))
    page, figures = run.path("report.html"), run.path("report.json")
    atomic.write_json(figures, report_json(data))
    atomic.write_text(page, render_page(data))
    return page, figures
