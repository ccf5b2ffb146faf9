"""What the judges say together, and where they part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from craft_fast.records import EvalRow
from craft_fast.report import charts, figures
from craft_fast.report.agreement import (
    Agreement,
    Parting,
    Within,
    agreements,
    lowest,
    partings,
    within_groups,
)  # fmt: skip
from craft_fast.report.document import section
from craft_fast.report.inputs import ReportData
from craft_fast.report.table import judges_in_order, prompt_link
from craft_fast.report.text import breakable, esc, fixed, number, percent, points, signed

NAMED = 3
_RHO_LEVELS = (0.15, 0.4, 0.7)


def level(row: EvalRow, value: float) -> str:
    """A mean of a metric as it is read: rates as per cent."""
    return percent(value) if figures.is_rate(row) else number(value, 4)


def shift(row: EvalRow, value: float) -> str:
    """A difference of a metric's means: of rates in percentage points."""
    return points(value) if figures.is_rate(row) else signed(value)


def judges_section(data: ReportData) -> str:
    """The table of metrics; empty without an evaluation."""
    if not data.evaluation:
        return ""
    groups = [
        (True, "Held-out judges", "never seen by filter or training"),
        (False, "Training rewards", "the filter\u2019s own; they can rise by being exploited"),
    ]
    names = ("judge", "base", "tuned")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    head += "".join(f"<th scope=col class=wide>{name}, 95 %</th>" for name in ("change", "win rate"))
    body = ""
    for held_out, name, note in groups:
        rows = [row for row in data.evaluation if row.held_out is held_out]
        if rows:
            body += f"<tbody><tr class=group><th colspan=5 scope=rowgroup>{name} <span>{note}</span></th></tr>"
            body += "".join(_judge(row, data.reward_notes.get(row.metric, "")) for row in rows) + "</tbody>"
    lead = (
        f"{data.evaluation[0].n} held-out prompts, paired by seed. A win rate of 50 % is no change; ties count one "
        "half. Intervals: paired bootstrap for the change, Wilson for the win rate. Compare within this run only."
    )
    table = f"<table class=judges><thead><tr>{head}</tr></thead>{body}</table>"
    return section("judges", "What the judges say", lead, table)


def _judge(row: EvalRow, note: str) -> str:
    change = row.tuned_mean - row.base_mean
    low, high = figures.wilson(row.win_rate, row.n)
    unit = " points" if figures.is_rate(row) else ""
    moved = f"<b>{shift(row, change)}</b> {shift(row, row.ci_low)} to {shift(row, row.ci_high)}{unit}"
    wins = f"<b>{percent(row.win_rate, 0)}</b> {100 * low:.0f} to {100 * high:.0f}"
    return (
        f'<tr><th scope=row title="{esc(note)}">{esc(row.metric)}</th>'
        f"<td data-label=base>{level(row, row.base_mean)}</td><td data-label=tuned>{level(row, row.tuned_mean)}</td>"
        f"<td class=wide>{charts.change_bar(row)}<span>{moved}</span></td>"
        f"<td class=wide>{charts.win_bar(row)}<span>{wins}</span></td></tr>"
    )


# ---- where they part


def agreement_section(data: ReportData, linked: Collection[int]) -> str:
    """How far the judges agree, prompt by prompt; empty with fewer than two of them.

    Args:
        data: the gathered run; ``evaluation`` holds measured rows alone.
        linked: positions of prompts whose pictures are in the page, to be led to.
    """
    judges = judges_in_order(data)
    found = agreements(data.pairs, list(judges))
    if not any(item.same is not None for item in found):
        return ""
    lead = (
        "For every two judges, the share of prompts on which both say the same, better or worse, of those on which "
        "both changed; below it Spearman\u2019s correlation \u03c1 of the changes, which sets the colour. Where "
        "training rewards and held-out judges part, exploitation begins."
    )
    apart = partings(data.pairs, judges)
    parts = [
        _matrix(judges, found, len(data.pairs)),
        _lowest(found, judges),
        _partings(apart, len(data.pairs), judges, linked),
    ]
    training = [name for name, held_out in judges.items() if not held_out]
    parts.append(_candidates(within_groups(data.candidates, data.scores, training)))
    return section("agreement", "Where the judges part", lead, "".join(parts))


