"""Pictures to pixels, held bit for bit against Pillow and a reference written out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError, CraftError
from craft_fast.rewards.base import CLIP_MEAN, CLIP_STD, Preprocessing
from craft_fast.rewards.pixels import (
    Pictures,
    PixelForm,
    normalise,
    pixel_form,
    prepare,
    preprocessing_id,
    shape,
    shape_in_tensors,
)  # fmt: skip
from craft_fast.rewards.resample import TALL_FIRST, resample

Array = np.ndarray[Any, Any]
BICUBIC = Image.Resampling.BICUBIC
# height, width: square, wide, tall (Pillow 13 takes its passes in the other order), tiny, to enlarge, odd rests.
SIZES = [(96, 96), (83, 121), (121, 83), (64, 250), (250, 64), (9, 7), (1, 1), (31, 32), (32, 47), (49, 32), (33, 90)]


def free(**changes: Any) -> Preprocessing:
    return Preprocessing(**{"family": "clip", "image_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), **changes})


def noise(height: int, width: int, seed: int = 0) -> Array:
    """uint8 [H, W, 3]: noise with hard edges, so that sums leave 0..255 and are clipped."""
    chance = np.random.default_rng(seed + 1000 * height + width)
    pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2, :, 0] = (pixels[: height // 2, :, 0] > 127) * 255
    return pixels


def tensor(*pictures: Array) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def reference(pixels: Array, fit: str, size: int, rounding: str = "floor") -> Array:
    """uint8 [size, size, 3]: Pillow on the RGB picture, and the published crop."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    if fit == "stretch":
        return np.asarray(picture.resize((size, size), BICUBIC))
    short = min(height, width)
    large = (int(size * width / short), int(size * height / short))
    spare = (large[0] - size, large[1] - size)
    left, top = (round(side / 2.0) if rounding == "round" else side // 2 for side in spare)
    return np.asarray(picture.resize(large, BICUBIC).crop((left, top, left + size, top + size)))


# ---- bytes into bytes


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_byte_forms_equal_pillow_in_every_bit(height: int, width: int, fit: str) -> None:
    pictures = [noise(height, width, seed) for seed in range(2)]
    for rounding in ("floor", "round"):
        expected = np.stack([reference(picture, fit, 32, rounding) for picture in pictures])
        form = pixel_form(free(fit=fit, crop_rounding=rounding))
        found = shape(tensor(*pictures), form)
        assert (found.dtype, found.device.type) == (torch.uint8, "cpu")
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
        if (height, width) != (32, 32):
            assert torch.equal(shape_in_tensors(tensor(*pictures), form), found)


def test_the_tensor_form_equals_pillow_on_many_sizes() -> None:
    chance = np.random.default_rng(7)
    for _ in range(250):
        height, width, *whole = (int(side) for side in np.exp(chance.uniform(0, math.log(220), 4)))
        pixels = noise(height, width)
        expected = np.asarray(Image.fromarray(pixels).resize((whole[1], whole[0]), BICUBIC))
        top, left = (int(chance.integers(0, side)) for side in whole)
        size = (int(chance.integers(1, whole[0] - top + 1)), int(chance.integers(1, whole[1] - left + 1)))
        found = resample(tensor(pixels), (whole[0], whole[1]), (top, left), size)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected[top : top + size[0], left : left + size[1]]), (height, width, whole)


def test_full_size_pictures_equal_pillow_and_transformers_own_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    spec = Preprocessing(family="clip")
    processor = CLIPImageProcessorPil()
    for size in ((1216, 832), (640, 1536), (1536, 640)):
        pixels = noise(*size)
        expected = processor(images=[pixels], return_tensors="pt")["pixel_values"]
        assert torch.equal(prepare(tensor(pixels), spec), expected)
        found = shape_in_tensors(tensor(pixels), pixel_form(spec))
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), reference(pixels, "crop", 224))


def test_rounding_the_crop_shifts_it_by_one_pixel_where_the_rest_is_odd() -> None:
    pixels = noise(1216, 832)  # 327 rows of 224: 103 to spare, 51 or 52 above
    floor, even = (shape(tensor(pixels), PixelForm(224, "crop", rounding=kind)) for kind in ("floor", "round"))
    assert torch.equal(floor[:, :, 1:], even[:, :, :-1])
    assert not torch.equal(floor, even)


