"""Before and after: the viewer, which the script fills, and pairs of pictures, which need none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from craft_fast.report import figures
from craft_fast.report.agreement import change
from craft_fast.report.document import section
from craft_fast.report.images import Picture, data_uris
from craft_fast.report.inputs import Pair, ReportData
from craft_fast.report.text import esc, quoted, shortened, signed

WORST = 4
PICTURED = 64
"""Prompts whose pictures are in the page at most, besides the worst: more would each be too small to see anything."""
WIDEST_PX = 768
_ALT = 120

# What the script shows and fills; it stays hidden where no script runs, and in print.
_VIEWER = (
    '<div class=viewer hidden><div class=look><div class=stage><span class="tag base">base</span>'
    '<span class="tag tuned">tuned</span><span class=cut></span></div>'
    '<input type=range min=0 max=100 value=50 aria-label="Divider: base on its left, tuned on its right"></div>'
    "<div class=about><p class=which></p><p class=title><bdi></bdi></p>"
    "<table><thead><tr><th scope=col>judge<th scope=col>base<th scope=col>tuned<th scope=col>change</tr></thead>"
    "<tbody></tbody></table><p class=note>Noise of both pictures: seed <span class=seed></span></p>"
    "<div class=choose></div></div></div>"
)


def pictured(pairs: Sequence[Pair], shown: int) -> list[int]:
    """Positions of the prompts whose pictures go into the page in any case: the first ones that have any.

    Args:
        pairs: the evaluated prompts.
        shown: ``report.grid_prompts``.
    """
    there = [position for position, pair in enumerate(pairs) if pair.pictures is not None]
    return there[: max(PICTURED, shown)]


def pictures_section(data: ReportData, budget: int) -> str:
    """The part of the page with the pictures; empty without any.

    Args:
        data: the gathered run; ``evaluation`` holds measured rows alone.
        budget: bytes for the pictures.
    """
    places = pictured(data.pairs, data.grid_prompts)
    if not places:
        return ""
    metric = figures.ranking_metric(data.evaluation)
    place = {id(pair): position for position, pair in enumerate(data.pairs)}
    lost = figures.worst_pairs([pair for pair in data.pairs if pair.pictures], metric, WORST) if metric else []
    worst = [place[id(pair)] for pair in lost]
    oracle = any(item.metric == "oracle" for item in data.evaluation)
    # A prompt that is among both is in the page twice, and is counted twice.
    drawn = _encoded(data.pairs, [*places, *worst], budget)

    def grid(positions: Sequence[int], *, first: bool = True) -> str:
        shown = (_figure(data.pairs[n], n + 1, drawn[n], metric, oracle, anchor=first) for n in positions)
        return f"<div class=grid>{''.join(shown)}</div>"

    shown, more = places[: data.grid_prompts], places[data.grid_prompts :]
    lead = (
        f"The first {len(shown)} of {len(data.pairs)} held-out prompts, not picked. "
        "Left the base model, right the tuned one, from the same noise."
    )
    body = f"{_VIEWER}{grid(shown)}"
    if worst:
        body += f"<h3>Where it lost most, by {esc(metric)}</h3>{grid(worst, first=False)}"
    if more:
        body += f"<details class=more><summary>The next {len(more)} prompts</summary>{grid(more)}</details>"
    return section("pictures", "Before and after", lead, body)


def _encoded(pairs: Sequence[Pair], positions: Sequence[int], budget: int) -> Mapping[int, tuple[Picture, Picture]]:
    paths = [path for position in positions for path in pairs[position].pictures or ()]
    found = data_uris(paths, budget, widest_px=WIDEST_PX)
    return dict(zip(positions, zip(found[::2], found[1::2], strict=True), strict=True))


def _figure(pair: Pair, n: int, halves: tuple[Picture, Picture], metric: str, oracle: bool, *, anchor: bool) -> str:
    images = ""
    sides = (("base", pair.base_scores), ("tuned", pair.tuned_scores))
    # The caption has all of it; a screen reader need not read thousands of characters twice more.
    text = esc(shortened(pair.prompt, _ALT))
    for picture, (side, scores) in zip(halves, sides, strict=True):
        kind = " class=small" if picture.small else ""
        mark = _mark(scores["oracle"] >= 0.5) if oracle and "oracle" in scores else ""
        images += f'<div><img{kind} src="{picture.uri}" alt="{side}: {text}"><span>{side} {mark}</span></div>'
    moved = change(pair, metric)
    note = f"<em>{esc(metric)} {signed(moved, 2)}</em>" if moved is not None else ""
    name = f" id=p{n}" if anchor else ""
    return (
        f'<figure{name} data-n="{n}" data-seed="{pair.noise_seed}"><div class=pair>{images}</div>'
        f"<figcaption>{quoted(pair.prompt)}{note}</figcaption></figure>"
    )


def _mark(passed: bool) -> str:
    return "<i class=pass>&#10003; passes</i>" if passed else "<i class=fail>&#10007; fails</i>"
