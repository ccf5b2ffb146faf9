"""Official weights that exist only as a pickle: what is read, and what damage is told as."""

from __future__ import annotations

import io
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from craft_fast.errors import EnvironmentProblem, ExitCode, IntegrityError
from craft_fast.store.atomic import write_safetensors
from craft_fast.store.digest import sha256_file
from craft_fast.store.official import inspect, read_official

KINDS = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
}


def tensors() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=made),
        "half": torch.randn(5, generator=made).half(),
        "turned": torch.randn(4, 3, generator=made).T,
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "small": torch.randn(2, 2, generator=made).bfloat16(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_come_back_as_they_were_saved(kind: str, tmp_path: Path) -> None:
    path, expected = tmp_path / "m.pt", tensors()
    wrapped = {"state_dict": OrderedDict(expected), "epoch": 3, "sizes": [torch.Size([1, 2])], "note": ("x", None, 0.5)}
    for value in (expected, OrderedDict(expected), wrapped):
        KINDS[kind](value, path)
        inspect(path)
        found = read_official(path)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_tensors_too(kind: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3))
    KINDS[kind]({"w": weight}, tmp_path / "m.pth")
    found = read_official(tmp_path / "m.pth")["w"]
    assert torch.equal(found, weight)
    assert not found.requires_grad


def test_tensors_that_share_their_numbers_still_do(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"whole": whole, "half": whole[:3]}, tmp_path / "m.pt")
    found = read_official(tmp_path / "m.pt")
    assert found["whole"].data_ptr() == found["half"].data_ptr()


def test_an_archive_is_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(4 * 1024**2)}, path)
    found = read_official(path, check_finite=False)["w"]
    inode = str(path.stat().st_ino)
    inside = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] == inode]
    begin, end = (int(number, 16) for number in inside[0].split()[0].split("-"))
    assert begin <= found.data_ptr() < end
    # Writing to it changes no file.
    before = sha256_file(path)
    found.zero_()
    assert sha256_file(path) == before


def test_the_top_folder_of_an_archive_may_have_any_name(tmp_path: Path) -> None:
    first, second = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "other.pt"
    torch.save(tensors(), first)  # its folder is named after the file
    first.rename(second)
    assert set(read_official(second)) == set(tensors())
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)  # "archive"
    second.write_bytes(buffer.getvalue())
    assert set(read_official(second)) == set(tensors())


def test_a_sha256_is_held_against_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(tensors(), path)
    assert read_official(path, expect_sha256=sha256_file(path).upper())
    with pytest.raises(IntegrityError, match="not the published") as caught:
        read_official(path, expect_sha256="0" * 64)
    assert sha256_file(path) in caught.value.why
    assert "fetch" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_no_numbers_are_refused(kind: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    KINDS[kind]({"fine": torch.ones(2), "w": torch.tensor([1.0, value]).half()}, path)
    with pytest.raises(IntegrityError, match="NaN or infinity") as caught:
        read_official(path)
    assert "(w)" in caught.value.where
    assert "w" in read_official(path, check_finite=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value", [[torch.ones(2)], torch.ones(2), {"epoch": 3}, {3: torch.ones(2)}, {}, {"state_dict": {}}, "text"]
)
def test_what_is_no_dictionary_of_tensors_is_refused(kind: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    KINDS[kind](value, path)
    with pytest.raises(IntegrityError) as caught:
        read_official(path)
    assert caught.value.exit_code == ExitCode.INTEGRITY


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        (b"<!DOCTYPE html><html>rate limited</html>", "HTML"),
        (b"", "empty"),
        (b"\x00" * 64, "unknown"),
        (b"GGUF\x03\x00", "GGUF"),
    ],
)
def test_what_a_failed_download_leaves_is_named(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "ImageReward.pt"
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_official(path)
    assert word in caught.value.why
    assert str(path) in caught.value.where


def test_safetensors_under_another_name_is_told_so(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "head.pth", {"w": torch.ones(2)})
    with pytest.raises(IntegrityError, match="safetensors file under another name") as caught:
        read_official(tmp_path / "head.pth")
    assert "mv 'head.pth' 'head.safetensors'" in caught.value.hint


def test_a_file_that_is_not_there_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="missing"):
        read_official(tmp_path / "gone.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_damaged_wherever_it_ends(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    KINDS[kind](tensors(), path)
    whole = path.read_bytes()
    for length in sorted({1, 2, 9, *range(64, len(whole), 61), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError):
            read_official(path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_give_an_error_or_other_numbers_and_nothing_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    KINDS[kind](tensors(), path)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_official(path)
        except IntegrityError:
            refused += 1
    assert refused > 15
