"""Every evaluated prompt with every reward: a table that is whole without a script, and sorts with one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from craft_fast.report import figures
from craft_fast.report.agreement import change, changes, size_of_change
from craft_fast.report.document import section
from craft_fast.report.inputs import Pair, ReportData
from craft_fast.report.text import breakable, esc, fixed, quoted

_LEVELS = (0.25, 0.75, 1.5)
"""Changes above so many times their root mean square are tinted faintly, plainly, strongly."""

_ROWS = 20
"""A longer table scrolls in its own box."""


def judges_in_order(data: ReportData) -> dict[str, bool]:
    """Judges that were measured, held-out ones first: name to whether it was held out."""
    rows = sorted(data.evaluation, key=lambda row: not row.held_out)
    return {row.metric: row.held_out for row in rows}


def worst_first(pairs: Sequence[Pair], metric: str) -> list[int]:
    """Positions of all pairs by their change on ``metric``, the greatest loss first; what has no score comes last."""
    moved = [change(pair, metric) for pair in pairs]
    return sorted(range(len(pairs)), key=lambda n: math.inf if moved[n] is None else float(moved[n] or 0.0))


def tint(value: float, size: float) -> int:
    """-3 to 3: how strongly a change is coloured.

    Args:
        value: the change.
        size: its root mean square over the prompts.
    """
    level = sum(abs(value) > share * size for share in _LEVELS) if size else 0
    return level if value > 0 else -level


def table_section(data: ReportData, linked: Collection[int]) -> str:
    """The part of the page with all prompts; empty without scores.

    Args:
        data: the gathered run; ``evaluation`` holds measured rows alone.
        linked: positions of prompts whose pictures are in the page, to be led to.
    """
    judges = judges_in_order(data)
    if not judges or not data.pairs:
        return ""
    metric = figures.ranking_metric(data.evaluation)
    sizes = {name: size_of_change(data.pairs, name) for name in judges}
    columns = [_Column(name, sizes[name], _decimals(data.pairs, name)) for name in judges]
    head = "<th scope=col data-sort=number class=n>no.</th><th scope=col data-sort=text>prompt</th>"
    for column in columns:
        head += column.heads(held_out=judges[column.name], sorted_by=column.name == metric)
    rows = ""
    for n in worst_first(data.pairs, metric):
        pair = data.pairs[n]
        shown = prompt_link(pair.prompt, n, linked)
        cells = "".join(column.cells(pair) for column in columns)
        rows += (
            f'<tr data-n="{n + 1}"><td data-v="{n + 1}" class=n>{n + 1}</td><th scope=row>{shown}</th>{cells}</tr>\n'
        )
    lead = (
        f"All {len(data.pairs)} that were evaluated, sorted by what {esc(metric)} lost. Colour: a change against the "
        "usual size of that judge\u2019s changes."
    )
    if "oracle" in judges:
        lead += " Oracle: \u2713 passes, \u2717 fails."
    table = f'<table class="prompts sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    tall = " tall" if len(data.pairs) > _ROWS else ""
    body = f'<div class="scroll{tall}" role=region tabindex=0 aria-label="Scores of every prompt">{table}</div>'
    return section("prompts", "Every prompt", lead, body)


def prompt_link(prompt: str, position: int, linked: Collection[int]) -> str:
    """A prompt that leads to its pictures where those are in the page: to the viewer, or without a script to the pair.

    Args:
        prompt: its text.
        position: among the pairs.
        linked: positions whose pictures are in the page.
    """
    text = quoted(prompt)
    return f'<a href="#p{position + 1}" data-n="{position + 1}">{text}</a>' if position in linked else text


def _scale(name: str) -> float:
    return 100.0 if figures.is_rate_name(name) else 1.0


def _decimals(pairs: Sequence[Pair], name: str) -> int:
    """Decimals that show two digits of a middling change, so that a column lines up and hides nothing that matters."""
    sizes = sorted(abs(value) * _scale(name) for value in changes(pairs, name) if value)
    return min(5, max(0, 1 - math.floor(math.log10(sizes[len(sizes) // 2])))) if sizes else 2


class _Column:
    """One judge's three columns."""

    def __init__(self, name: str, size: float, decimals: int) -> None:
        self.name, self.size, self.decimals = name, size, decimals
        self.passes = name == "oracle"
        self.scale = _scale(name)

    def heads(self, *, held_out: bool, sorted_by: bool) -> str:
        name, mark = breakable(self.name), " data-held-out" if held_out else ""
        unit = " %" if self.scale != 1 and not self.passes else ""
        parts = ""
        for kind, word in (("level", "base"), ("level", "tuned"), ("delta", "change")):
            own = f' data-reward="{esc(self.name)}" data-unit="{unit.strip()}"{mark}' if kind == "delta" else ""
            order = " aria-sort=ascending" if sorted_by and kind == "delta" else ""
            shown = "points" if unit and kind == "delta" else word + unit
            parts += f"<th scope=col data-sort=number class={kind}{own}{order}>{name} <span>{shown}</span></th>"
        return parts

    def cells(self, pair: Pair) -> str:
        before, after = (self._level(scores) for scores in (pair.base_scores, pair.tuned_scores))
        moved = change(pair, self.name)
        if moved is None:
            return f"{before}{after}<td class=delta>\u2013</td>"
        if self.passes:
            marks = [_mark(scores[self.name]) for scores in (pair.base_scores, pair.tuned_scores)]
            shown = marks[0] if marks[0] == marks[1] else f"{marks[0]} \u2192 {marks[1]}"
        else:
            shown = fixed(moved * self.scale, self.decimals, sign=True)
        colour = tint(moved, self.size)
        tinted = f' data-tint="{colour}"' if colour else ""
        return f'{before}{after}<td class=delta data-v="{moved:.6g}"{tinted}>{shown}</td>'

    def _level(self, scores: Mapping[str, float]) -> str:
        value = scores.get(self.name, math.nan)
        if not math.isfinite(value):
            return "<td class=level>\u2013</td>"
        shown = _mark(value) if self.passes else fixed(value * self.scale, self.decimals)
        return f'<td class=level data-v="{value:.6g}">{shown}</td>'


def _mark(value: float) -> str:
    return "\u2713" if value >= 0.5 else "\u2717"
