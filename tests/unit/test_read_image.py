"""Pictures from files, of every kind that is read, to a reward's pixels, in every bit."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from craft_fast.errors import IntegrityError
from craft_fast.rewards.base import CLIP_MEAN, CLIP_STD, Preprocessing
from craft_fast.rewards.pixels import prepare
from craft_fast.store.safe_load import read_image

Array = np.ndarray[Any, Any]
SPEC = Preprocessing(family="clip", image_size=32)


def noise(height: int, width: int, channels: int) -> Array:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(path: Path, picture: Image.Image, kind: str = "PNG", **more: Any) -> Path:
    picture.save(path, kind, **more)
    return path


def png(path: Path, header: tuple[int, int], *, depth: int, colour: int, rows: Array, more: bytes = b"") -> Path:
    """A PNG written by hand, for kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = header
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))
    return path


def expected_pixels(rgb: Array, size: int = 32) -> Array:
    """float32 [3, size, size]: Pillow's bicubic, transformers' crop, CLIP's mean and standard deviation."""
    height, width = rgb.shape[:2]
    short = min(height, width)
    large = (int(size * width / short), int(size * height / short))
    left, top = (large[0] - size) // 2, (large[1] - size) // 2
    small = Image.fromarray(rgb).resize(large, Image.Resampling.BICUBIC)
    cut = np.asarray(small.crop((left, top, left + size, top + size))).astype(np.float32) / np.float32(255)
    return ((cut - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)


def agree(path: Path, rgb: Array) -> None:
    """What is read is ``rgb``, and what a network sees of it is what the reference makes of that."""
    image = read_image(path)
    assert (image.dtype, image.is_contiguous()) == (torch.uint8, True)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), rgb)
    assert np.array_equal(prepare(image[None], SPEC)[0].numpy(), expected_pixels(np.ascontiguousarray(rgb)))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 111), (111, 50), (300, 40), (3, 5), (1, 1)])
def test_rgb_of_every_shape(tmp_path: Path, height: int, width: int) -> None:
    rgb = noise(height, width, 3)
    agree(saved(tmp_path / "a.png", Image.fromarray(rgb)), rgb)
    agree(saved(tmp_path / "a.webp", Image.fromarray(rgb), "WEBP", lossless=True), rgb)


def test_alpha_is_dropped_and_the_colours_under_it_stay(tmp_path: Path) -> None:
    rgba = noise(40, 50, 4)
    rgba[:20, :, 3] = 0
    agree(saved(tmp_path / "a.png", Image.fromarray(rgba)), rgba[:, :, :3])
    agree(saved(tmp_path / "a.webp", Image.fromarray(rgba), "WEBP", lossless=True, exact=True), rgba[:, :, :3])


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    index = noise(40, 50, 1)[:, :, 0] % 7
    colours = noise(1, 7, 3)[0]
    for transparency in (None, 3, bytes([0, 50, 255, 20, 0, 9, 1])):
        picture = Image.fromarray(index).convert("P")
        picture.putdata(index.ravel().tolist())
        picture.putpalette(colours.ravel().tolist())
        more = {} if transparency is None else {"transparency": transparency}
        agree(saved(tmp_path / "a.png", picture, **more), colours[index])


def test_grey_with_and_without_alpha_and_one_bit(tmp_path: Path) -> None:
    grey = noise(40, 50, 1)[:, :, 0]
    wide = np.repeat(grey[:, :, None], 3, axis=2)
    agree(saved(tmp_path / "a.png", Image.fromarray(grey)), wide)
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey[::-1].copy())])
    agree(saved(tmp_path / "a.png", both), wide)
    agree(saved(tmp_path / "a.png", Image.fromarray(grey > 99)), (wide > 99) * np.uint8(255))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = (np.arange(40 * 50, dtype=np.uint32) * 33).astype(np.uint16).reshape(40, 50)
    grey[0, :3] = 0, 255, 65535
    upper = (grey >> 8).astype(np.uint8)
    wide = np.repeat(upper[:, :, None], 3, axis=2)
    assert len(np.unique(upper)) > 200
    agree(saved(tmp_path / "a.png", Image.fromarray(grey)), wide)
    alpha = np.stack([grey, grey[::-1]], -1).astype(">u2")
    agree(png(tmp_path / "a.png", (40, 50), depth=16, colour=4, rows=alpha), wide)
    colours = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    agree(
        png(tmp_path / "a.png", (40, 50), depth=16, colour=2, rows=colours.astype(">u2")),
        (colours >> 8).astype(np.uint8),
    )


def test_cmyk_and_grey_jpegs_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    for picture in (
        Image.frombytes("CMYK", (50, 40), noise(40, 50, 4).tobytes()),
        Image.fromarray(noise(40, 50, 1)[:, :, 0]),
    ):
        path = saved(tmp_path / "a.jpg", picture, "JPEG", quality=95)
        with Image.open(path) as stored:
            agree(path, np.asarray(stored.convert("RGB")))


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path: Path, number: int) -> None:
    """Rows and columns of the upright picture, from the table of the EXIF standard (tag 274)."""
    rgb = noise(40, 56, 3)
    upright = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.swapaxes(0, 1),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(rgb, 1),
    }[number]
    agree(saved(tmp_path / "a.png", Image.fromarray(rgb), exif=with_orientation(number)), upright)
    path = saved(tmp_path / "a.jpg", Image.fromarray(rgb), "JPEG", exif=with_orientation(number))
    with Image.open(path) as stored:
        agree(path, np.asarray(ImageOps.exif_transpose(stored)))


def test_unknown_and_broken_exif_data_turn_nothing(tmp_path: Path) -> None:
    rgb = noise(40, 56, 3)
    agree(saved(tmp_path / "a.png", Image.fromarray(rgb), exif=with_orientation(9)), rgb)
    for broken in (b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II", b"Exif\0\0" + b"\xff" * 40):
        agree(saved(tmp_path / "a.webp", Image.fromarray(rgb), "WEBP", lossless=True, exif=broken), rgb)
        path = saved(tmp_path / "a.jpg", Image.fromarray(rgb), "JPEG", exif=broken)
        saved(tmp_path / "plain.jpg", Image.fromarray(rgb), "JPEG")
        with Image.open(tmp_path / "plain.jpg") as stored:
            agree(path, np.asarray(stored.convert("RGB")))


def test_the_first_picture_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(40, 50 + n, 3)).crop((0, 0, 50, 40)) for n in range(3)]
    first = np.asarray(frames[0])
    for kind in ("PNG", "WEBP"):
        more = {"lossless": True} if kind == "WEBP" else {}
        agree(saved(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:], **more), first)


def test_damage_anywhere_is_a_named_error_or_a_picture(tmp_path: Path) -> None:
    exif = with_orientation(6).tobytes()
    chance = np.random.default_rng(1)
    said: list[str] = []
    path = tmp_path / "a"
    for kind, more in (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})):
        buffer = io.BytesIO()
        Image.fromarray(noise(24, 30, 3)).save(buffer, kind, exif=exif, **more)
        whole = buffer.getvalue()
        for _ in range(150):
            data = bytearray(whole[: chance.integers(1, len(whole) + 1)] if chance.random() < 0.3 else whole)
            for _ in range(3):
                data[int(chance.integers(0, len(data)))] = int(chance.integers(0, 256))
            path.write_bytes(data)
            try:
                assert read_image(path).shape[0] == 3
            except IntegrityError as error:
                said.append(error.where)
    assert len(said) > 150
    assert set(said) == {str(path)}
