"""Reading prompts: formats, cleaning, repetitions, words, and the held-out share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from craft_fast.config import PromptSettings
from craft_fast.errors import ConfigError
from craft_fast.prompts import PromptFile, load_prompts, load_vocabulary, read_prompts

PLAIN = PromptSettings(heldout_file=None)


def read(tmp_path: Path, name: str, content: str | bytes, settings: PromptSettings = PLAIN) -> PromptFile:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path, settings)


def texts(found: PromptFile) -> list[str]:
    return [prompt.text for prompt in found.prompts]


def test_text_is_one_prompt_a_line_with_line_numbers(tmp_path: Path) -> None:
    found = read(tmp_path, "p.txt", "a red circle\n\n  two   blue\tsquares \n")
    assert texts(found) == ["a red circle", "two blue squares"]
    assert [prompt.line for prompt in found.prompts] == [1, 3]
    assert found.rejected == 0


def test_repetitions_are_left_out_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path, "p.txt", "a cat\na  cat\nA cat\na cat \n")
    assert texts(found) == ["a cat", "A cat"]
    assert found.duplicates == 2
    assert found.notes() == ["p.txt: 2 repeated prompts left out"]


def test_composed_and_decomposed_letters_are_one_prompt(tmp_path: Path) -> None:
    found = read(tmp_path, "p.txt", "caf\u00e9\ncafe\u0301\n")
    assert (texts(found), found.duplicates) == (["caf\u00e9"], 1)


def test_csv_takes_the_prompt_column_quotes_and_line_breaks(tmp_path: Path) -> None:
    found = read(tmp_path, "p.csv", 'id,Prompt,style\n1,"a ""big"" dog, running",photo\n2,"two\nlines",x\n3,last,y\n')
    assert texts(found) == ['a "big" dog, running', "two lines", "last"]
    assert [prompt.line for prompt in found.prompts] == [2, 3, 5]
    assert found.prompts[0].meta == {"id": "1", "style": "photo"}


def test_csv_rows_that_are_short_or_bad_are_rejected_with_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, "p.csv", b"id,prompt\n1\n2,good\n3,b\xffd\n4,\n")
    assert texts(found) == ["good"]
    assert [(r.line, r.reason) for r in found.rejections] == [
        (2, "1 columns, the prompt is in column 2"),
        (4, "not UTF-8: invalid start byte at byte 4"),
        (5, "empty"),
    ]


def test_a_quote_that_never_ends_is_said_where_it_opened(tmp_path: Path) -> None:
    found = read(tmp_path, "p.csv", "prompt\nfirst\n" + '"open\n' + "more\n" * 200)
    assert texts(found) == ["first"]
    assert found.rejections[0].line == 3
    assert "a quote opened here takes in 201 lines" in found.rejections[0].reason


def test_tsv_takes_quotes_inside_a_text_as_they_are(tmp_path: Path) -> None:
    found = read(tmp_path, "p.tsv", 'Prompt\tCategory\na sign "STOP"\tx\n"START" in red\ty\n"all ""of"" it"\tz\n')
    assert texts(found) == ['a sign "STOP"', '"START" in red', 'all "of" it']
    assert found.prompts[0].meta == {"category": "x"}


def test_a_table_without_a_prompt_column_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column of prompts") as caught:
        read(tmp_path, "p.csv", "id,words\n1,a cat\n")
    assert "id, words" in caught.value.why
    assert caught.value.exit_code == 3


def test_jsonl_takes_texts_and_objects_and_rejects_the_rest(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a bench", "tag": "single", "include": [1]}',
        '"a cow"',
        '{"caption": "c"}',
        "{",
        "[1]",
        '{"a": 1}',
    ]
    found = read(tmp_path, "p.jsonl", "\n".join(lines))
    assert texts(found) == ["a bench", "a cow", "c"]
    assert found.prompts[0].meta == {"tag": "single"}
    assert [r.line for r in found.rejections] == [4, 5, 6]


def test_unread_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind that is not read"):
        read(tmp_path, "p.parquet", "x")


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="empty") as caught:
        read(tmp_path, name, "\n \n")
    assert caught.value.exit_code == 3


# ---- the model's words


@pytest.fixture
def words(tmp_path: Path) -> PromptSettings:
    path = tmp_path / "words.json"
    path.write_text(json.dumps(["a", "red", "circle", "on", ","]))
    return PromptSettings(heldout_file=None, vocabulary=str(path))


def test_a_line_with_unknown_words_is_rejected_and_they_are_named(tmp_path: Path, words: PromptSettings) -> None:
    found = read(tmp_path, "p.txt", "a Red circle, a circle\na purple dragon\n", words)
    assert texts(found) == ["a Red circle, a circle"]
    assert found.rejections[0].reason == "unknown words: dragon, purple"
    assert found.rejections[0].line == 2
    assert "  known words: a, circle, on, red" in found.notes()
    assert not any("known words" in note for note in read(tmp_path, "q.txt", "a red circle\n", words).notes())


def test_only_unknown_words_is_an_error_with_lines_and_the_known_words(tmp_path: Path, words: PromptSettings) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "p.txt", "a dragon\na wizard\n", words)
    assert "dragon (line 1), wizard (line 2)" in caught.value.why
    assert "a, circle, on, red" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[1, 2]"])
def test_a_broken_vocabulary_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="vocabulary"):
        load_vocabulary(str(path))


# ---- train and held out


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_the_held_out_share_is_a_function_of_each_text(tmp_path: Path) -> None:
    lines = [f"picture number {i}" for i in range(1000)]
    first = load_prompts(PromptSettings(file=write_lines(tmp_path / "a.txt", lines), heldout_file=None))
    assert 150 < len(first.heldout) < 250
    assert len(first.train) + len(first.heldout) == 1000
    assert all(prompt.split == "heldout" for prompt in first.heldout)
    more = [*reversed(lines), *(f"other {i}" for i in range(50))]
    second = load_prompts(PromptSettings(file=write_lines(tmp_path / "b.txt", more), heldout_file=None))
    assert {p.text for p in first.heldout} <= {p.text for p in second.heldout}


def test_a_handful_of_prompts_still_holds_one_out(tmp_path: Path) -> None:
    for n in (2, 3, 5):
        path = write_lines(tmp_path / "a.txt", [f"p{i}" for i in range(n)])
        found = load_prompts(PromptSettings(file=path, heldout_file=None, heldout_share=0.01))
        assert (len(found.train), len(found.heldout)) == (n - 1, 1)


def test_no_share_holds_nothing_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", ["x", "y"])
    found = load_prompts(PromptSettings(file=path, heldout_file=None, heldout_share=0.0))
    assert (len(found.train), len(found.heldout)) == (2, 0)


def test_overlap_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.txt", ["a", "b", "c"])
    held = write_lines(tmp_path / "held.txt", ["b", "d"])
    found = load_prompts(PromptSettings(file=train, heldout_file=held))
    assert [p.text for p in found.train] == ["a", "b", "c"]
    assert [(p.text, p.split) for p in found.heldout] == [("d", "heldout")]
    assert any("1 held-out prompts are also training prompts" in note for note in found.notes)


def test_all_overlapping_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", ["x"])
    with pytest.raises(ConfigError, match="No held-out prompt"):
        load_prompts(PromptSettings(file=path, heldout_file=path))


def test_all_held_out_by_share_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", [text for text in map(str, range(50)) if _held_out(text)][:1])
    with pytest.raises(ConfigError, match="No training prompt"):
        load_prompts(PromptSettings(file=path, heldout_file=None, heldout_share=0.9))


def _held_out(text: str) -> bool:
    digest = hashlib.sha256(b"heldout\0" + text.encode()).digest()
    return int.from_bytes(digest[:6], "big") < 0.9 * 2**48


def test_the_limit_is_on_training_prompts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", [f"p{i}" for i in range(100)])
    found = load_prompts(PromptSettings(file=path, heldout_file=None, limit=5))
    assert len(found.train) == 5
    assert len(found.heldout) > 5


def test_reading_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, craft_fast.prompts, craft_fast.settings_io, craft_fast.expanders, craft_fast.filtering;"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_tiny_presets_own_prompts_and_their_variants_are_in_its_words(tmp_path: Path) -> None:
    from craft_fast.expanders import build_groups, make_expander
    from craft_fast.settings_io import load_settings

    settings = load_settings()
    sets = load_prompts(settings.prompts)
    assert sets.notes == ()
    expander = make_expander(settings.expand, cache_dir=tmp_path)
    result = build_groups(sets.train, expander, settings.expand.variants, 0)
    assert result.dropped == ()
    path = tmp_path / "variants.txt"
    path.write_text("\n".join(v.text for group in result.groups for v in group.variants[1:]))
    found = read_prompts(path, settings.prompts)
    assert found.rejected == 0
    assert len(found.prompts) + found.duplicates == len(sets.train) * settings.expand.variants
