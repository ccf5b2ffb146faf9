"""How training went, and what the stages took."""

from __future__ import annotations

import math

from craft_fast.records import StageRow
from craft_fast.report import charts, figures
from craft_fast.report.document import section
from craft_fast.report.images import data_uris
from craft_fast.report.inputs import ReportData
from craft_fast.report.text import duration, esc, number, percent, quoted, shortened

_STRIPS = 4
_STRIP_IMAGES = 7
_STRIP_BUDGET = 300_000
DASH = "\u2013"


def training_section(data: ReportData) -> str:
    """Loss and the pictures drawn on the way; empty without either."""
    strips = _strips(data)
    if len(data.losses) < 2:
        return section("training", "Training", "Pictures drawn during training.", strips) if strips else ""
    values = [loss for _, loss in data.losses]
    average = figures.smooth(values, max(5, len(values) // 15))
    lead = (
        f"Weighted noise-prediction loss over {len(values)} optimizer steps, faint, and its moving average: "
        f"{number(average[0])} to {number(average[-1])}. It shows whether training was stable, not whether pictures "
        "got better."
    )
    return section("training", "Training", lead, charts.loss_chart(data.losses) + strips)


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
            text = esc(shortened(prompt, 120))
            cells += f'<div><img{kind} src="{picture.uri}" alt="{label}: {text}"><span>{label}</span></div>'
        rows += f"<figure><div class=strip>{cells}</div><figcaption>{quoted(prompt)}</figcaption></figure>"
    return f"<h3>Drawn during training, same seed</h3><div class=strips>{rows}</div>" if rows else ""


def cost_section(data: ReportData) -> str:
    """Time and memory by stage; empty before the first is done."""
    if not data.stages:
        return ""
    total = sum(row.seconds for row in data.stages)
    longest = max(row.seconds for row in data.stages) or 1.0
    names = ("stage", "time", "", "share", "speed", "peak memory")
    head = "".join(f"<th scope=col{' class=wide' if name == 'time' else ''}>{name}</th>" for name in names)
    rows = "".join(_stage(data, row, longest, total) for row in data.stages)
    lead = f"{esc(duration(total))} over {len(data.stages)} stages; work that was already done costs nothing."
    lead += _per_sample(data)
    return section(
        "cost", "What it cost", lead, f"<table class=cost><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _per_sample(data: ReportData) -> str:
    """What one accepted sample took, where the pictures were drawn here."""
    accepted = sum(row.accepted for row in data.selections)
    seconds = sum(row.seconds for row in data.stages if row.name in ("generate", "score", "filter"))
    if not accepted or not seconds:
        return ""
    images, each = number(len(data.candidates) / accepted, 2), duration(seconds / accepted)
    return f" Each of {accepted} accepted samples took <b>{images}</b> images, drawn and judged in <b>{esc(each)}</b>."


def _stage(data: ReportData, row: StageRow, longest: float, total: float) -> str:
    share = percent(row.seconds / total, 0) if total else ""
    own = data.settings["images"]["folder"] is not None
    figures = [duration(row.seconds), share, speed(row, own=own)]
    figures.append(f"{row.peak_gib:.2f} GiB" if row.peak_gib is not None else "")
    cells = "".join(f"<td>{esc(figure or DASH)}</td>" for figure in figures)
    return (
        f"<tr><th scope=row>{esc(row.name)}{_info(row)}</th>"
        f"<td class=wide>{charts.share_bar(row.seconds / longest)}</td>{cells}</tr>"
    )


def speed(row: StageRow, *, own: bool = False) -> str:
    """How fast a stage worked, ``7.8 images/s`` or ``4.2 s an image``; empty where it did not count what it did.

    Args:
        row: of the stage.
        own: pictures were brought in, so that their number says nothing about drawing.
    """
    counted = {"generate": ("images", 1, "image"), "score": ("images", 1, "image"), "train": ("steps", 1, "step")}
    counted["evaluate"] = ("prompts", 2, "image")  # two pictures of each
    if row.name not in counted or row.seconds <= 0 or (own and row.name == "generate"):
        return ""
    name, times, unit = counted[row.name]
    count = row.info.get(name)
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        return ""
    rate = times * count / row.seconds
    return (
        f"{number(rate, 2)} {unit}s/s"
        if rate >= 1
        else f"{duration(1 / rate)} a{'n' if unit == 'image' else ''} {unit}"
    )


def _info(row: StageRow) -> str:
    """The plain figures that a stage noted, as ``images 640, groups 160``."""
    notes = [
        f"{name.replace('_', ' ')} {value if isinstance(value, int) else number(value)}"
        for name, value in row.info.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return f"<span>{esc(', '.join(notes))}</span>" if notes else ""
