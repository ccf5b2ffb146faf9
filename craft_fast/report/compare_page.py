"""The page of a comparison: one HTML file like the report, no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from craft_fast.errors import UsageError
from craft_fast.records import EvalRow, Provenance
from craft_fast.report import charts
from craft_fast.report.compare_figures import Claim, Comparison, Judge
from craft_fast.report.compare_inputs import Evaluated
from craft_fast.report.figures import is_rate
from craft_fast.report.images import Picture, data_uris
from craft_fast.report.text import duration, esc, number, percent, points, quoted, signed
from craft_fast.store import atomic

MARK = '<meta name="generator" content="craft-fast compare">'
MOST_PICTURES = 1200
"""With more of them on a page, each would be too small to see anything in 5 MB."""
# No address is ever asked for, and no script runs even if one got in: the browser enforces both.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_APART = 6
_HEADLINES = {
    "better": "{two} scores higher than {one}",
    "worse": "{two} scores lower than {one}",
    "mixed": "The judges disagree",
    "unclear": "No clear difference",
    "same": "The same pictures",
    "none": "Nothing to tell them apart by",
}


def check_target(path: Path, runs: Sequence[Path]) -> None:
    """Refuse to write where something else is.

    Args:
        path: the page's file.
        runs: the compared runs' folders, in which nothing is changed.

    Raises:
        UsageError: a folder, a file that is no comparison's page, or a place in a run's folder.
    """
    hint = "give another file with --output"
    if any(path.resolve().is_relative_to(root.resolve()) for root in runs):
        raise UsageError("Nothing is written into the runs that are compared", where=str(path), hint=hint)
    if path.is_dir():
        raise UsageError("A file is wanted, this is a folder", where=str(path), hint=hint)
    if path.exists():
        with path.open("rb") as file:
            start = file.read(4096)
        if MARK.encode() not in start:
            raise UsageError("This file is not a comparison's page, so it is kept", where=str(path), hint=hint)


def write_page(found: Comparison, path: Path, *, prompts: int) -> None:
    """Write the page.

    Args:
        found: the comparison.
        path: its file; see ``check_target``.
        prompts: how many of the shared prompts are shown, from the first; those where the runs differ most come too.
    """
    atomic.write_text(path, render(found, prompts=prompts))


def render(found: Comparison, *, prompts: int) -> str:
    """The whole page as one HTML text."""
    style = "".join(
        resources.files("craft_fast.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "compare.css")
    )
    parts = [_head(found), _judges(found), _against(found), _pictures(found, prompts), _apart(found), _facts(found)]
    title = "Comparison of " + ", ".join(run.label for run in found.runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{MARK}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2><p class=lead>{lead}</p>{body}</section>"


def _table(kind: str, head: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class=scroll><table class="{kind}">{body}</table></div>'


def _name(run: Evaluated) -> str:
    return quoted(run.label)


# ---- first screen


def _head(found: Comparison) -> str:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    claims = "".join(f"<li>{esc(claim.sentence)}</li>" for claim in found.claims)
    direction = found.claims[0].direction if len(found.claims) == 1 else "unclear"
    return (
        f"<header><p class=kicker>Comparison <span>{', '.join(map(_name, found.runs))}; {made}</span></p>"
        f'<h1 class="{direction}">{esc(_headline(found))}</h1>'
        f"<ul class='answer claims'>{claims}</ul><div class=cards>{_cards(found)}</div></header>"
    )


def _headline(found: Comparison) -> str:
    if len(found.claims) > 1:
        return f"{len(found.runs)} runs on {len(found.shared.prompts)} prompts"
    [claim] = found.claims
    labels = {"one": found.runs[claim.first].label, "two": found.runs[claim.second].label}
    return _HEADLINES[claim.direction].format(**labels)


def primary(judges: Sequence[Judge]) -> Judge | None:
    """The judge that a run's card shows: the oracle, else the first that was held out in all runs, else the first."""
    held_out = [judge for judge in judges if all(judge.held_out)] or list(judges)
    return next((judge for judge in held_out if judge.name == "oracle"), held_out[0] if held_out else None)


def _cards(found: Comparison) -> str:
    judge = primary(found.judges)
    cards = []
    for i, (run, cost) in enumerate(zip(found.runs, found.costs, strict=True)):
        big, note = "\u2013", "no judge in common"
        if judge is not None:
            row = judge.runs[i]
            big = _level(row, row.tuned_mean)
            note = f"{esc(judge.name)}, base {_level(row, row.base_mean)}; wins {percent(row.win_rate, 0)} against it"
        made = f"{cost.accepted} samples, " if cost.accepted is not None else ""
        cards.append(
            f"<div class=card><h3>{_name(run)}</h3><p class=big>{big}</p><p>{note}</p>"
            f"<p>{made}{esc(duration(cost.seconds))}</p></div>"
        )
    return "".join(cards)


