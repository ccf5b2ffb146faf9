"""Which size a picture is trained at: properties over all shapes, and SDXL's buckets by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craft_fast.buckets import buckets, fit

SIDES = st.integers(1, 5000)


def test_sdxl_s_buckets() -> None:
    assert buckets(1024 * 1024, 64, 2.0) == [
        (704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024), (1088, 960), (1152, 896),
        (1216, 832), (1344, 768), (1408, 704),
    ]  # fmt: skip


@given(side=st.integers(2, 40), step=st.sampled_from([8, 16, 64]), aspect=st.floats(1, 4))
def test_buckets_stay_within_area_aspect_and_step(side: int, step: int, aspect: float) -> None:
    area = (side * step) ** 2
    found = buckets(area, step, aspect)
    assert (side * step, side * step) in found
    assert sorted((h, w) for w, h in found) == sorted(found)
    for width, height in found:
        assert width * height <= area
        assert width % step == height % step == 0
        assert max(width, height) <= aspect * min(width, height)
        # It could not be higher.
        assert (height + step) * width > area or max(width, height + step) > aspect * min(width, height + step)
    assert len({width for width, _ in found}) == len(found)


@given(width=SIDES, height=SIDES)
def test_a_picture_covers_its_bucket_and_is_not_bent(width: int, height: int) -> None:
    place = fit(width, height, buckets(1024**2, 64, 2.0))
    assert place.scaled_width >= place.width
    assert place.scaled_height >= place.height
    left, top, right, bottom = place.box
    assert (right - left, bottom - top) == (place.width, place.height)
    assert 0 <= left <= right <= place.scaled_width
    assert 0 <= top <= bottom <= place.scaled_height
    # One side is met exactly, the other to a pixel's rounding.
    assert place.scaled_width == pytest.approx(width * place.enlargement, abs=0.51)
    assert place.scaled_height == pytest.approx(height * place.enlargement, abs=0.51)
    assert place.scaled_width == place.width or place.scaled_height == place.height
    if 0.5 <= width / height <= 2:
        assert place.kept > 0.90


@given(width=SIDES, height=SIDES)
def test_what_is_kept_is_the_picture_s_middle_in_the_bucket_s_shape(width: int, height: int) -> None:
    place = fit(width, height, buckets(1024**2, 64, 2.0))
    left, top, right, bottom = place.box_in(width, height)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    assert left == pytest.approx(width - right, abs=1e-6)
    assert top == pytest.approx(height - bottom, abs=1e-6)
    assert (right - left) / (bottom - top) == pytest.approx(place.width / place.height)
    # Nothing is cut off that need not be: one side is whole.
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


@given(width=SIDES, height=SIDES, wider=st.integers(0, 5000))
def test_a_wider_picture_never_gets_a_narrower_bucket(width: int, height: int, wider: int) -> None:
    sizes = buckets(1024**2, 64, 2.0)
    one, other = fit(width, height, sizes), fit(width + wider, height, sizes)
    assert other.width >= one.width
    assert other.height <= one.height


@given(width=SIDES, height=SIDES, times=st.integers(2, 4))
def test_size_does_not_matter_shape_does(width: int, height: int, times: int) -> None:
    sizes = buckets(1024**2, 64, 2.0)
    one, other, turned = fit(width, height, sizes), fit(width * times, height * times, sizes), fit(height, width, sizes)
    assert (one.width, one.height) == (other.width, other.height)
    distance = abs(math.log(one.width / one.height) - math.log(width / height))
    assert abs(math.log(turned.width / turned.height) - math.log(height / width)) == pytest.approx(distance)


def test_square_pictures_stay_square() -> None:
    for sizes in (buckets(64**2, 16, 2.0), buckets(1024**2, 64, 1.0)):
        place = fit(3000, 3000, sizes)
        assert place.width == place.height
        assert place.kept == 1.0
    assert fit(64, 64, [(64, 64)]).enlargement == 1.0