@pytest.mark.parametrize("axis", [2, 3])
def test_a_strip_does_not_become_a_huge_picture_before_the_crop(axis: int) -> None:
    length, part = 70_000_000, noise(1, 400)  # resized whole: 32 x 2,240,000,000, which Pillow refuses
    strip = torch.zeros(1, 3, 1, length, dtype=torch.uint8)
    strip[..., length // 2 - 200 : length // 2 + 200] = tensor(part)
    found = shape(strip if axis == 3 else strip.transpose(2, 3), PixelForm(32, "crop"))
    # The middle of the strip by itself has the same windows, so the same bytes.
    expected = np.asarray(Image.fromarray(part).resize((32 * 400, 32), BICUBIC))[:, 16 * 400 - 16 : 16 * 400 + 16]
    assert torch.equal(found if axis == 3 else found.transpose(2, 3), tensor(expected))


def test_pictures_of_the_right_size_pass_untouched() -> None:
    images = tensor(noise(32, 32))
    for changes in ({}, {"fit": "stretch"}, {"resize": "none"}):
        assert torch.equal(shape(images, pixel_form(free(**changes))), images)
    assert torch.equal(shape(images, pixel_form(free(fit="pad"))), images / 255)


def test_without_resize_another_size_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="one size") as caught:
        prepare(torch.zeros(1, 3, 48, 40, dtype=torch.uint8), free(resize="none"))
    assert "40x48 px" in caught.value.why


@pytest.mark.parametrize(
    ("sides", "kind"), [((1, 3, 4, 4), torch.float32), ((3, 4, 4), torch.uint8), ((1, 4, 4, 4), torch.uint8)]
)
def test_what_is_not_rgb_bytes_is_refused(sides: tuple[int, ...], kind: torch.dtype) -> None:
    with pytest.raises(CraftError, match="bytes in RGB"):
        shape(torch.zeros(sides, dtype=kind), PixelForm(32, "crop"))


# ---- floats into floats


def padded(pixels: Array, size: int, *, antialias: bool) -> Array:
    """float32 [3, size, size] as HPSv2's ResizeMaxSize: Python's rounding, half the rest before, zeros around."""
    height, width = pixels.shape[:2]
    scale = size / float(max(height, width))
    rows, columns = round(height * scale), round(width * scale)
    values = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(255))[None]
    small = F.interpolate(values.contiguous(), (rows, columns), mode="bicubic", antialias=antialias)[0].numpy()
    found = np.zeros((3, size, size), dtype=np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    found[:, top : top + rows, left : left + columns] = small
    return found


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (83, 121), (121, 83), (64, 250), (9, 7), (1, 1), (33, 32)])
def test_pad_is_hpsv2s_transform(height: int, width: int, antialias: bool) -> None:
    pictures = [noise(height, width, seed) for seed in range(2)]
    found = shape(tensor(*pictures), pixel_form(free(fit="pad", antialias=antialias)))
    expected = np.stack([padded(picture, 32, antialias=antialias) for picture in pictures])
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)


def test_antialiasing_matters() -> None:
    one, two = (shape(tensor(noise(200, 200)), PixelForm(32, "pad", antialias=kind)) for kind in (True, False))
    assert float((one - two).abs().mean()) > 0.05


