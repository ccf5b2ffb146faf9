"""Pictures as data URIs, small enough for one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from craft_fast.report.figures import spread

SMALL_PX = 128
"""Up to this size a picture is shown as it is, enlarged without smoothing."""
BUDGET = 3_100_000
"""Bytes of all pictures of a page, before base64 adds a third."""
WIDTHS_PX = (768, 640, 512, 448, 384, 320, 256, 224, 192, 160, 128, 96, 64)
_TRIED = 6


class Picture(NamedTuple):
    """A picture as it stands in the page."""

    uri: str
    small: bool


def data_uris(paths: Sequence[Path], budget: int = BUDGET, *, widest_px: int = 512) -> list[Picture]:
    """Data URIs of image files, in their order.

    Small pictures stay PNG, pixel for pixel. Larger ones become WebP of the largest width at which all fit.

    Args:
        paths: image files.
        budget: bytes that all may take together.
        widest_px: longest side at most.
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
    # A few tell which width is worth trying on all: a hundred pictures of 1024 px take seconds at each.
    tried = [_opened(path, widest_px) for path in spread(paths, _TRIED)]
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes and encodes
        for width in [width for width in WIDTHS_PX if width <= widest_px]:
            guess = sum(len(_webp(image, width)) for image in tried) * len(paths) / max(1, len(tried))
            if guess > budget and width > WIDTHS_PX[-1]:
                continue
            encoded = list(pool.map(partial(_file_webp, width=width), paths))
            if sum(map(len, encoded)) <= budget:
                break
    return [Picture(_uri("webp", data), small) for data in encoded]


def _png(path: Path) -> bytes:
    # Encoded anew: only pixels go into the page, no metadata of the file.
    out = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def _opened(path: Path, width: int) -> Image.Image:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((width, width), Image.Resampling.LANCZOS)
    return picture


def _file_webp(path: Path, width: int) -> bytes:
    return _webp(_opened(path, width), width)


def _webp(image: Image.Image, width: int) -> bytes:
    out = io.BytesIO()
    picture = image.copy()
    picture.thumbnail((width, width), Image.Resampling.LANCZOS)
    picture.save(out, "WEBP", quality=80, method=4)
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
