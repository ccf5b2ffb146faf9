"""Inline SVG: shapes only, stretched to their box; all words beside them are HTML, so they keep their size.

Colours come from the page's style through class names, so one drawing serves light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from craft_fast.records import EvalRow
from craft_fast.report.figures import Histogram, nice_ticks, smooth, wilson
from craft_fast.report.text import esc, number


def _box(width: int, height: int, label: str) -> str:
    """Attributes of a drawing that fills its box, with the words that stand for it."""
    return f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{esc(label)}"'


def _whisker(low: float, high: float) -> str:
    return f'<path class="whisker" d="M{low:.2f} 6H{high:.2f}M{low:.2f} 3v6M{high:.2f} 3v6"/>'


def win_bar(row: EvalRow) -> str:
    """A win rate from 0 to 100 % as a bar, its 95 % interval drawn on it, and the line of no change at 50 %.

    Args:
        row: the evaluated metric.
    """
    low, high = (100 * end for end in wilson(row.win_rate, row.n))
    rate = 100 * row.win_rate
    label = f"win rate {rate:.0f} %, 95 % interval {low:.0f} to {high:.0f} %"
    return (
        f'<svg class="bar" {_box(100, 12, label)}><rect class="track" width="100" height="12"/>'
        f'<rect class="fill" width="{rate:.2f}" height="12"/>{_whisker(low, high)}'
        '<path class="half" d="M50 0V12"/></svg>'
    )


def change_bar(row: EvalRow) -> str:
    """A mean paired difference with its 95 % interval around the line of zero, scaled to this row alone.

    Args:
        row: the evaluated metric.
    """
    change = row.tuned_mean - row.base_mean
    reach = max(abs(row.ci_low), abs(row.ci_high), abs(change)) * 1.1 or 1.0
    low, middle, high = (50 + 50 * value / reach for value in (row.ci_low, change, row.ci_high))
    label = f"change {number(change)}, 95 % interval {number(row.ci_low)} to {number(row.ci_high)}"
    sure = "up" if row.ci_low > 0 else "down" if row.ci_high < 0 else "open"
    return (
        f'<svg class="change {sure}" {_box(100, 12, label)}><path class="zero" d="M50 0V12"/>'
        f'{_whisker(low, high)}<path class="dot" d="M{middle:.2f} 6h0.001"/></svg>'
    )


def histogram_chart(item: Histogram) -> str:
    """Candidates as a filled outline, the accepted ones as a line over it, each as shares of its own number.

    Args:
        item: the binned reward.
    """
    top = max([*item.candidates, *item.accepted]) or 1.0
    marks = [("mean", item.candidates_mean)]
    if item.accepted_mean is not None:
        marks.append(("kept-mean", item.accepted_mean))
    span = (item.high - item.low) or 1.0
    lines = "".join(f'<path class="{name}" d="M{100 * (value - item.low) / span:.2f} 0V40"/>' for name, value in marks)
    kept = f'<path class="kept" d="{_steps(item.accepted, top)}"/>' if item.accepted_mean is not None else ""
    note = f"{item.reward}: mean of candidates {number(item.candidates_mean)}"
    return (
        f'<svg class="hist" {_box(100, 40, note)}>'
        f'<path class="all" d="{_steps(item.candidates, top)}Z"/>{kept}{lines}</svg>'
    )


def _steps(shares: Sequence[float], top: float) -> str:
    width = 100 / len(shares)
    path = "M0 40"
    for number_of_bin, share in enumerate(shares):
        path += f"V{40 - 38 * share / top:.2f}H{(number_of_bin + 1) * width:.2f}"
    return path + "V40"


def loss_chart(losses: Sequence[tuple[int, float]]) -> str:
    """Loss by optimizer step, faint, with its moving average, on axes whose words are HTML.

    Args:
        losses: (step, loss), at least two, steps rising.
    """
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    average = smooth(values, max(5, len(values) // 15))
    ordered = sorted(values)
    # One spike must not flatten the curve: the axis ends a little above the 99th percentile.
    low, high = ordered[0], max(ordered[int(0.99 * (len(ordered) - 1))], max(average))
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return 100 * (step - first) / (last - first)

    def y(value: float) -> float:
        return 40 - 40 * (min(value, high) - low) / (high - low)

    def line(series: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(step):.2f} {y(value):.2f}" for step, value in zip(steps, series, strict=True))

    y_ticks, x_ticks = nice_ticks(low, high, 5), nice_ticks(first, last, 6)
    grid = "".join(f"M0 {y(tick):.2f}H100" for tick in y_ticks)
    left = "".join(f'<span style="top:{100 * y(tick) / 40:.2f}%">{tick:.6g}</span>' for tick in y_ticks)
    under = "".join(f'<span style="left:{x(tick):.2f}%">{tick:.6g}</span>' for tick in x_ticks)
    label = f"loss from {number(average[0])} to {number(average[-1])} over steps {first} to {last}"
    return (
        f'<div class="axes"><div class="y">{left}</div>'
        f'<svg class="curve" {_box(100, 40, label)}><path class="lines" d="{grid}"/>'
        f'<path class="raw" d="{line(values)}"/><path class="average" d="{line(average)}"/></svg>'
        f'<div class="x">{under}</div></div>'
    )


def share_bar(share: float, *, kind: str = "fill") -> str:
    """A plain bar of a share from 0 to 1.

    Args:
        share: length.
        kind: class of the bar.
    """
    return (
        '<svg class="bar thin" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/>'
        f'<rect class="{esc(kind)}" width="{100 * min(1.0, max(0.0, share)):.2f}" height="8"/></svg>'
    )
