"""What a folder of own pictures holds: groups by caption, weights, and everything that is amiss at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from craft_fast.config import GenerateSettings, ImagesSettings
from craft_fast.errors import ConfigError, IntegrityError, UsageError
from craft_fast.own_folder import OwnFolder, read_folder, require_sound
from craft_fast.own_groups import changes, drawn_part, listing, own_groups
from craft_fast.own_images import Source, bucket_sizes, check_pictures, side_multiple

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


def refused(folder: Path, **options: Any) -> str:
    """Why the folder's listing is refused, with exit code 3."""
    with pytest.raises(ConfigError) as error:
        require_sound(read_folder(settings(folder, **options)))
    assert error.value.exit_code == 3
    return f"{error.value.what}{error.value.why}\n{error.value.hint}"


def check(folder: Path, **options: Any) -> list[str]:
    wanted = settings(folder, **options)
    return check_pictures(read_folder(wanted), wanted, bucket_sizes(wanted, SQUARE))


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
    require_sound(found)
    assert found.weighted
    assert {one.name: one.weight for one in found.pictures} == {"p0.png": 0.5, "p1.png": 2.0, "p2.png": -1.25}
    assert all(drawn_part(group) is None for group in own_groups(found))
    scored = read_folder(settings(folder, weights="score"))
    assert not scored.weighted
    assert scored.digest != found.digest


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "2", True, [1], 10**400, -1e300, {"a": 1}])
def test_a_weight_that_is_no_number_is_named(folder: Path, bad: Any) -> None:
    write_metadata(folder, [{"file_name": f"p{i}.png", "text": "x", "weight": w} for i, w in enumerate([1, bad, 1])])
    said = refused(folder)
    assert "p1.png: weight" in said
    assert "metadata.jsonl, line 2" in said
    assert "p0.png" not in said
    assert "images.weights=score" in said
    require_sound(read_folder(settings(folder, weights="score")))


def test_weights_for_some_pictures_alone_are_refused(folder: Path) -> None:
    write_metadata(folder, [{"file_name": "p0.png", "text": "x", "weight": 1}])
    said = refused(folder)
    assert "p1.png: no weight" in said
    assert "p2.png: no weight" in said
    assert "p0.png" not in said


@pytest.mark.parametrize("weights", [[1, -1, 0], [-2, -3, 1], [0, 0, 0], [1e-300, 0, 0]])
def test_weights_whose_mean_is_not_positive_are_refused_before_anything_is_done(
    folder: Path, weights: list[float]
) -> None:
    write_metadata(folder, [{"file_name": f"p{i}.png", "text": "x", "weight": w} for i, w in enumerate(weights)])
    assert "not positive" in refused(folder)


def test_rejected_pictures_of_a_whole_run_are_left_out_and_base_pictures_drawn_anew(folder: Path) -> None:
    rows = [
        {"file_name": "p0.png", "text": "a red circle", "member": 0, "accepted": False, "craft_fast": "1"},
        {"file_name": "p1.png", "text": "a blue square", "member": 1, "accepted": False, "craft_fast": "1"},
        {"file_name": "p2.png", "text": "a red circle", "member": 2, "accepted": True, "weight": 2, "craft_fast": "1"},
    ]
    write_metadata(folder, rows)
    found = read_folder(settings(folder))
    assert [(one.name, one.member, one.weight) for one in found.pictures] == [("p2.png", 2, 2.0)]
    assert "2 pictures that metadata has as rejected are left out" in found.notes
    scored = read_folder(settings(folder, weights="score"))
    assert [(one.name, one.member) for one in scored.pictures] == [("p1.png", 1), ("p2.png", 2)]
    assert any("drawn from base prompts" in note for note in scored.notes)