def _level(row: EvalRow, value: float) -> str:
    return percent(value) if is_rate(row) else number(value, 4)


def _shift(row: EvalRow, value: float) -> str:
    return points(value) if is_rate(row) else signed(value)


# ---- figures


def _judges(found: Comparison) -> str:
    first = _name(found.runs[0])
    lead = (
        f"Means on the {len(found.shared.prompts)} prompts that all runs drew from the same noise, and each run "
        f"against {first}, prompt by prompt. Each 95 % interval stands for itself: of twenty, one misses by chance."
    )
    head = ["", "base", *map(_name, found.runs)]
    head += [f"{_name(run)} against {first}" for run in found.runs[1:]]
    rows = []
    for title, held_out in (("Held out in all", True), ("Trained on", False)):
        chosen = [judge for judge in found.judges if all(judge.held_out) is held_out]
        if chosen:
            rows.append(f'<tr class=group><th colspan="{len(head)}">{title}</th></tr>')
            rows += [_judge_row(judge, found) for judge in chosen]
    notes = [f"{name}: {why}" for name, why in found.left_out]
    body = _table("compared", head, rows) if rows else ""
    if notes:
        body += f"<ul class=notes>{''.join(f'<li>Not compared: {esc(note)}</li>' for note in notes)}</ul>"
    return _section("By each judge", lead, body)


def _judge_row(judge: Judge, found: Comparison) -> str:
    trained = [run.label for run, unseen in zip(found.runs, judge.held_out, strict=True) if not unseen]
    note = f"<span> trained on by {esc(', '.join(trained))}</span>" if 0 < len(trained) < len(found.runs) else ""
    cells = [f"<th>{esc(judge.name)}{note}</th>", f"<td>{_level(judge.runs[0], judge.base_mean)}</td>"]
    cells += [f"<td>{_level(row, row.tuned_mean)}</td>" for row in judge.runs]
    for j in range(1, len(found.runs)):
        row = judge.pairs[0, j]
        change = f"<b>{_shift(row, row.tuned_mean - row.base_mean)}</b>"
        interval = f"{_shift(row, row.ci_low)} to {_shift(row, row.ci_high)}; wins {percent(row.win_rate, 0)}"
        cells.append(f"<td class=wide>{charts.change_bar(row)}<span>{change} ({interval})</span></td>")
    return f"<tr>{''.join(cells)}</tr>"


def _against(found: Comparison) -> str:
    """Win rates of all pairs; with two runs the table above has them."""
    if len(found.runs) < 3 or not found.judges:
        return ""
    rows = []
    for claim in found.claims:
        cells = "".join(_win(judge.pairs[claim.first, claim.second]) for judge in found.judges)
        two, one = found.runs[claim.second], found.runs[claim.first]
        rows.append(f"<tr><th>{_name(two)} against {_name(one)}</th>{cells}</tr>")
    lead = (
        "Share of prompts on which the first scores higher; a tie counts one half. Coloured where the interval of the "
        "mean difference leaves out zero."
    )
    return _section("Run against run", lead, _table("runs", ["", *(esc(judge.name) for judge in found.judges)], rows))


def _win(row: EvalRow) -> str:
    kind = "up-text" if row.ci_low > 0 else "down-text" if row.ci_high < 0 else ""
    return f'<td class="{kind}">{percent(row.win_rate, 0)}</td>'


# ---- pictures


