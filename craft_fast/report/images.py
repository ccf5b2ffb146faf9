"""Pictures as data URIs, small enough for one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SMALL_PX = 128
"""Up to this size a picture is shown as it is, enlarged without smoothing."""
BUDGET = 3_100_000
"""Bytes of all pictures of a page, before base64 adds a third."""
WIDTHS_PX = (512, 384, 256, 192, 128, 96, 64)


class Picture(NamedTuple):
    """A picture as it stands in the page."""

    uri: str
    small: bool


def data_uris(paths: Sequence[Path], budget: int = BUDGET) -> list[Picture]:
    """Data URIs of image files, in their order.

    Small pictures stay PNG, pixel for pixel. Larger ones become WebP of the largest width at which all fit.

    Args:
        paths: image files.
        budget: bytes that all may take together.
    """
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(max(image.size))
    small = all(size <= SMALL_PX for size in sizes)
    if small:
        encoded = [_png(path) for path in paths]
        if sum(map(len, encoded)) <= budget:
            return [Picture(_uri("png", data), True) for data in encoded]
    for width in WIDTHS_PX:
        encoded = [_webp(path, width) for path in paths]
        if sum(map(len, encoded)) <= budget:
            break
    return [Picture(_uri("webp", data), small) for data in encoded]


def _png(path: Path) -> bytes:
    # Encoded anew: only pixels go into the page, no metadata of the file.
    out = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def _webp(path: Path, width: int) -> bytes:
    out = io.BytesIO()
    with Image.open(path) as image:
        picture = image.convert("RGB")
        picture.thumbnail((width, width), Image.Resampling.LANCZOS)
        picture.save(out, "WEBP", quality=85, method=4)
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
