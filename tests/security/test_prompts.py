"""Hostile prompt files: each is a clear rejection or error, and no prompt becomes anything but text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craft_fast.config import PromptSettings
from craft_fast.errors import ConfigError
from craft_fast.expanders.template import TemplateExpander
from craft_fast.prompts import read_prompts

PLAIN = PromptSettings(heldout_file=None)


def reason(tmp_path: Path, line: bytes) -> str:
    path = tmp_path / "p.txt"
    path.write_bytes(b"good prompt\n" + line + b"\nother prompt\n")
    found = read_prompts(path, PLAIN)
    assert [p.text for p in found.prompts] == ["good prompt", "other prompt"]
    assert [r.line for r in found.rejections] == [2]
    assert found.rejections[0].excerpt.isprintable()
    return found.rejections[0].reason


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"caf\xe9", "not UTF-8"),
        (b"over\xc0\xaflong", "not UTF-8"),
        (b"surrogate \xed\xa0\x80", "not UTF-8"),
        (b"nul\x00byte", "NUL byte at byte 4"),
        (b"\x1b[2Jcleared", "control character U+001B"),
        (b"bell\x07", "control character U+0007"),
        (b"del\x7f", "control character U+007F"),
        (b"carriage\rreturn", ""),
        ("rtl \u202eoverride".encode(), "control character U+202E"),
        (b"x" * 3000, "3,000 characters; at most 2,000"),
        (b"y" * 1_000_000, "line of 1,000,001 bytes"),
        (b"z " * 40_000, "line of 80,001 bytes"),
    ],
)
def test_lines_that_are_not_prompts_are_rejected_with_line_and_reason(tmp_path: Path, line: bytes, said: str) -> None:
    if said:
        assert said in reason(tmp_path, line)
    else:  # a bare CR is white space inside a line, and white space is collapsed
        path = tmp_path / "p.txt"
        path.write_bytes(line)
        assert [p.text for p in read_prompts(path, PLAIN).prompts] == ["carriage return"]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "CON",
        "=HYPERLINK(1)",
        "{{7*7}}",
        "%n%s",
        "{prompt} {0.__class__}",
        "'; DROP TABLE candidates; --",
        "\u05e9\u05dc\u05d5\u05dd \u200fshalom",
    ],
)
def test_texts_that_look_like_code_stay_the_same_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(text, encoding="utf-8")
    [prompt] = read_prompts(path, PLAIN).prompts
    assert prompt.text == text
    assert prompt.prompt_id.isalnum()
    [expansion] = TemplateExpander(["{prompt}, sharp", "clean {prompt}"], {}).expand([prompt], 2, 0)
    assert set(expansion.variants) == {f"{text}, sharp", f"clean {text}"}


def test_marks_and_line_ends_of_other_systems_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    found = read_prompts(path, PLAIN)
    assert ([p.text for p in found.prompts], found.rejected) == (["a cat", "a dog"], 0)


def test_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("a cat".encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        read_prompts(path, PLAIN)


def test_when_nothing_is_left_it_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfa\n\x00\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, PLAIN)
    assert caught.value.exit_code == 3
    assert "line 1: not UTF-8" in caught.value.why
    assert "line 2: NUL" in caught.value.why


@pytest.mark.parametrize("where", ["/dev/zero", "/", "/no/such/file.txt"])
def test_devices_folders_and_missing_files_are_refused(where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(where, PLAIN)
    assert caught.value.exit_code == 3


def test_a_hundred_thousand_bad_lines_keep_a_short_report(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\n" * 100_000 + b"good\n")
    found = read_prompts(path, PLAIN)
    assert (found.rejected, len(found.rejections), len(found.notes())) == (100_000, 1000, 7)


def test_deeply_nested_json_and_endless_numbers_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("[" * 30_000 + "\n" + '{"prompt": "a", "n": ' + "9" * 6000 + "}\n" + '"\\ud800"\n"fine"\n')
    found = read_prompts(path, PLAIN)
    assert [p.text for p in found.prompts] == ["fine"]
    assert [r.line for r in found.rejections] == [1, 2, 3]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), suffix=st.sampled_from([".txt", ".csv", ".tsv", ".jsonl"]))
def test_any_bytes_are_read_or_refused_in_the_same_two_ways(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes((b"prompt\tx\n" if suffix == ".tsv" else b"prompt,x\n" if suffix == ".csv" else b"") + data)
    try:
        found = read_prompts(path, PLAIN)
    except ConfigError:
        return
    for prompt in found.prompts:
        assert prompt.text == " ".join(prompt.text.split())
        assert not any(ord(c) < 32 or ord(c) == 127 for c in prompt.text)
    for rejection in found.rejections:
        assert rejection.line >= 1
        assert rejection.reason
        assert rejection.excerpt.isprintable()
        assert rejection.reason.isprintable()
