"""The page: its parts in the order of a reader's questions. Plain HTML and SVG, no script, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import resources

from craft_fast.records import EvalRow, Provenance, StageRow
from craft_fast.report import charts, figures
from craft_fast.report.images import Picture, data_uris
from craft_fast.report.inputs import Pair, ReportData
from craft_fast.report.text import duration, esc, number, percent, points, quoted, signed

# No address is ever asked for, and no script runs even if one got in: the browser enforces both.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_WORST = 4
_STRIPS = 4
_STRIP_IMAGES = 7
_STRIP_BUDGET = 300_000


def render_page(data: ReportData) -> str:
    """The whole page as one HTML text.

    Args:
        data: the gathered run.
    """
    data = replace(data, evaluation=[row for row in data.evaluation if figures.is_measured(row)])
    style = resources.files("craft_fast.report").joinpath("style.css").read_text(encoding="utf-8")
    parts = [_head(data), _pictures(data), _judges(data), _selection(data), _training(data), _cost(data), _facts(data)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{esc(data.title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2><p class=lead>{lead}</p>{body}</section>"


# ---- first screen: did it get better, by how much, at what cost


def _head(data: ReportData) -> str:
    result = figures.verdict(data.evaluation)
    cards = [*_result_cards(data, result.row), *_cost_cards(data)]
    shown = "".join(
        f"<div class=card><h3>{esc(name)}</h3><p class=big>{value}</p><p>{note}</p></div>"
        for name, value, note in cards
    )
    return (
        f"<header><p class=kicker>{esc(data.title)} <span>run {esc(data.name)}, {esc(data.made)}</span></p>"
        f'<h1 class="{result.direction}">{esc(result.headline)}</h1>'
        f"<p class=answer>{_answer(data, result)}</p><div class=cards>{shown}</div></header>"
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
    sentence += f"<b>{_level(row, row.base_mean)}</b> to <b>{_level(row, row.tuned_mean)}</b>."
    if result.direction == "unclear":
        sentence += " The 95 % interval of every held-out judge includes no change."
    return sentence


def _level(row: EvalRow, value: float) -> str:
    return percent(value) if figures.is_rate(row) else number(value, 4)


def _shift(row: EvalRow, value: float) -> str:
    return points(value) if figures.is_rate(row) else signed(value)


def _result_cards(data: ReportData, row: EvalRow | None) -> list[tuple[str, str, str]]:
    if row is None:
        return []
    change = row.tuned_mean - row.base_mean
    unit = " <small>points</small>" if figures.is_rate(row) else ""
    interval = f"95 % interval {_shift(row, row.ci_low)} to {_shift(row, row.ci_high)}"
    cards = [(f"{row.metric}, {'held out' if row.held_out else 'training'}", f"{_shift(row, change)}{unit}", interval)]
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


# ---- pictures


def _pictures(data: ReportData) -> str:
    if not data.pairs:
        return ""
    shown = list(data.pairs[: data.grid_prompts])
    row = figures.primary_row(data.evaluation)
    judges = [item.metric for item in data.evaluation if item.held_out and not figures.is_rate(item)]
    metric = judges[0] if judges else row.metric if row else ""
    worst = figures.worst_pairs(data.pairs, metric, _WORST) if metric else []
    pictures = data_uris([path for pair in [*shown, *worst] for path in (pair.base, pair.tuned)])
    halves = list(zip(pictures[::2], pictures[1::2], strict=True))
    figure = partial(_pair, metric=metric, oracle=any(item.metric == "oracle" for item in data.evaluation))
    grid = "".join(figure(pair, half) for pair, half in zip(shown, halves, strict=False))
    lead = (
        f"The first {len(shown)} of {len(data.pairs)} held-out prompts, not picked. "
        "Left the base model, right the tuned one, same seed."
    )
    body = f"<div class=grid>{grid}</div>"
    if worst:
        lost = "".join(figure(pair, half) for pair, half in zip(worst, halves[len(shown) :], strict=True))
        body += f"<h3>Where it lost most, by {esc(metric)}</h3><div class=grid>{lost}</div>"
    return _section("Before and after", lead, body)


def _pair(pair: Pair, halves: tuple[Picture, Picture], *, metric: str, oracle: bool) -> str:
    images = ""
    sides = (("base", pair.base_scores), ("tuned", pair.tuned_scores))
    for picture, (side, scores) in zip(halves, sides, strict=True):
        kind = " class=small" if picture.small else ""
        mark = _mark(scores["oracle"] >= 0.5) if oracle and "oracle" in scores else ""
        images += f'<div><img{kind} src="{picture.uri}" alt="{side}: {esc(pair.prompt)}">'
        images += f"<span>{side} {mark}</span></div>"
    change = ""
    if metric in pair.base_scores and metric in pair.tuned_scores:
        moved = pair.tuned_scores[metric] - pair.base_scores[metric]
        change = f"<em>{esc(metric)} {signed(moved, 2)}</em>"
    return f"<figure><div class=pair>{images}</div><figcaption>{quoted(pair.prompt)}{change}</figcaption></figure>"


def _mark(passed: bool) -> str:
    return "<i class=pass>&#10003; passes</i>" if passed else "<i class=fail>&#10007; fails</i>"


# ---- judges


def _judges(data: ReportData) -> str:
    if not data.evaluation:
        return ""
    groups = [
        (True, "Held-out judges", "never seen by filter or training"),
        (False, "Training rewards", "the filter's own; they can rise by being exploited"),
    ]
    head = "<tr><th>judge<th>base<th>tuned<th class=wide>change, 95 %<th class=wide>win rate, 95 %</tr>"
    body = ""
    for held_out, name, note in groups:
        rows = [row for row in data.evaluation if row.held_out is held_out]
        if rows:
            body += f"<tbody><tr class=group><th colspan=5>{name} <span>{note}</span></th></tr>"
            body += "".join(_judge(row, data.reward_notes.get(row.metric, "")) for row in rows) + "</tbody>"
    lead = (
        f"{data.evaluation[0].n} held-out prompts, paired by seed. A win rate of 50 % is no change; ties count one "
        "half. Intervals: paired bootstrap for the change, Wilson for the win rate. Compare within this run only."
    )
    return _section("What the judges say", lead, f"<table class=judges><thead>{head}</thead>{body}</table>")


def _judge(row: EvalRow, note: str) -> str:
    change = row.tuned_mean - row.base_mean
    low, high = figures.wilson(row.win_rate, row.n)
    unit = " points" if figures.is_rate(row) else ""
    moved = f"<b>{_shift(row, change)}</b> {_shift(row, row.ci_low)} to {_shift(row, row.ci_high)}{unit}"
    wins = f"<b>{percent(row.win_rate, 0)}</b> {100 * low:.0f} to {100 * high:.0f}"
    return (
        f'<tr><th title="{esc(note)}">{esc(row.metric)}</th>'
        f"<td data-label=base>{_level(row, row.base_mean)}</td><td data-label=tuned>{_level(row, row.tuned_mean)}</td>"
        f"<td class=wide>{charts.change_bar(row)}<span>{moved}</span></td>"
        f"<td class=wide>{charts.win_bar(row)}<span>{wins}</span></td></tr>"
    )


# ---- candidates, filter


def _selection(data: ReportData) -> str:
    parts = [_funnel(data), _histograms(data)]
    if not any(parts):
        return ""
    return _section("What was kept", _rule(data), "".join(parts))


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
        of_asked = f" of {step.asked} asked" if step.asked < total else ""
        name = f"better on {esc(step.label)}" if inner else esc(step.label)
        alone = f" <span>alone {percent(step.alone / (step.asked or 1), 0)}{of_asked}</span>" if inner else ""
        kind = "fill" if position == len(steps) - 1 else "soft"
        rows += (
            f"<tr><th>{'and ' if inner and position > 1 else ''}{name}</th>"
            f"<td class=wide>{charts.share_bar(step.left / total, kind=kind)}</td>"
            f"<td><b>{step.left}</b> {percent(step.left / total, 0)}{alone}</td></tr>"
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


# ---- training and cost


def _training(data: ReportData) -> str:
    strips = _strips(data)
    if len(data.losses) < 2:
        return _section("Training", "Pictures drawn during training.", strips) if strips else ""
    values = [loss for _, loss in data.losses]
    average = figures.smooth(values, max(5, len(values) // 15))
    lead = (
        f"Weighted noise-prediction loss over {len(values)} optimizer steps, faint, and its moving average: "
        f"{number(average[0])} to {number(average[-1])}. It shows whether training was stable, not whether pictures "
        "got better."
    )
    return _section("Training", lead, charts.loss_chart(data.losses) + strips)


def _strips(data: ReportData) -> str:
    """The first prompts as they were drawn at intervals of training, from the base model on."""
    shown = [(strip.prompt, figures.spread(strip.images, _STRIP_IMAGES)) for strip in data.strips[:_STRIPS]]
    pictures = iter(data_uris([path for _, images in shown for _, path in images], _STRIP_BUDGET))
    rows = ""
    for prompt, images in shown:
        cells = ""
        for label, _ in images:
            picture = next(pictures)
            kind = " class=small" if picture.small else ""
            cells += f'<div><img{kind} src="{picture.uri}" alt="{label}: {esc(prompt)}"><span>{label}</span></div>'
        rows += f"<figure><div class=strip>{cells}</div><figcaption>{quoted(prompt)}</figcaption></figure>"
    return f"<h3>Drawn during training, same seed</h3><div class=strips>{rows}</div>" if rows else ""


def _cost(data: ReportData) -> str:
    if not data.stages:
        return ""
    longest = max(row.seconds for row in data.stages) or 1.0
    head = "<tr><th>stage<th class=wide>time<th><th>peak memory</tr>"
    rows = "".join(_stage(row, longest) for row in data.stages)
    total = duration(sum(row.seconds for row in data.stages))
    lead = f"{esc(total)} over {len(data.stages)} stages; work that was already done costs nothing."
    return _section("What it cost", lead, f"<table class=cost><thead>{head}</thead><tbody>{rows}</tbody></table>")


def _stage(row: StageRow, longest: float) -> str:
    peak = f"{row.peak_gib:.2f} GiB" if row.peak_gib is not None else "\u2013"
    return (
        f"<tr><th>{esc(row.name)}{_info(row)}</th><td class=wide>{charts.share_bar(row.seconds / longest)}</td>"
        f"<td>{esc(duration(row.seconds))}</td><td>{peak}</td></tr>"
    )


def _info(row: StageRow) -> str:
    """The plain figures that a stage noted, as ``images 640, images_per_s 6.1``."""
    notes = [
        f"{name} {value if isinstance(value, int) else number(value)}"
        for name, value in row.info.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return f"<span>{esc(', '.join(notes))}</span>" if notes else ""


# ---- facts


def _facts(data: ReportData) -> str:
    parts = [
        ("Rewards", _definitions(_ways(data))),
        ("Versions", _definitions(list(data.versions.items()))),
        ("Digests", _definitions(_digests(data))),
        ("Settings", f"<pre>{esc(data.settings_text)}</pre>"),
    ]
    body = "".join(f"<details><summary>{name}</summary>{content}</details>" for name, content in parts)
    use = ""
    if data.loras:
        file = f"{data.name}/{data.loras[0].path}"
        use = f"<p>Use it: <code>pipe.load_lora_weights(&quot;{esc(file)}&quot;)</code></p>"
    lead = f"Seed {data.seed}. The same command with these settings, versions and device makes the same files."
    return _section("To repeat it", lead, use + body)


def _digests(data: ReportData) -> list[tuple[str, str]]:
    model = [("model", data.model_digest)] if data.model_digest else []
    loras = [(ref.path, ref.sha256) for ref in data.loras]
    rewards = [(f"reward {name}", key) for name, key in data.reward_keys.items()]
    return [*loras, *model, *rewards, *((f"stage {row.name}", row.key) for row in data.stages)]


def _ways(data: ReportData) -> list[tuple[str, str]]:
    """One line a reward: how its scores came about."""
    return [
        (name, "; also: ".join(map(_way, ways)) if ways else "no scores yet") for name, ways in data.provenances.items()
    ]


def _way(way: Provenance | None) -> str:
    if way is None:
        return "how its scores came about was not recorded"
    named = {
        "checkpoint": way.checkpoint[:12],
        "pictures": way.preprocessing,
        "text": way.tokenizer,
        "precision": way.precision,
    }
    parts = [way.backend, *(f"{name} {value}" for name, value in named.items() if value), way.note]
    return ", ".join(part for part in parts if part)


def _definitions(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in items) + "</dl>"