def test_pad_fills_with_zeros_before_normalising_and_no_side_vanishes() -> None:
    images = torch.full((1, 3, 40, 80), 255, dtype=torch.uint8)
    found = prepare(images, free(fit="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    assert torch.allclose(found[:, :, 8:24], torch.ones(()), atol=1e-5)
    assert bool((found[:, :, :8] == -1).all())
    assert bool((found[:, :, 24:] == -1).all())
    thin = shape(torch.full((1, 3, 1, 5000), 255, dtype=torch.uint8), PixelForm(32, "pad"))
    assert float(thin.sum()) == pytest.approx(3 * 32, rel=1e-4)


# ---- normalising


def test_normalising_uses_mean_and_std_of_each_channel() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    found = prepare(images, free(mean=CLIP_MEAN, std=CLIP_STD))[0, :, 0, 0].numpy()
    mean, std = np.float32(CLIP_MEAN), np.float32(CLIP_STD)
    assert np.array_equal(found, (np.float32([0, 128, 255]) / np.float32(255) - mean) / std)
    half = normalise(images, free(mean=CLIP_MEAN, std=CLIP_STD), torch.float16)
    assert half.dtype == torch.float16
    assert np.array_equal(half[0, :, 0, 0].numpy(), found.astype(np.float16))


# ---- forms


def test_forms_are_equal_when_the_same_pixels_come_out() -> None:
    one = pixel_form(free())
    assert one == pixel_form(free(mean=CLIP_MEAN, antialias=False, score_scale=2.0))
    others = [free(fit="stretch"), free(fit="pad"), free(fit="pad", antialias=False), free(crop_rounding="round"),
              free(image_size=64), free(resize="none")]  # fmt: skip
    assert len({one, *map(pixel_form, others)}) == 7
    assert pixel_form(free(fit="stretch", crop_rounding="round")) == pixel_form(free(fit="stretch"))
    assert pixel_form(free(resize="none", fit="pad")) == pixel_form(free(resize="none"))


def test_ids_say_what_was_done() -> None:
    pil = "pil13" if TALL_FIRST else "pil"
    assert pixel_form(Preprocessing(family="clip")).id == f"{pil}-bicubic/crop-floor/224"
    assert pixel_form(free(crop_rounding="round")).id == f"{pil}-bicubic/crop-round/32"
    assert pixel_form(free(fit="stretch")).id == f"{pil}-bicubic/stretch/32"
    assert pixel_form(free(fit="pad")).id == "tensor-bicubic-antialias/pad/32"
    assert pixel_form(free(fit="pad", antialias=False)).id == "tensor-bicubic/pad/32"
    assert pixel_form(free(resize="none")).id == "none/32"
    assert preprocessing_id(Preprocessing(family="clip")) == pixel_form(Preprocessing(family="clip")).id
    assert preprocessing_id(free()).startswith(f"{pixel_form(free()).id}/norm-")
    assert preprocessing_id(free()) != preprocessing_id(free(std=(1, 1, 2)))


# ---- a chunk's pictures


class Reader:
    """Counts how often pictures are decoded."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes
        self.reads = 0

    def __call__(self) -> Sequence[Tensor]:
        self.reads += 1
        return [tensor(noise(*size, index))[0] for index, size in enumerate(self.sizes)]


def test_pictures_are_decoded_once_and_shaped_once_for_each_form() -> None:
    reader = Reader((40, 40), (40, 40), (50, 30))
    pictures = Pictures(reader)
    assert reader.reads == 0
    crop, pad = PixelForm(32, "crop"), PixelForm(32, "pad")
    shared = pictures.pixels(crop)
    assert pictures.pixels(PixelForm(32, "crop"), "cpu") is shared
    assert (shared.dtype, pictures.pixels(pad).dtype) == (torch.uint8, torch.float32)
    for index, image in enumerate(reader()):
        assert torch.equal(shared[index], shape(image[None], crop)[0])
        assert torch.equal(pictures.pixels(pad)[index], shape(image[None], pad)[0])
    assert (len(pictures), reader.reads) == (3, 2)  # one of the two is the test's own


def test_dropped_pictures_leave_their_forms_and_are_read_again_when_another_is_wanted() -> None:
    reader = Reader((400, 400), (400, 400))
    pictures = Pictures(reader)
    form = PixelForm(32, "crop")
    kept = pictures.pixels(form)
    pictures.drop_images()
    assert pictures.pixels(form) is kept
    assert (len(pictures), reader.reads) == (2, 1)
    assert kept.untyped_storage().nbytes() == 2 * 3 * 32 * 32  # does not hold on to the large ones
    pictures.pixels(PixelForm(32, "stretch"))
    assert reader.reads == 2


def test_pictures_in_memory_cannot_be_read_again() -> None:
    images = tensor(noise(40, 40), noise(40, 40, 1))
    pictures = Pictures.of(images)
    assert torch.equal(pictures.stacked(), images)
    pictures.drop_images()
    assert len(pictures) == 2
    with pytest.raises(CraftError, match="dropped"):
        pictures.images()


def test_pictures_of_several_sizes_cannot_be_stacked() -> None:
    with pytest.raises(CraftError, match="several sizes") as caught:
        Pictures(Reader((40, 50), (60, 40))).stacked()
    assert "40x60, 50x40" in caught.value.why
    assert Pictures.of([]).stacked().shape[0] == len(Pictures.of([])) == 0
    assert Pictures.of([]).pixels(PixelForm(32, "crop")).shape == (0, 3, 32, 32)
