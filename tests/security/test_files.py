"""Hostile and damaged files: each is refused by name, none is opened as what it is not."""

from __future__ import annotations

import io
import json
import pickle
import random
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from craft_fast.errors import EnvironmentProblem, ExitCode, IntegrityError
from craft_fast.store import atomic
from craft_fast.store.safe_load import load_safetensors, read_image


class Canary:
    """Writes a file when it is unpickled: the proof that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zipped(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [zipped, legacy, pickle.dumps, lambda value: pickle.dumps(value, protocol=2)])
def test_pickles_renamed_to_safetensors_are_refused_unopened(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    canary = tmp_path / "canary"
    path = tmp_path / "model.safetensors"
    path.write_bytes(make(Canary(canary)))
    with pytest.raises(IntegrityError) as caught:
        load_safetensors(path)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert "pickle" in str(caught.value)
    assert "weights_only=True" in caught.value.hint
    assert not canary.exists()
    content = io.BytesIO(path.read_bytes())
    torch.load(content, weights_only=False) if make in (zipped, legacy) else pickle.load(content)
    assert canary.exists(), "the canary must sing when it is really opened, or this test proves nothing"


@pytest.mark.parametrize("make", [zipped, legacy])
def test_the_printed_command_converts(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "it's a model.safetensors"
    path.write_bytes(make({"a": torch.arange(3.0)}))
    with pytest.raises(IntegrityError) as caught:
        load_safetensors(path)
    command = shlex.split(caught.value.hint.split("convert it with: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    converted = load_safetensors(tmp_path / "it's a model.converted.safetensors")
    assert torch.equal(converted["a"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!doctype html><html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "PNG"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (b"\x10", "header"),
        (b"\xff" * 8 + b"{}", "header"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header"),
        (struct.pack("<Q", 2) + b"[]", "header"),
        (struct.pack("<Q", 100) + b"{}", "header"),
    ],
)
def test_what_is_not_safetensors_is_named(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=word):
        load_safetensors(path)


def with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        b"{" + b'"a":[' * 5000,
        b'{"a": \xff\xfe}',
        b"{}",
    ],
)
def test_hostile_headers_are_refused(header: object, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(header, b"\0" * 8))
    with pytest.raises(IntegrityError):
        load_safetensors(path)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    atomic.write_safetensors(whole, {"a": torch.randn(5), "b": torch.arange(3)})
    content = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            load_safetensors(path)


def test_every_flipped_bit_is_found_by_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = atomic.write_safetensors(path, {"a": torch.randn(40)})
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        bit = draw.randrange(len(content) * 8)
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            load_safetensors(path, expect_sha256=written.sha256)
    path.write_bytes(content)
    assert set(load_safetensors(path, expect_sha256=written.sha256)) == {"a"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.zeros(10, dtype=dtype)
    tensor[3] = value
    path = tmp_path / "a.safetensors"
    atomic.write_safetensors(path, {"fine": torch.ones(2), "bad": tensor})
    with pytest.raises(IntegrityError, match="NaN or infinity") as caught:
        load_safetensors(path)
    assert "(bad)" in caught.value.where
    assert "bad" in load_safetensors(path, check_finite=False)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        load_safetensors(tmp_path / "no.safetensors")


def picture(kind: str, size: tuple[int, int] = (5, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_allowed_pictures_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(picture(kind))
    image = read_image(path)
    assert image.shape == (3, 4, 5)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    "content", [picture("TIFF"), picture("GIF"), picture("BMP"), b"<svg/>", b"", picture("PNG")[:40]]
)
def test_other_and_damaged_pictures_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        read_image(path)


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_a_picture_bomb_is_refused_before_it_is_unpacked(side: int, tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    with pytest.raises(IntegrityError, match="too large"):
        read_image(path)


def test_a_missing_picture_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem):
        read_image(tmp_path / "no.png")