def test_tables_of_folders_below_and_csv_give_weights_too(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        for number in (0, 1):
            picture(folder / name / f"{number}.png", colour=["red", "blue"][number])
    for path in folder.glob("p*"):
        path.unlink()
    write_metadata(folder / "one", [{"file_name": f"{i}.png", "text": f"it {i}", "weight": i + 1} for i in (0, 1)])
    (folder / "two/metadata.csv").write_text('file_name,text,weight\n0.png,"it, too",2.5\n./1.png,it 1,-0.5\n')
    found = read_folder(settings(folder))
    require_sound(found)
    assert {one.name: (one.prompt, one.weight) for one in found.pictures} == {
        "one/0.png": ("it 0", 1.0), "one/1.png": ("it 1", 2.0),
        "two/0.png": ("it, too", 2.5), "two/1.png": ("it 1", -0.5),
    }  # fmt: skip


def test_a_picture_of_two_rows_and_rows_of_no_picture(folder: Path) -> None:
    rows = [{"file_name": name, "text": "x"} for name in ("p0.png", "p0.png", "lost.png", "../up.png", "/etc/passwd")]
    write_metadata(folder, rows)
    assert "p0.png: named twice (metadata.jsonl, line 2)" in refused(folder)
    write_metadata(folder, rows[1:])
    notes = read_folder(settings(folder)).notes
    assert any("3 pictures that metadata names are not there" in note and "lost.png" in note for note in notes)


def test_a_caption_edited_beside_its_picture_counts(folder: Path) -> None:
    row = {"file_name": "p0.png", "text": "a red circle, sharp", "prompt": "a red circle", "variant": "sharp"}
    write_metadata(folder, [row])
    (folder / "p0.txt").write_text("a red circle, sharp\n")
    first = read_folder(settings(folder)).pictures[0]
    assert (first.prompt, first.variant) == ("a red circle", "sharp")
    (folder / "p0.txt").write_text("a crimson disc")
    assert read_folder(settings(folder)).pictures[0].prompt == "a crimson disc"


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense", '{"a": ' + "9" * 5000 + "}"])
def test_metadata_that_cannot_be_read(folder: Path, line: str) -> None:
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_folder(settings(folder))


CAPTIONS = {
    "none.png": None, "blank.png": b" \n", "latin.png": b"caf\xe9", "wide.png": "x".encode("utf-16"),
    "nul.png": b"a\0b", "bell.png": b"a\x07b", "long.png": b"a" * 2001, "turned.png": "a \u202e b".encode(),
}  # fmt: skip


def test_all_captions_that_cannot_be_used_are_named_at_once(folder: Path) -> None:
    for name, caption in CAPTIONS.items():
        picture(folder / name)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    said = refused(folder)
    assert f"{len(CAPTIONS)} of the pictures cannot be taken" in said
    assert all(f"{name}: " in said for name in CAPTIONS)
    assert "p0.png" not in said
    assert "NAME.txt" in said


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
    picture(folder / "silent.png")
    strange = ["moving.gif", "loop.png", "lost.png", "folder.gif"]
    (folder / "moving.gif").write_bytes(b"GIF89a")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "lost.png").symlink_to("nowhere.png")
    (folder / "folder.gif").touch()
    os.mkfifo(folder / "pipe.png")
    named = [*strange, "pipe.png", "cut.png", "empty.jpg", "page.webp", "small.png", "silent.png"]
    with pytest.raises(IntegrityError) as error:
        check(folder)
    assert error.value.exit_code == 6
    assert f"{len(named)} of the pictures cannot be taken" in error.value.what
    assert all(f"\n    {name}: " in error.value.why for name in named)
    assert all(word in error.value.hint for word in ("NAME.txt", "images.max_enlargement", "PNG, JPEG and WebP"))
    for name in {*named} - {"small.png"}:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"small\.png: 20 x 20 px would be enlarged 3\.20 times") as small:
        check(folder)
    assert small.value.exit_code == 3
    assert check(folder, max_enlargement=4.0) == []


def test_a_folder_of_nothing_but_what_is_not_read_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.avif").touch()
    with pytest.raises(IntegrityError, match=r"a\.avif: avif is not read"):
        check(tmp_path)


def test_names_that_differ_in_case_alone_and_names_of_no_text_are_refused(folder: Path) -> None:
    picture(folder / "P0.PNG")
    (folder / "P0.txt").write_text("a red circle")
    assert "p0.png: the same name as P0.PNG but for its letters' case" in refused(folder)
    for suffix in ("PNG", "txt"):
        os.rename(folder / f"P0.{suffix}", folder / os.fsdecode(b"\xff." + suffix.encode()))
    with pytest.raises(IntegrityError, match="its name is no UTF-8") as error:
        check(folder)
    assert error.value.why.replace("\n", "").isprintable()


def test_linked_folders_are_told_and_a_loop_of_them_ends(folder: Path) -> None:
    (folder / "again").symlink_to(folder, target_is_directory=True)
    found = read_folder(settings(folder))
    assert len(found.pictures) == 3
    assert "1 linked folders are not looked into: again" in found.notes


def test_what_a_bucket_cuts_off_is_told(folder: Path) -> None:
    picture(folder / "p0.png", (400, 80))
    assert "p0.png (67% of 400 x 80)" in check(folder)[0]


