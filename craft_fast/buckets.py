"""Aspect-ratio buckets: the size a picture of any shape is trained at. Pure arithmetic.

All buckets have about the area of the square that a model draws best, sides that its UNet takes, and an aspect that is
not extreme; a picture goes into the one whose aspect is nearest, is scaled to cover it and cut at its centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture becomes one of its bucket's size.

    Attributes:
        width: of the bucket, px.
        height: likewise.
        scaled_width: the whole picture's, scaled to cover the bucket, px.
        scaled_height: likewise.
        enlargement: by how much it is enlarged; below 1 it is made smaller.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    enlargement: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part of the scaled picture that is kept: left, top, right, bottom."""
        left, top = (self.scaled_width - self.width) // 2, (self.scaled_height - self.height) // 2
        return left, top, left + self.width, top + self.height

    def box_in(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The same part in a picture's own pixels, unscaled: left, top, right, bottom.

        To scale this part alone takes memory for what is kept, however long and thin a picture is.
        """
        across, down = min(width, self.width / self.enlargement), min(height, self.height / self.enlargement)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    @property
    def kept(self) -> float:
        """Share of the picture's area that is kept, 0 to 1."""
        return self.width * self.height / (self.scaled_width * self.scaled_height)


def buckets(area: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Sizes (width, height) of at most ``area``, widest last.

    Args:
        area: of the pictures that the model draws, px.
        step: all sides are multiples of it, px.
        max_aspect: longest side over shortest, at least 1.

    Returns:
        One size for each width whose height, the largest multiple that stays within ``area``, is not too far from it;
        never empty, since the square is always there.
    """
    side = max(step, math.isqrt(area) // step * step)
    found = {(side, side)}
    width = step
    while width * step <= area:
        height = area // width // step * step
        if max(width, height) <= max_aspect * min(width, height):
            found |= {(width, height), (height, width)}
        width += step
    # One that fits into another is as wide and less high, and wastes pixels.
    largest = [one for one in found if not any(_holds(other, one) for other in found)]
    return sorted(largest)


def _holds(other: tuple[int, int], one: tuple[int, int]) -> bool:
    return other != one and other[0] >= one[0] and other[1] >= one[1]


def fit(width: int, height: int, sizes: list[tuple[int, int]]) -> Fit:
    """The bucket of a picture: the one of nearest aspect, by its logarithm, so that tall and wide count alike.

    Args:
        width: of the picture, px, at least 1.
        height: likewise.
        sizes: as ``buckets`` gives them.
    """
    wanted = math.log(width / height)
    best = min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), -size[0] * size[1]))
    scale = max(best[0] / width, best[1] / height)
    scaled = (max(best[0], round(width * scale)), max(best[1], round(height * scale)))
    return Fit(*best, *scaled, scale)
