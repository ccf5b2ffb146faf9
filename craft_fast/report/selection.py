"""What the filter kept, and how candidates and the accepted differ."""

from __future__ import annotations

from craft_fast.report import charts, figures
from craft_fast.report.document import section
from craft_fast.report.inputs import ReportData
from craft_fast.report.text import esc, number, percent


def selection_section(data: ReportData) -> str:
    """Rule, funnel and histograms; empty without candidates."""
    parts = [_funnel(data), _histograms(data)]
    if not any(parts):
        return ""
    return section("kept", "What was kept", _rule(data), "".join(parts))


def _rule(data: ReportData) -> str:
    """The filter's rule in words, as this run's settings have it."""
    noise = ", made from the same noise" if data.settings["generate"]["noise"] == "shared" else ""
    chosen = data.settings["filter"]
    rule = f"Every variant is compared with the picture of its own plain prompt{noise}, and must beat it on "
    rule += f"{', '.join(esc(name) for name in data.filter_rewards)}." if data.filter_rewards else "nothing: all pass."
    if chosen["keep"] == "all":
        rule += " A group counts only when all of its variants do."
    if data.total_of is not None and set(data.total_of) < set(data.reward_keys):
        made = f"made of {', '.join(map(esc, data.total_of))} alone" if data.total_of else "0 for all"
        rule += f" The total reward and the advantage are {made}."
    if chosen["select"] == "top":
        rule += f" Of those that pass, the {chosen['target_samples']} of highest total reward are taken."
    return rule


def _funnel(data: ReportData) -> str:
    steps = figures.funnel(data.selections, data.filter_rewards)
    if not steps:
        return ""
    total = steps[0].left or 1
    rows = ""
    for position, step in enumerate(steps):
        inner = 0 < position < len(steps) - 1
        name = f"better on {esc(step.label)}" if inner else esc(step.label)
        alone = f"<td class=aside>{_alone(step, total)}</td>" if inner else "<td class=aside></td>"
        kind = "fill" if position == len(steps) - 1 else "soft"
        rows += (
            f"<tr><th scope=row>{'and ' if inner and position > 1 else ''}{name}</th>"
            f"<td class=wide>{charts.share_bar(step.left / total, kind=kind)}</td>"
            f"<td><b>{step.left}</b> {percent(step.left / total, 0)}</td>{alone}</tr>"
        )
    table = f"<table class=funnel><tbody>{rows}</tbody></table>"
    if any(step.asked < total for step in steps):
        table += (
            "<p>A reward that only the filter needs was asked about what others had left; verdicts are the same.</p>"
        )
    if steps[-1].left:
        return table
    hint = "loosen <code>filter.rewards</code> or raise <code>expand.variants</code>"
    return f"{table}<p>Nothing was accepted: {hint}.</p>"


def _alone(step: figures.FunnelStep, total: int) -> str:
    """One reward by itself: whom it lets pass, and whom it alone turns away."""
    of_asked = f" of {step.asked} asked" if step.asked < total else ""
    said = f"alone {percent(step.alone / (step.asked or 1), 0)}{of_asked}"
    return said + (f"; only {esc(step.label)} said no to {step.only}" if step.only else "")


def _histograms(data: ReportData) -> str:
    charted = ""
    for item in figures.histograms(data.scores, data.selections):
        means = f"candidates {number(item.candidates_mean)}"
        if item.accepted_mean is not None:
            means += f", <b>accepted {number(item.accepted_mean)}</b>"
        charted += (
            f"<figure><figcaption><b>{esc(item.reward)}</b> <span>{means}</span></figcaption>"
            f"{charts.histogram_chart(item)}"
            f"<div class=range><span>{number(item.low)}</span><span>{number(item.high)}</span></div></figure>"
        )
    if not charted:
        return ""
    legend = "<span class=all>all candidates</span><span class=kept>accepted</span> share of pictures by reward"
    title = "<h3>Rewards of candidates and of the accepted</h3>"
    return f"{title}<p class=legend>{legend}</p><div class=charts>{charted}</div>"