def test_a_giant_is_refused_before_it_is_decoded(folder: Path) -> None:
    Image.new("1", (9000, 9000)).save(folder / "p0.png")
    with pytest.raises(IntegrityError, match=r"p0\.png: a picture is too large"):
        check(folder)


def test_a_picture_is_turned_as_its_exif_says_then_fitted(folder: Path) -> None:
    image = Image.new("RGB", (128, 64), "red")
    image.paste((0, 0, 255), (0, 0, 32, 64))  # blue at the left, which turned clockwise is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "p0.png", exif=exif)
    wanted = settings(folder)
    group = own_groups(read_folder(wanted))[0]
    fitted = Source(folder).fitted(group.prompt.meta["own"]["1"], bucket_sizes(wanted, SQUARE))
    assert tuple(fitted.shape) == (3, 80, 48)
    assert fitted[:, 4, 24].tolist() == [0, 0, 255]
    assert fitted[:, 76, 24].tolist() == [255, 0, 0]


def test_the_middle_is_kept_and_nothing_is_stretched(folder: Path) -> None:
    image = Image.new("RGB", (256, 64), "red")
    image.paste((0, 0, 255), (0, 0, 90, 64))
    image.paste((0, 255, 0), (166, 0, 256, 64))
    image.save(folder / "p0.png")
    own = own_groups(read_folder(settings(folder)))[0].prompt.meta["own"]["1"]
    fitted = Source(folder).fitted(own, [(64, 64)])
    assert torch.equal(fitted, torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 64, 64))


def test_a_long_thin_picture_takes_memory_for_what_is_kept_alone(folder: Path) -> None:
    # Scaled as a whole it would be 64 x 3,840,000 px.
    Image.new("RGB", (1, 60000), "red").save(folder / "p0.png")
    own = own_groups(read_folder(settings(folder)))[0].prompt.meta["own"]["1"]
    assert tuple(Source(folder).fitted(own, [(64, 64)]).shape) == (3, 64, 64)


def test_a_picture_that_changed_after_it_was_listed_is_not_taken(folder: Path) -> None:
    wanted = settings(folder)
    group = own_groups(read_folder(wanted))[0]
    picture(folder / "p0.png", colour="white")
    sizes = bucket_sizes(wanted, SQUARE)
    with pytest.raises(IntegrityError, match="changed after it was listed"):
        Source(folder).fitted(group.prompt.meta["own"]["1"], sizes)
    (folder / "p0.png").unlink()
    with pytest.raises(IntegrityError, match="not there any more"):
        Source(folder).fitted(group.prompt.meta["own"]["1"], sizes)


def test_a_picture_under_another_name_is_the_same_picture(folder: Path) -> None:
    wanted = settings(folder)
    before = read_folder(wanted)
    own = own_groups(before)[0].prompt.meta["own"]["1"]
    (folder / "p0.png").rename(folder / "a0.png")
    (folder / "p0.txt").rename(folder / "a0.txt")
    after = read_folder(wanted)
    assert after.digest == before.digest
    assert changes(listing(before), listing(after)) == ""
    assert Source(folder).fitted(own, [(64, 64)])[:, 0, 0].tolist() == [255, 0, 0]


def test_what_changed_in_a_folder_is_said(folder: Path) -> None:
    before = listing(read_folder(settings(folder)))
    picture(folder / "p1.png", colour="black")
    (folder / "p2.txt").write_text("a green circle")
    (folder / "p0.png").rename(folder / "p9.png")
    picture(folder / "p9.png", colour="white")
    (folder / "p9.txt").write_text("new")
    said = changes(before, listing(read_folder(settings(folder))))
    assert said == ("1 gone (p0.png); 1 new (p9.png); 1 with other pixels (p1.png); 1 with another caption (p2.png)")


def test_weights_change_the_digest_and_not_the_content(folder: Path) -> None:
    def read(weight: float) -> OwnFolder:
        write_metadata(folder, [{"file_name": f"p{i}.png", "text": "x", "weight": weight} for i in range(3)])
        return read_folder(settings(folder))

    one, two = read(1.0), read(2.0)
    assert one.content == two.content
    assert one.digest != two.digest


def test_buckets_suit_the_unet_and_never_exceed_what_is_drawn() -> None:
    assert side_multiple({"block_out_channels": [320, 640, 1280]}, 8) == 32
    sizes = bucket_sizes(ImagesSettings(bucket_step_px=8), SQUARE, 32)
    assert all(width % 32 == height % 32 == 0 for width, height in sizes)
    with pytest.raises(ConfigError, match="step is larger"):
        bucket_sizes(ImagesSettings(bucket_step_px=128), SQUARE, 32)