def _matrix(judges: Mapping[str, bool], found: Sequence[Agreement], count: int) -> str:
    """The lower triangle: a row for every judge but the first, a column for every one but the last."""
    names = list(judges)
    by_pair = {(item.second, item.first): item for item in found}
    columns = "".join(f"<th scope=col>{_named(name, judges)}</th>" for name in names[:-1])
    rows = ""
    for position, name in enumerate(names[1:], 1):
        cells = "".join(_agreement(by_pair[name, other], count) for other in names[:position])
        empty = f"<td colspan={len(names) - 1 - position}></td>" if position < len(names) - 1 else ""
        rows += f"<tr><th scope=row>{_named(name, judges)}</th>{cells}{empty}</tr>"
    return (
        "<div class=scroll tabindex=0 role=region aria-label='Agreement of the judges'><table class=matrix><thead><tr>"
        f"<td></td>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _named(name: str, judges: Mapping[str, bool]) -> str:
    return f"{breakable(name)}{' <span>held out</span>' if judges[name] else ''}"


def _agreement(item: Agreement, count: int) -> str:
    same = "\u2013" if item.same is None else percent(item.same, 0)
    rho = "\u2013" if item.rho is None else fixed(item.rho, 2)
    strength = sum(abs(item.rho) > step for step in _RHO_LEVELS) if item.rho is not None else 0
    colour = f' data-tint="{strength if (item.rho or 0) > 0 else -strength}"' if strength else ""
    title = f"{item.first} and {item.second}: {item.moved} prompts on which both changed"
    few = f" <small>of {item.moved}</small>" if item.moved < count else ""
    return f'<td{colour} title="{esc(title)}"><b>{same}</b>{few} <span>\u03c1 {rho}</span></td>'


def _lowest(found: Sequence[Agreement], judges: Mapping[str, bool]) -> str:
    item = lowest(found, judges)
    if item is None or item.same is None:
        return "<p class=said>Too few prompts changed on two judges to say where they agree least.</p>"
    across = judges[item.first] is not judges[item.second]
    who = "a training reward and a held-out judge" if across else "two judges"
    tail = " A coin would agree on half." if item.same < 0.6 else ""
    return (
        f"<p class=said>Of {who}, <b>{esc(item.first)}</b> and <b>{esc(item.second)}</b> agree least: on "
        f"{percent(item.same, 0)} of {item.moved} prompts.{tail}</p>"
    )


def _partings(apart: Sequence[Parting], count: int, judges: Mapping[str, bool], linked: Collection[int]) -> str:
    if len(set(judges.values())) < 2:
        missing = "held-out judge" if not any(judges.values()) else "training reward"
        return f"<p class=said>There is no {missing} to hold the others against.</p>"
    if not apart:
        return (
            "<p class=said>On no prompt did the training rewards rise and the held-out judges fall, both by more than "
            "a quarter of their usual changes.</p>"
        )
    items = "".join(
        f"<li>{prompt_link(item.pair.prompt, item.n - 1, linked)} "
        f"<span>training {fixed(item.training, 1, sign=True)}, "
        f"held out {fixed(item.held_out, 1, sign=True)}</span></li>"
        for item in apart[:NAMED]
    )
    what = "These are the" if len(apart) <= NAMED else f"The {NAMED}"
    return (
        f"<p class=said>On <b>{len(apart)} of {count}</b> prompts the training rewards rose and the held-out judges "
        f"fell, both by more than a quarter of their usual changes. {what} widest apart, with mean changes in those "
        "units:</p>"
        f"<ol class=apart>{items}</ol>"
    )


def _candidates(found: Sequence[Within]) -> str:
    known = [item for item in found if item.rho is not None]
    if not known:
        return ""
    said = ", ".join(f"{esc(item.first)} and {esc(item.second)} <b>{fixed(item.rho or 0, 2)}</b>" for item in known)
    return (
        f"<p class=said>On {known[0].groups} groups of candidates the training rewards rank the members so alike "
        f"(\u03c1 of the ranks within each group): {said}.</p>"
    )
