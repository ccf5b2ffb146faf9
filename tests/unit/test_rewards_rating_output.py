"""Scores as files that any reader reads back, and as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from craft_fast.errors import EnvironmentProblem, UsageError
from craft_fast.picture_folders import Picture
from craft_fast.records import Provenance
from craft_fast.rewards.memory import Judgement
from craft_fast.rewards.rating import Judge, Rating, ScoredRow
from craft_fast.rewards.rating_output import (
    COLUMNS,
    check_output,
    choose_format,
    chunks,
    shortest,
    summary,
    wide_table,
    write_scores,
)

HOSTILE = [
    "=HYPERLINK(1)", "+1", "-1", "@x", 'quote " and, comma', "two\nlines", "\r alone", "\r\n", "tab\tand ; |", "",
    "\x1b[31m\x1b]0;title\x07", "\x9b31m \x7f \x85", "\u2028\u2029\u202e", " ends ", "'", "emoji 🦊", "x" * 100_000,
]  # fmt: skip
PROVENANCE = Provenance("native", "c" * 64, "pil-bicubic/crop-floor/224", "clip-bpe/77", "float32", "a, note")


def rated(scores: Sequence[Sequence[float]], prompts: Sequence[str], names: Sequence[str] = ()) -> Rating:
    """A rating in which line i has ``scores[i]``, one for each reward."""
    judges = [Judge(f"r{at}", at == 1, PROVENANCE) for at in range(len(scores[0]) if scores else 0)]
    rating = Rating(judges)
    for at, (line, prompt) in enumerate(zip(scores, prompts, strict=True)):
        name = names[at] if names else f"{at}.png"
        for judge, score in zip(judges, line, strict=True):
            rating.rows.append(
                ScoredRow(Picture(name, Path(name)), "a" * 64, prompt, judge, Judgement(score, at, 640, 480))
            )
    return rating


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_hostile_texts_and_names_come_back_as_they_were(tmp_path: Path, form: str) -> None:
    rating = rated([[0.5, -1.25]] * len(HOSTILE), HOSTILE, [f"dir/{text[:50]}.png" for text in HOSTILE])
    path = tmp_path / f"scores.{form}"
    write_scores(path, rating.rows, form)
    if form == "csv":
        with path.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
    elif form == "jsonl":
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        found = json.loads(path.read_bytes())
    assert [row["prompt"] for row in found[::2]] == HOSTILE
    assert [row["image"] for row in found[1::2]] == [f"dir/{text[:50]}.png" for text in HOSTILE]
    assert [float(row["score"]) for row in found[:2]] == [0.5, -1.25]
    first = found[1] | {"prompt": "", "image": ""}
    plain = {
        "image": "", "image_sha256": "a" * 64, "width_px": 640, "height_px": 480, "prompt": "", "reward": "r1",
        "score": -1.25, "held_out": True, "backend": "native", "checkpoint": "c" * 64,
        "preprocessing": "pil-bicubic/crop-floor/224", "tokenizer": "clip-bpe/77", "precision": "float32",
        "note": "a, note", "tokens_cut": 0,
    }  # fmt: skip
    assert tuple(found[0]) == COLUMNS
    assert first == (plain if form != "csv" else {k: str(v) if v is not True else "true" for k, v in plain.items()})


def test_json_drives_no_terminal() -> None:
    text = "".join(chunks(rated([[0.5]] * len(HOSTILE), HOSTILE).rows, "jsonl"))
    assert not set(text) & {chr(c) for c in (*range(10), *range(11, 32), *range(127, 160), 0x2028, 0x2029, 0x202E)}


def test_a_name_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    rating = rated([[0.5]], ["x"], ["\udcff.png"])
    for form in ("csv", "json"):
        write_scores(tmp_path / form, rating.rows, form)
    assert json.loads((tmp_path / "json").read_bytes())[0]["image"] == "\udcff.png"
    assert b"\\udcff.png" in (tmp_path / "csv").read_bytes()


def test_without_rows_the_files_are_whole() -> None:
    assert json.loads("".join(chunks([], "json"))) == []
    assert list(csv.reader(io.StringIO("".join(chunks([], "csv"))))) == [list(COLUMNS)]
    assert "".join(chunks([], "jsonl")) == ""


def test_scores_have_the_digits_of_a_float32() -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(size=500), 10.0 ** draw.uniform(-30, 30, 500)]).astype(np.float32)
    for value in values:
        assert np.float32(shortest(float(value))) == value
        assert len(f"{shortest(float(value))!r}".lstrip("-").replace(".", "").partition("e")[0].strip("0")) <= 9
    assert repr(shortest(float(np.float32(0.1)))) == "0.1"


def test_the_best_mean_rank_comes_first() -> None:
    rating = rated([[1.0, 5.0], [3.0, 4.0], [2.0, 5.0], [0.0, 9.0]], ["x"] * 4)
    cells = wide_table(rating)
    assert cells[0] == ["image", "r0", "r1", "mean rank"]
    assert [(row[0], row[-1]) for row in cells[1:]] == [
        ("2.png", "2.2"), ("1.png", "2.5"), ("3.png", "2.5"), ("0.png", "2.8"),
    ]  # fmt: skip
    assert cells[1][1:3] == ["2.0000", "5.0000"]


def test_a_table_is_short_and_harmless() -> None:
    rating = rated(
        [[float(n)] for n in range(200)], [f"{n}\n\x1b[31m" + "y" * 90 for n in range(200)], ["n" * 90] * 200
    )
    cells = wide_table(rating)
    assert len(cells) == 51
    assert cells[0] == ["image", "prompt", "r0", "mean rank"]
    assert cells[1][1].startswith("199\\x0a\\x1b[31myyy")
    assert max(len(cell) for row in cells for cell in row) < 60


def test_the_summary_counts_texts_that_were_cut() -> None:
    first, second = summary(rated([[1.0, 0.1], [2.0, 0.2], [6.0, 0.3]], ["a", "b", "b"]))
    assert {key: first[key] for key in ("reward", "held_out", "n", "mean", "min", "max", "texts_cut", "precision")} == {
        "reward": "r0", "held_out": False, "n": 3, "mean": 3.0, "min": 1.0, "max": 6.0, "texts_cut": 1,
        "precision": "float32",
    }  # fmt: skip
    assert (second["held_out"], second["max"]) == (True, 0.3)
    assert summary(Rating([Judge("r", False, PROVENANCE)]))[0]["mean"] is None


@pytest.mark.parametrize(
    ("output", "wanted", "form"),
    [
        (None, None, "csv"), ("-", None, "csv"), ("-", "json", "json"), ("a.JSON", None, "json"),
        ("a.jsonl", "csv", "csv"),
    ],
)  # fmt: skip
def test_the_format_follows_the_name(output: str | None, wanted: str | None, form: str) -> None:
    assert choose_format(output, wanted) == form


@pytest.mark.parametrize(("output", "wanted"), [("a.xlsx", None), ("a.csv", "xml")])
def test_another_format_is_refused(output: str, wanted: str | None) -> None:
    with pytest.raises(UsageError, match="csv, jsonl, json"):
        choose_format(output, wanted)


def test_a_file_that_cannot_be_written_is_found_out_before(tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("image,prompt\n")
    (tmp_path / "link.csv").symlink_to(captions)
    check_output(tmp_path / "new" / "folder" / "scores.csv", [captions])
    for path in (tmp_path, captions, tmp_path / "link.csv"):
        with pytest.raises(UsageError):
            check_output(path, [captions])
    with pytest.raises(EnvironmentProblem):
        check_output(captions / "scores.csv", [])
