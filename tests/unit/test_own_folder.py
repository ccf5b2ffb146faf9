"""What a folder of own pictures holds: groups by caption, weights, and everything that is amiss at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from craft_fast.config import GenerateSettings, ImagesSettings
from craft_fast.errors import ConfigError, IntegrityError, UsageError
from craft_fast.own_folder import drawn_part, own_groups, read_folder
from craft_fast.own_images import _fitted, bucket_sizes, check_pictures

SQUARE = GenerateSettings()


def picture(path: Path, size: tuple[int, int] = (64, 64), colour: str = "red", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (caption, colour) in enumerate(
        [("a red circle", "red"), ("a blue square", "blue"), ("a red circle", "green")]
    ):
        picture(tmp_path / f"p{number}.png", colour=colour)
        (tmp_path / f"p{number}.txt").write_text(caption + "\n")
    return tmp_path


def settings(folder: Path, **options: Any) -> ImagesSettings:
    return ImagesSettings(folder=str(folder), **options)


def test_pictures_of_one_caption_are_one_group(folder: Path) -> None:
    found = read_folder(settings(folder))
    red, blue = own_groups(found)
    assert [variant.text for variant in red.variants] == ["a red circle"] * 3
    assert [variant.member for variant in red.variants] == [0, 1, 2]
    assert [entry["file"] for entry in red.prompt.meta["own"].values()] == ["p0.png", "p2.png"]
    assert [variant.member for variant in blue.variants] == [0, 1]
    part = drawn_part(red)
    assert part is not None
    assert [variant.member for variant in part.variants] == [0]
    assert "1 captions have one picture alone" in found.notes[-1]
    assert not found.weighted


def test_the_digest_is_of_content_and_texts_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    first = read_folder(settings(folder)).digest
    moved = shutil.move(folder, tmp_path.with_name("moved"))
    assert read_folder(settings(moved)).digest == first
    (moved / "p1.txt").write_text("a blue circle")
    changed = read_folder(settings(moved)).digest
    picture(moved / "p1.png", colour="black")
    assert len({first, changed, read_folder(settings(moved)).digest}) == 3


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_weights_of_the_metadata_are_taken_as_they_are(folder: Path) -> None:
    write_metadata(
        folder, [{"file_name": f"p{i}.png", "text": "x", "weight": w} for i, w in enumerate([0.5, 2, -1.25])]
    )
    found = read_folder(settings(folder))
    assert found.weighted
    assert {one.name: one.weight for one in found.pictures} == {"p0.png": 0.5, "p1.png": 2.0, "p2.png": -1.25}
    assert all(drawn_part(group) is None for group in own_groups(found))
    scored = read_folder(settings(folder, weights="score"))
    assert not scored.weighted
    assert scored.digest != found.digest


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "2", True, [1]])
def test_a_weight_that_is_no_number_is_named(folder: Path, bad: Any) -> None:
    write_metadata(folder, [{"file_name": f"p{i}.png", "text": "x", "weight": w} for i, w in enumerate([1, bad, 1])])
    with pytest.raises(ConfigError, match=r"p1\.png") as refused:
        read_folder(settings(folder))
    assert "images.weights=score" in refused.value.hint


def test_weights_for_some_pictures_alone_are_refused(folder: Path) -> None:
    write_metadata(folder, [{"file_name": "p0.png", "text": "x", "weight": 1}])
    with pytest.raises(ConfigError, match=r"2 of 3 pictures have no weight[\s\S]*p1\.png[\s\S]*p2\.png"):
        read_folder(settings(folder))


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "no name"}', "nonsense"])
def test_metadata_that_cannot_be_read(folder: Path, line: str) -> None:
    (folder / "metadata.jsonl").write_text(line + "\n")
    for number in range(3):
        (folder / f"p{number}.txt").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="line 1"):
        read_folder(settings(folder))


def test_pictures_without_captions_are_named(folder: Path) -> None:
    (folder / "p1.txt").unlink()
    with pytest.raises(ConfigError, match=r"p1\.png") as refused:
        read_folder(settings(folder))
    assert "NAME.txt" in refused.value.hint
    (folder / "p1.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"p1\.png"):
        read_folder(settings(folder))


def test_no_folder_and_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_folder(settings(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="No picture"):
        read_folder(settings(tmp_path))


def test_all_that_is_broken_is_said_at_once(folder: Path) -> None:
    for name, data in {
        "cut.png": (folder / "p0.png").read_bytes()[:60],
        "empty.jpg": b"",
        "page.webp": b"<html>",
    }.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a red circle")
    picture(folder / "small.png", (20, 20))
    (folder / "small.txt").write_text("a red circle")
    found = read_folder(settings(folder))
    with pytest.raises(IntegrityError) as refused:
        check_pictures(found, settings(folder), SQUARE)
    assert refused.value.exit_code == 6
    assert "3 pictures cannot be used; 1 others are too small" in refused.value.what
    assert all(name in refused.value.why for name in ("cut.png", "empty.jpg", "page.webp"))
    for name in ("cut.png", "empty.jpg", "page.webp"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"small\.png: 20 x 20 px would be enlarged 3\.20 times") as small:
        check_pictures(read_folder(settings(folder)), settings(folder), SQUARE)
    assert small.value.exit_code == 3
    check_pictures(read_folder(settings(folder)), settings(folder, max_enlargement=4.0), SQUARE)


def test_a_giant_is_refused_before_it_is_decoded(folder: Path) -> None:
    Image.new("1", (9000, 9000)).save(folder / "p0.png")
    with pytest.raises(IntegrityError, match=r"p0\.png: a picture is too large"):
        check_pictures(read_folder(settings(folder)), settings(folder), SQUARE)


def test_a_picture_is_turned_as_its_exif_says_then_fitted(folder: Path) -> None:
    image = Image.new("RGB", (128, 64), "red")
    image.paste((0, 0, 255), (0, 0, 32, 64))  # blue at the left, which turned clockwise is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "p0.png", exif=exif)
    wanted = settings(folder)
    group = own_groups(read_folder(wanted))[0]
    fitted = _fitted(folder, group, group.variants[1], bucket_sizes(wanted, SQUARE))
    assert tuple(fitted.shape) == (3, 80, 48)
    assert fitted[:, 4, 24].tolist() == [0, 0, 255]
    assert fitted[:, 76, 24].tolist() == [255, 0, 0]


def test_a_picture_that_changed_after_it_was_listed_is_not_taken(folder: Path) -> None:
    wanted = settings(folder)
    group = own_groups(read_folder(wanted))[0]
    picture(folder / "p0.png", colour="white")
    with pytest.raises(IntegrityError, match="changed after it was listed"):
        _fitted(folder, group, group.variants[1], bucket_sizes(wanted, SQUARE))
