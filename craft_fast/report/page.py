"""The page: its parts in the order of a reader's questions. Plain HTML and SVG, and one small script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from craft_fast.records import EvalRow
from craft_fast.report import figures
from craft_fast.report.advice import Advice, advise
from craft_fast.report.document import PAGE_BYTES, document, links
from craft_fast.report.facts import facts_section, next_section
from craft_fast.report.inputs import ReportData
from craft_fast.report.judges import agreement_section, judges_section, level, shift
from craft_fast.report.pictures import pictured, pictures_section
from craft_fast.report.selection import selection_section
from craft_fast.report.table import table_section
from craft_fast.report.text import duration, esc, percent
from craft_fast.report.training import cost_section, training_section

_LEAST_BUDGET = 400_000
_CONTENTS = (
    ("pictures", "Pictures"), ("judges", "Judges"), ("prompts", "Every prompt"), ("agreement", "Agreement"),
    ("kept", "What was kept"), ("training", "Training"), ("cost", "Cost"), ("next", "What next"), ("repeat", "Repeat"),
)  # fmt: skip


def render_page(data: ReportData) -> str:
    """The whole page as one HTML text.

    Args:
        data: the gathered run.
    """
    data = measured(data)
    advice = advise(data)
    linked = set(pictured(data.pairs, data.grid_prompts))
    parts = [
        judges_section(data), table_section(data, linked), agreement_section(data, linked), selection_section(data),
        training_section(data), cost_section(data), next_section(data, advice), facts_section(data),
    ]  # fmt: skip
    # What the words leave of the page is for the pictures; base64 makes four bytes of three.
    left = PAGE_BYTES - sum(len(part.encode()) for part in [document(data.title, []), *parts])
    parts.insert(0, pictures_section(data, max(_LEAST_BUDGET, left * 3 // 4)))
    there = [(name, text) for name, text in _CONTENTS if any(part.startswith(f"<section id={name} ") for part in parts)]
    return document(data.title, parts, header=f"<header>{_head(data, advice)}{links(there)}</header>")


def measured(data: ReportData) -> ReportData:
    """The same without metrics that hold no figures."""
    return replace(data, evaluation=[row for row in data.evaluation if figures.is_measured(row)])


# ---- first screen: did it get better, by how much, at what cost


def _head(data: ReportData, advice: Sequence[Advice]) -> str:
    result = figures.verdict(data.evaluation)
    cards = [*_result_cards(data, result.row), *_cost_cards(data)]
    shown = "".join(
        f"<div class=card><h3>{esc(name)}</h3><p class=big>{value}</p><p>{note}</p></div>"
        for name, value, note in cards
    )
    return (
        f"<p class=kicker>{esc(data.title)} <span>run {esc(data.name)}, {esc(data.made)}</span></p>"
        f'<h1 class="{result.direction}">{esc(result.headline)}</h1>'
        f"<p class=answer>{_answer(data, result)}{_pointer(advice)}</p><div class=cards>{shown}</div>"
    )


def _answer(data: ReportData, result: figures.Verdict) -> str:
    row = result.row
    if row is None:
        made = f"{len(data.candidates)} candidates so far." if data.candidates else "No candidates so far."
        return f"{made} The stage <code>evaluate</code> compares with the base model."
    kind = "held-out" if row.held_out else "training"
    judged = f"the mean of {kind} reward {esc(row.metric)}"
    if row.metric == "oracle":
        judged = "pictures that pass the oracle"
    moved = "rose" if row.tuned_mean > row.base_mean else "fell" if row.tuned_mean < row.base_mean else "stayed"
    sentence = f"On {row.n} held-out prompts, same seeds before and after, {judged} {moved} from "
    sentence += f"<b>{level(row, row.base_mean)}</b> to <b>{level(row, row.tuned_mean)}</b>."
    if result.direction == "unclear":
        sentence += " The 95 % interval of every held-out judge includes no change."
    return sentence


def _pointer(advice: Sequence[Advice]) -> str:
    """Where the reader finds what to do."""
    if not advice:
        return ""
    more = f" and {len(advice) - 1} more" if len(advice) > 1 else ""
    return f' <span>To try next: <a href="#next">{esc(advice[0].title)}</a>{more}.</span>'


def _result_cards(data: ReportData, row: EvalRow | None) -> list[tuple[str, str, str]]:
    if row is None:
        return []
    change = row.tuned_mean - row.base_mean
    unit = " <small>points</small>" if figures.is_rate(row) else ""
    interval = f"95 % interval {shift(row, row.ci_low)} to {shift(row, row.ci_high)}"
    cards = [(f"{row.metric}, {'held out' if row.held_out else 'training'}", f"{shift(row, change)}{unit}", interval)]
    judges = [item for item in data.evaluation if item.held_out and not figures.is_rate(item)]
    judge = judges[0] if judges else row
    low, high = figures.wilson(judge.win_rate, judge.n)
    note = f"by {esc(judge.metric)}; 95 % interval {100 * low:.0f} to {100 * high:.0f} %, 50 % is no change"
    return [*cards, ("wins against the base", f"{100 * judge.win_rate:.0f} <small>%</small>", note)]


def _cost_cards(data: ReportData) -> list[tuple[str, str, str]]:
    cards = []
    if data.candidates:
        accepted = sum(row.accepted for row in data.selections)
        share = f", {percent(accepted / len(data.candidates))}" if accepted else ""
        cards.append(("training samples", f"{accepted}", f"accepted of {len(data.candidates)} candidates{share}"))
    seconds = sum(row.seconds for row in data.stages)
    peaks = [row.peak_gib for row in data.stages if row.peak_gib is not None]
    if data.stages:
        note = f"peak memory {max(peaks):.2f} GiB" if peaks else "memory was not measured"
        cards.append(("time, all stages", esc(duration(seconds)), note))
    return cards
