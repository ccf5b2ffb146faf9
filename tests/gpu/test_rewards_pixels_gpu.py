"""Pictures shaped on a GPU: the CPU's bytes, in little memory and time."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.pixels import Pictures, PixelForm, prepare, shape

pytestmark = pytest.mark.gpu
SIZES = [(96, 96), (83, 121), (121, 83), (64, 250), (250, 64), (9, 7), (1, 1), (32, 47), (1024, 1024), (1536, 640)]
BYTE_FORMS = [
    PixelForm(32, "crop"),
    PixelForm(32, "crop", rounding="round"),
    PixelForm(224, "crop"),
    PixelForm(32, "stretch"),
]


def noise(count: int, height: int, width: int) -> Tensor:
    chance = torch.Generator().manual_seed(height * 2000 + width)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=chance)
    images[:, 0] = (images[:, 0] > 127) * 255  # hard edges: sums leave 0..255 and are clipped
    return images


@pytest.mark.parametrize("form", BYTE_FORMS, ids=lambda form: form.id)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_bytes_are_those_of_the_cpu(height: int, width: int, form: PixelForm) -> None:
    images = noise(2, height, width)
    found = shape(images.cuda(), form)
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), shape(images, form))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (3, 20_000)])
def test_pad_agrees_with_the_cpu_to_rounding(height: int, width: int, antialias: bool) -> None:
    form, images = PixelForm(32, "pad", antialias=antialias), noise(2, height, width)
    found = shape(images.cuda(), form)
    assert (found.device.type, found.dtype) == ("cuda", torch.float32)
    assert torch.allclose(found.cpu(), shape(images, form), rtol=0, atol=2e-5)


def test_normalised_pixels_stay_on_the_device() -> None:
    images, spec = noise(2, 300, 200), Preprocessing(family="clip")
    found = prepare(images.cuda(), spec)
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), prepare(images, spec), rtol=0, atol=1e-6)


def test_sixty_four_large_pictures_take_little_memory_and_time() -> None:
    images = noise(64, 1024, 1024).cuda()
    form = PixelForm(224, "crop")
    shape(images[:2], form)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    found = shape(images, form)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    print(f"\n64 pictures of 1024x1024 to 224: {seconds * 1000:.1f} ms, {peak / 2**20:.0f} MiB")
    assert peak < 400 * 2**20
    assert seconds < 2.0
    del found
    assert torch.cuda.memory_allocated() == before  # no table stays on the device


def test_a_chunk_of_several_sizes_is_shaped_on_the_device() -> None:
    images = [noise(1, *size)[0] for size in ((1024, 1024), (640, 1536), (1024, 1024), (1536, 640))]
    pictures, form = Pictures.of(images), PixelForm(224, "crop")
    found = pictures.pixels(form, "cuda")
    assert found.device.type == "cuda"
    assert pictures.pixels(form, torch.device("cuda")) is found
    assert torch.equal(found.cpu(), Pictures.of(images).pixels(form))
    for form in (PixelForm(224, "pad"), PixelForm(224, "stretch")):
        assert pictures.pixels(form, "cuda").shape == (4, 3, 224, 224)