def _pictures(found: Comparison, count: int) -> str:
    names = list(found.shared.prompts)
    shown = names[: min(count, MOST_PICTURES // (len(found.runs) + 1))]
    rest = sorted(set(names) - set(shown), key=lambda name: (-found.spread[name], name))
    apart = rest[:_APART] if found.judges else []
    files = {name: _files(found, name) for name in (*shown, *apart)}
    paths = [path for row in files.values() for path in row if path is not None]
    if not files:
        return ""
    drawn = dict(zip(paths, data_uris(paths), strict=True)) if paths else {}
    lead = f"Same prompt, same noise; {len(shown)} of {len(names)} prompts."
    body = f"<div class=versus>{''.join(_row(found, name, files[name], drawn) for name in shown)}</div>"
    if apart:
        rows = "".join(_row(found, name, files[name], drawn) for name in apart)
        body += f"<h3>Of the others, where the runs' scores are farthest apart</h3><div class=versus>{rows}</div>"
    return _section("Side by side", lead, body)


def _files(found: Comparison, name: str) -> list[Path | None]:
    return [found.runs[0].file("base", name), *(run.file("tuned", name) for run in found.runs)]


def _row(found: Comparison, name: str, files: Sequence[Path | None], drawn: Mapping[Path, Picture]) -> str:
    labels = ["base", *(run.label for run in found.runs)]
    judge = primary(found.judges)
    scores: list[float | None] = [None] * len(labels)
    if judge is not None:
        scores = [found.runs[0].scores["base"][judge.name][name]]
        scores += [run.scores["tuned"][judge.name][name] for run in found.runs]
    cells = []
    for label, path, score in zip(labels, files, scores, strict=True):
        value = f" {esc(judge.name)} {number(score)}" if judge is not None and score is not None else ""
        shown = "<div class=gone>not there any more</div>"
        if path is not None:
            picture = drawn[path]
            kind = ' class="small"' if picture.small else ""
            shown = f'<img src="{picture.uri}" alt="{esc(label)}" loading=lazy{kind}>'
        cells.append(f"<div>{shown}<span><b>{quoted(label)}</b>{value}</span></div>")
    text = found.shared.prompts[name]
    return f"<figure><figcaption>{quoted(text)}</figcaption><div class=side>{''.join(cells)}</div></figure>"


# ---- what sets the runs apart


def _apart(found: Comparison) -> str:
    head = ["", *map(_name, found.runs)]
    rows = [
        f"<tr><th>{esc(key)}</th>{''.join(f'<td>{esc(_value(value))}</td>' for value in values)}</tr>"
        for key, values in found.settings
    ]
    lead = "Settings that are not equal." if rows else "All settings are equal."
    settings = _section("What sets them apart", lead, _table("settings", head, rows) if rows else "")
    return settings + _section("What they cost", _overlap(found), _costs(found))


def _value(value: Any) -> str:
    if value is None:
        return "\u2013"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _costs(found: Comparison) -> str:
    rows = []
    for run, cost in zip(found.runs, found.costs, strict=True):
        figures = [cost.images, cost.accepted, cost.steps]
        cells = [duration(cost.seconds), *("\u2013" if value is None else str(value) for value in figures)]
        cells.append("\u2013" if cost.peak_gib is None else f"{cost.peak_gib:.2f} GiB")
        rows.append(f"<tr><th>{_name(run)}</th>{''.join(f'<td>{esc(cell)}</td>' for cell in cells)}</tr>")
    return _table("runs", ["", "time", "images", "accepted", "steps", "peak memory"], rows)


def _overlap(found: Comparison) -> str:
    """How much of what the runs were trained on is the same."""
    parts = []
    for (i, j), both in found.overlap.items():
        one, two = found.runs[i], found.runs[j]
        sizes = f"{len(one.trained_on)} and {len(two.trained_on)}"
        parts.append(f"Of the {sizes} training pictures of {_name(one)} and {_name(two)}, {both} are in both.")
    return " ".join(parts)


def _facts(found: Comparison) -> str:
    said = [f"{len(found.shared.prompts)} prompts were compared."]
    if found.shared.rounded:
        said.append(f"On {found.shared.rounded} of them the base pictures are equal but for rounding.")
    notes = [*said, *(f"Left out: {line}." for line in found.shared.left_out)]
    runs = [(run.label, _run_facts(run)) for run in found.runs]
    ways = [(judge.name, _way(judge.provenance)) for judge in found.judges]
    parts = [("Runs", _definitions(runs)), ("How scores came about", _definitions(ways))]
    body = f"<ul class=notes>{''.join(f'<li>{esc(note)}</li>' for note in notes)}</ul>" + "".join(
        f"<details><summary>{title}</summary>{content}</details>" for title, content in parts
    )
    lead = (
        "Pictures are compared where the base model drew the same one in every run: same model, settings, prompt and "
        "noise."
    )
    return _section("What was compared", lead, body)


def _run_facts(run: Evaluated) -> str:
    files = [f"{ref.path}, sha256 {ref.sha256}" for ref in run.loras]
    return "; ".join([str(run.root), f"seed of the pictures {run.seed}", *files])


def _way(way: Provenance) -> str:
    named = {"checkpoint": way.checkpoint[:12], "pictures": way.preprocessing, "text": way.tokenizer}
    parts = [way.backend, *(f"{name} {value}" for name, value in named.items() if value), way.precision, way.note]
    return ", ".join(part for part in parts if part)


def _definitions(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{quoted(name)}</dt><dd>{esc(value)}</dd>" for name, value in items) + "</dl>"


__all__ = ["MARK", "Claim", "check_target", "primary", "render", "write_page"]
