"""The grid as one PNG: strengths side by side, prompts and seeds below one another, all of it named in its chunks."""

from __future__ import annotations

import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from craft_fast.errors import UsageError
from craft_fast.store import atomic
from craft_fast.trial import Trial

MAX_PIXELS = 64_000_000
SOFTWARE = "craft-fast try"
_LEAST_PX = 192
"""Narrower pictures are enlarged by a whole number, pixel by pixel, so that something is seen."""
_LINES = 4
_MOST_CHARS = 600
# Beside Pillow's own font, which has little more than ASCII: the first of these that the machine has.
_MORE_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "NotoEmoji-Regular.ttf",
)  # fmt: skip
_INK, _MUTED, _PAPER = (24, 24, 27), (96, 96, 104), (255, 255, 255)


# ---- text


@dataclass(frozen=True, slots=True)
class _Run:
    """A piece of text in one font."""

    text: str
    font: ImageFont.FreeTypeFont


@lru_cache(maxsize=4)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    found = [ImageFont.load_default(size)]
    for name in _MORE_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(font for font in found if isinstance(font, ImageFont.FreeTypeFont))


@lru_cache(maxsize=8192)
def _has(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether a font has a glyph: one that looks other than that of a code point which is no character."""
    mask, missing = font.getmask(char), font.getmask("\U0010ffff")
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def shown_text(text: str, size: int) -> str:
    """A text whose every character can be drawn: what has no glyph here loses its accent, or becomes ``<U+6F22>``."""
    fonts = _fonts(size)

    def shown(char: str) -> str:
        if char == " " or (unicodedata.category(char)[0] not in "CZ" and any(_has(font, char) for font in fonts)):
            return char
        plain = unicodedata.normalize("NFKD", char)[:1]
        return plain if plain.isascii() and plain.isalnum() else f"<U+{ord(char):04X}>"

    return "".join(map(shown, text))


def _runs(text: str, size: int) -> list[_Run]:
    runs: list[_Run] = []
    for char in text:
        font = next((one for one in _fonts(size) if char == " " or _has(one, char)), _fonts(size)[0])
        if runs and (runs[-1].font is font or char == " "):
            runs[-1] = _Run(runs[-1].text + char, runs[-1].font)
        else:
            runs.append(_Run(char, font))
    return runs


def _width(text: str, size: int) -> float:
    return sum(run.font.getlength(run.text) for run in _runs(text, size))


def wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of at most ``width`` pixels, broken between words where it can be; what is left out is an ellipsis."""
    lines, left = [], shown_text(text[:_MOST_CHARS], size)
    while left:
        end = len(left)
        if _width(left, size) > width:
            low, high = 1, len(left)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if _width(left[:middle], size) <= width else (low, middle - 1)
            space = left.rfind(" ", 1, low + 1)
            end = space if space > 0 else low
        lines.append(left[:end])
        left = left[end:].lstrip(" ")
    if len(text) > _MOST_CHARS and lines:
        lines[-1] += "..."
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-3]}..."]
    return lines


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: tuple[int, int, int]) -> None:
    x = float(at[0])
    for run in _runs(text, size):
        draw.text((x, at[1] + size), run.text, font=run.font, fill=ink, anchor="ls")
        x += run.font.getlength(run.text)


# ---- layout


@dataclass(frozen=True)
class Layout:
    """Where everything is on the sheet, in pixels."""

    width: int
    height: int
    tile: tuple[int, int]
    scale: int
    font: int
    gap: int
    margin: int
    lines: Sequence[Sequence[str]]

    @property
    def line(self) -> int:
        """Height of a line of text."""
        return self.font * 14 // 10


