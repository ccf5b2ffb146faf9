"""Which pictures and which texts a command line means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from craft_fast.errors import ConfigError, UsageError
from craft_fast.picture_folders import Found, find_pictures, give_prompts


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names(found: Found) -> list[str]:
    return [picture.name for picture in found.pictures]


def texts(found: Found) -> dict[str, tuple[str, ...]]:
    return {picture.name: picture.prompts for picture in found.pictures}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- pictures


def test_a_folder_is_looked_through_in_natural_order(folder: Path) -> None:
    touch(folder, "p/10.png", "p/9.PNG", "p/b/2.webp", "p/b/11.jpeg", "p/a.jpg", "p/notes.txt", "p/x.gif")
    touch(folder, "p/.hidden.png", "p/.cache/1.png", "p/._9.png")
    assert names(find_pictures(["p"])) == ["9.PNG", "10.png", "a.jpg", "b/2.webp", "b/11.jpeg"]


def test_names_are_below_the_folder_that_all_arguments_share(folder: Path) -> None:
    touch(folder, "all/one/1.png", "all/two/1.png")
    found = find_pictures(["all/one", folder / "all/two/1.png"])
    assert names(found) == ["one/1.png", "two/1.png"]
    assert found.folder == folder / "all"
    os.chdir(folder / "all/one")
    assert names(find_pictures([".", "../two"])) == ["one/1.png", "two/1.png"]


def test_a_file_is_taken_once_and_as_it_is_named(folder: Path) -> None:
    touch(folder, "a.png", ".hidden.png", "odd.bin")
    found = find_pictures(["odd.bin", "a.png", ".", ".hidden.png", folder / "a.png"])
    assert names(found) == ["odd.bin", "a.png", ".hidden.png"]


def test_captions_of_a_shells_star_are_no_pictures(folder: Path) -> None:
    touch(folder, "a.png", "b.jpg")
    (folder / "a.txt").write_text("a cat")
    (folder / "b.caption").write_text("a dog")
    found = find_pictures(["a.png", "a.txt", "b.caption", "b.jpg"])
    give_prompts(found)
    assert texts(found) == {"a.png": ("a cat",), "b.jpg": ("a dog",)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", 'note,image,caption\n,p/b.png,a dog\n,p/a.png,"a cat,\nsitting"\n'),
        ("list.tsv", 'file\tprompt\np/b.png\ta dog\np/a.png\t"a cat,\nsitting"\n'),
        (
            "list.jsonl",
            '\ufeff{"path": "p/b.png", "text": "a dog"}\n\n{"path": "p/a.png", "text": "a cat,\\nsitting"}\n',
        ),
        ("list.json", '{"p/b.png": "a dog", "p/a.png": ["a cat,\\nsitting"]}'),
        ("list.json", '[{"image": "p/b.png", "prompt": "a dog"}, {"image": "p/a.png", "prompt": "a cat,\\nsitting"}]'),
    ],
)
def test_a_list_names_pictures_beside_it(folder: Path, name: str, content: str) -> None:
    touch(folder, "l/p/a.png", "l/p/b.png")
    (folder / "l" / name).write_text(content, encoding="utf-8")
    found = find_pictures([f"l/{name}"])
    give_prompts(found)
    assert names(found) == ["p/b.png", "p/a.png"]
    assert texts(found) == {"p/b.png": ("a dog",), "p/a.png": ("a cat,\nsitting",)}
    assert found.sources == [Path(f"l/{name}")]
    give_prompts(found, prompts=["for all"])
    assert texts(found) == {"p/b.png": ("for all",), "p/a.png": ("for all",)}


def test_what_is_not_there_is_a_usage_error(folder: Path) -> None:
    touch(folder, "pictures/a.png", "nothing/a.gif")
    with pytest.raises(UsageError, match="did you mean pictures"):
        find_pictures(["pcitures"])
    with pytest.raises(UsageError, match="No picture was found"):
        find_pictures(["nothing"])
    with pytest.raises(UsageError):
        find_pictures(["gone/at/all.png"])


def test_links_in_a_circle_end(folder: Path) -> None:
    touch(folder, "p/a.png")
    (folder / "p/again").symlink_to(folder / "p")
    (folder / "p/linked.png").symlink_to("a.png")
    (folder / "p/broken.png").symlink_to("gone.png")
    os.mkfifo(folder / "p/pipe.png")
    assert names(find_pictures(["p"])) == ["a.png", "linked.png"]


def test_names_that_are_not_utf_8_are_found(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/\xff\x1b.png", "wb") as file:
        file.write(b"x")
    assert names(find_pictures([str(folder)])) == ["\udcff\x1b.png"]


# ---- texts


def test_prompts_are_for_all_each_once(folder: Path) -> None:
    touch(folder, "a.png", "b.png")
    (folder / "a.txt").write_text("not this")
    found = find_pictures(["."])
    give_prompts(found, prompts=["one", "", "one", "=1+1"])
    assert texts(found) == dict.fromkeys(["a.png", "b.png"], ("one", "", "=1+1"))


def test_captions_find_their_pictures_by_path_or_by_a_name_that_is_the_only_one(folder: Path) -> None:
    touch(folder, "p/one/a.png", "p/two/a.png", "p/two/b.png", "p/c.png", "p/d.png")
    lines = ["image,prompt", "one/a.png,first", "p/two/a.png,second", "b.png,third", "b.png,fourth", "b.png,third"]
    lines += [f"{folder}/p/c.png,fifth", "./d.png,sixth", "e.png,lost"]
    (folder / "captions.csv").write_text("\n".join(lines))
    found = find_pictures(["p"])
    give_prompts(found, captions=Path("captions.csv"))
    assert texts(found) == {
        "c.png": ("fifth",), "d.png": ("sixth",), "one/a.png": ("first",), "two/a.png": ("second",),
        "two/b.png": ("third", "fourth"),
    }  # fmt: skip
    assert found.notes == ["1 captions belong to none of the pictures: 'e.png'"]
    (folder / "captions.csv").write_text("image,prompt\na.png,which?\n")
    with pytest.raises(ConfigError, match=r"captions.csv, line 2[\s\S]*2 pictures are named 'a.png'"):
        give_prompts(find_pictures(["p"]), captions=Path("captions.csv"))


def test_texts_beside_pictures_are_those_of_kohya_and_of_imagefolder(folder: Path) -> None:
    touch(folder, "p/a.png", "p/b.png", "p/sub/c.png", "p/sub/d.png", "p/e.png", "p/f.png")
    (folder / "p/a.txt").write_text("  a cat\n", encoding="utf-8-sig")
    (folder / "p/f.txt").write_text("\n")
    rows = [("a.png", "not this"), ("b.png", "a dog"), ("sub/c.png", "a bird"), ("b.png", "a hound")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "p/metadata.jsonl").write_text("\n".join(lines))
    (folder / "p/sub/metadata.csv").write_text("file_name,text\nd.png,a fish\n")
    (folder / "metadata.csv").write_text("file_name,text\np/e.png,above what was given\n")
    found = find_pictures(["p"])
    give_prompts(found, needed=False)
    assert texts(found) == {
        "a.png": ("a cat",), "b.png": ("a dog", "a hound"), "e.png": ("",), "f.png": ("",),
        "sub/c.png": ("a bird",), "sub/d.png": ("a fish",),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="2 of 6 pictures do not have a text") as caught:
        give_prompts(find_pictures(["p"]))
    assert caught.value.where == "e.png, f.png"
    assert "--prompt TEXT" in caught.value.hint


def test_missing_texts_name_the_first_few(folder: Path) -> None:
    touch(folder, *(f"{n}.png" for n in range(9)))
    with pytest.raises(ConfigError, match="No picture has a text") as caught:
        give_prompts(find_pictures(["."]))
    assert caught.value.where == "0.png, 1.png, 2.png, 3.png, 4.png and 4 more"


def test_texts_come_one_way(folder: Path) -> None:
    touch(folder, "a.png")
    with pytest.raises(UsageError, match="not from both"):
        give_prompts(find_pictures(["."]), prompts=["x"], captions=Path("c.csv"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.csv", b"name,caption\na.png,x\n", "found the columns name, caption"),
        ("c.csv", b"image,prompt\na.png\n", "line 2"),
        ("c.csv", b"image,prompt\na.png,\xff\n", "not UTF-8"),
        ("c.csv", b"\xff\xfei\x00", "UTF-16"),
        ("c.csv", b"image,prompt\na.png,a\x00b\n", "NUL"),
        ("c.jsonl", b'{"image": "a.png", "prompt": "a\\u0000b"}', "NUL"),
        ("c.jsonl", b'{"image": "a.png", "prompt": "\\ud800"}', "not UTF-8"),
        ("c.jsonl", b'{"image": "a.png", "prompt": "x"}\n{"image": 3}', "line 2"),
        ("c.jsonl", b'{"image": "a.png", "prompt": "x"}\n["a.png"]', "found a list"),
        ("c.jsonl", b'\n{"image": ', "line 2"),
        ("c.json", b"[" * 100_000, "nested too deeply"),
        ("c.json", b'{"a.png": 3}', "is a int"),
        ("c.txt", b"a.png x", "found .txt; allowed: .csv"),
        ("gone.csv", None, "no such file"),
    ],
)
def test_captions_that_cannot_be_read_say_why(folder: Path, name: str, content: bytes | None, said: str) -> None:
    touch(folder, "a.png")
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        give_prompts(find_pictures(["a.png"]), captions=Path(name))
    assert said in str(caught.value)


def test_a_giant_or_a_binary_caption_is_refused(folder: Path) -> None:
    touch(folder, "a.png")
    with open(folder / "a.txt", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(ConfigError, match="larger than"):
        give_prompts(find_pictures(["a.png"]))
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"a.txt, line 1[\s\S]*byte 4"):
        give_prompts(find_pictures(["a.png"]))


def test_a_text_of_any_length_and_content_stays_as_it_is(folder: Path) -> None:
    touch(folder, "a.png")
    wild = "=cmd()\t\x1b[31m\u2028\x85 'q' \"q\", \u202e" + "word " * 40_000
    (folder / "c.jsonl").write_text(json.dumps({"image": "a.png", "prompt": wild}))
    found = find_pictures(["a.png"])
    give_prompts(found, captions=Path("c.jsonl"))
    assert found.pictures[0].prompts == (wild,)
    quoted = wild.replace('"', '""')
    (folder / "c.csv").write_text(f'image,prompt\na.png,"{quoted}"\n', encoding="utf-8", newline="")
    found = find_pictures(["a.png"])
    give_prompts(found, captions=Path("c.csv"))
    assert found.pictures[0].prompts == (wild,)
