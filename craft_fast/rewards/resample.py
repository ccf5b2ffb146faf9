"""Pillow's bicubic resize of bytes, bit for bit, in integer tensor operations.

Shapes: N pictures, C channels, H, W picture, K taps.

Pillow (src/libImaging/Resample.c) takes every result as a sum over a window of the source with weights rounded to 22
bits behind the point, and rounds it to a byte; first along one side, then along the other. Integer sums are exact in
any order, so the same bytes come out on every device.

Which side comes first decides the last bit. Until Pillow 12 it was always the rows' (12.2 left that for pictures 100
times as high as wide); since 13 the columns' come first where the height shrinks by more than twice as many pixels as
the width (Pillow #9549). The installed version is followed, and a score's provenance tells which it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13

_BITS = 32 - 8 - 2  # of a weight behind the point: a sum of bytes fits into 32 bits
_A = -0.5
_SUPPORT = 2.0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Taps:
    """One pass: the part of the source that it looks at, and every tap's place in it and weight, [K, results], CPU."""

    first: int
    stop: int
    index: Tensor
    weight: Tensor


def columns_first(source: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Whether the installed Pillow runs the vertical pass first; sizes are height and width."""
    shrunk, narrowed = source[0] - whole[0], source[1] - whole[1]
    return TALL_FIRST and shrunk > 0 and shrunk > 2 * narrowed


def resample(images: Tensor, whole: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize to ``whole`` and cut a part out; only that part is worked out.

    Args:
        images: uint8 [N, C, H, W].
        whole: height and width that the whole picture would have.
        corner: top and left of the part.
        size: height and width of the part.

    Returns:
        uint8 [N, C, height, width] on the pictures' device.
    """
    source = (images.shape[2], images.shape[3])
    passes: list[tuple[int, _Taps]] = []
    for axis in (0, 1):
        first, stop = corner[axis], corner[axis] + size[axis]
        if whole[axis] != source[axis]:  # Pillow leaves out a pass that changes nothing
            taps = _taps(source[axis], whole[axis], first, size[axis])
            passes.append((axis + 2, taps))
            first, stop = taps.first, taps.stop
        images = images.narrow(axis + 2, first, stop - first)
    if not columns_first(source, whole):
        passes.reverse()
    for dim, taps in passes:
        images = _pass(images, taps, dim)
    return images


def _pass(images: Tensor, taps: _Taps, dim: int) -> Tensor:
    sizes = list(images.shape)
    sizes[dim] = taps.index.shape[1]
    total = torch.full(sizes, 1 << (_BITS - 1), dtype=torch.int32, device=images.device)
    places, weights = taps.index.to(images.device), taps.weight.to(images.device)
    for index, weight in zip(places, weights, strict=True):
        total.addcmul_(images.index_select(dim, index), weight[:, None] if dim == 2 else weight)
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def _taps(source: int, whole: int, first: int, count: int) -> _Taps:
    start, weight = tap_weights(source, whole, first, count)
    index = np.minimum(start[None] + np.arange(len(weight))[:, None], source - 1)  # of weight 0 where it is cut
    low, high = int(index.min()), int(index.max()) + 1
    return _Taps(low, high, torch.from_numpy(index - low), torch.from_numpy(weight))


def tap_weights(source: int, whole: int, first: int, count: int) -> tuple[Array, Array]:
    """Pillow's weights of one pass.

    Args:
        source: pixels of the source's side.
        whole: pixels of the result's side.
        first: the first result that is wanted.
        count: how many are wanted.

    Returns:
        Where each result's window begins, int64 [count], and the windows' weights, int32 [K, count]; 0 past a
        window's end.
    """
    scale = source / whole
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    centre = (np.arange(first, first + count) + 0.5) * scale
    start = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), source)
    tap = np.arange(int((stop - start).max()))[:, None]
    raw = _bicubic((tap + start[None] - centre[None] + 0.5) * (1.0 / stretch))
    raw[tap >= (stop - start)[None]] = 0.0
    total = np.zeros(count)
    for row in raw:  # in Pillow's order: another one may change the last bit
        total += row
    share = raw / total * (1 << _BITS)
    return start, np.trunc(share + np.where(share < 0, -0.5, 0.5)).astype(np.int32)


def _bicubic(x: Array) -> Array:
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * _A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