def lay_out(
    prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float], *, height_px: int, width_px: int
) -> Layout:
    """The sheet of so many pictures.

    Raises:
        UsageError: it would be larger than 64 megapixels.
    """
    scale = math.ceil(_LEAST_PX / width_px) if width_px < _LEAST_PX else 1
    tile = width_px * scale, height_px * scale
    font = max(14, min(30, tile[0] // 26))
    gap, margin, line = font // 2, font, font * 14 // 10
    width = 2 * margin + len(strengths) * (tile[0] + gap) - gap
    count = len(prompts) * len(seeds)
    # Before anything is wrapped, which takes time for thousands of prompts.
    if width * count * (tile[1] + line) <= MAX_PIXELS:
        lines = [wrap(prompt, width - 2 * margin, font) for prompt in prompts]
        texts = sum(len(one) * line + gap for one in lines)
        height = 2 * margin + line + texts + count * (line + tile[1] + gap)
        if width * height <= MAX_PIXELS:
            return Layout(width, height, tile, scale, font, gap, margin, lines)
    pictures = count * len(strengths)
    raise UsageError(
        "The grid would be too large",
        where=f"{len(prompts)} prompts x {len(seeds)} seeds x {len(strengths)} strengths",
        why=f"{pictures} pictures of {width_px} x {height_px} px make more than {MAX_PIXELS // 10**6} megapixels",
        hint="fewer of --prompt, --seed or --strength, or smaller pictures (--set generate.width_px=512 ...)",
    )


def column_label(strength: float) -> str:
    """What stands above a column."""
    return "base model (0)" if strength == 0 else f"strength {strength:g}"


def draw_sheet(trial: Trial, layout: Layout) -> Image.Image:
    """The sheet, RGB."""
    sheet = Image.new("RGB", (layout.width, layout.height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    step = layout.tile[0] + layout.gap
    y = layout.margin
    for i, strength in enumerate(trial.strengths):
        _write(draw, (layout.margin + i * step, y), column_label(strength), layout.font, _INK)
    y += layout.line
    pictures = iter(trial.pictures)
    for lines in layout.lines:
        y += layout.gap
        for text in lines:
            _write(draw, (layout.margin, y), text, layout.font, _INK)
            y += layout.line
        for seed in trial.seeds:
            _write(draw, (layout.margin, y), f"seed {seed}", layout.font * 5 // 6, _MUTED)
            y += layout.line
            for i in range(len(trial.strengths)):
                image = Image.fromarray(next(pictures).image.permute(1, 2, 0).numpy())
                tile = image.resize(layout.tile, Image.Resampling.NEAREST) if layout.scale > 1 else image
                sheet.paste(tile, (layout.margin + i * step, y))
            y += layout.tile[1] + layout.gap
    return sheet


# ---- files


def check_target(path: Path) -> None:
    """Refuse to write where something else is.

    Raises:
        UsageError: no name of a PNG, a folder, or a file that is no such grid.
    """
    hint = "give another file with --output"
    if path.suffix.lower() != ".png":
        raise UsageError("The grid is a PNG", where=str(path), hint=f"--output {path.stem or 'grid'}.png")
    if path.is_dir():
        raise UsageError("A file is wanted, this is a folder", where=str(path), hint=hint)
    if path.exists():
        with path.open("rb") as file:
            start = file.read(4096)
        if not start.startswith(b"\x89PNG") or SOFTWARE.encode() not in start:
            raise UsageError("This file is not a grid of this command, so it is kept", where=str(path), hint=hint)


def write_sheet(trial: Trial, layout: Layout, path: Path, facts: Mapping[str, Any]) -> atomic.Written:
    """Write the grid with what it shows in text chunks, as JSON in ASCII: ``craft.prompts``, ``craft.seeds``, ...

    Args:
        trial: the pictures.
        layout: of this trial.
        path: see ``check_target``.
        facts: more to say, by name, such as ``lora_sha256``.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", SOFTWARE)
    said = {"prompts": trial.prompts, "seeds": trial.seeds, "strengths": trial.strengths, **facts}
    for name, value in said.items():
        chunks.add_text(f"craft.{name}", json.dumps(value, ensure_ascii=True))
    data = io.BytesIO()
    draw_sheet(trial, layout).save(data, "PNG", pnginfo=chunks)
    return atomic.write_bytes(path, data.getvalue())


def write_each(trial: Trial, folder: Path) -> list[str]:
    """Each picture by itself, in its own size; a name holds the picture's digest, so none is ever replaced by another.

    Returns:
        The files' names, in the order of the pictures.
    """
    names = []
    with atomic.batch(folder) as batch:
        for one in trial.pictures:
            number = trial.prompts.index(one.prompt) + 1
            name = f"prompt{number}-seed{one.seed}-strength{one.strength:g}-{one.sha256[:10]}.png"
            batch.write_bytes(name, one.png)
            names.append(name)
    return names
