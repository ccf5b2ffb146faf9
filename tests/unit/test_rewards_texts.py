"""Prompts to tokens, held against a plain byte pair encoding written out here from its published description."""

from __future__ import annotations

import itertools
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.texts import Texts, clean
from craft_fast.tiny.random_model import build_clip_tokenizer
from tests.unit.hostile_prompts import hostile_prompts

MARKS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SPEC = Preprocessing(family="clip")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_clip_tokenizer(folder, max_length=77)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import BertTokenizer

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [chr(code) for code in range(33, 127)] + [f"##{chr(code)}" for code in range(97, 123)]
    words = ["a", "red", "circle", "photo", "of", "##ing", "blue", "漢", "é"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*marks, *pieces, *words]))}
    return BertTokenizer(vocab=vocab)


# ---- the reference


def kind(letter: str) -> str:
    found = unicodedata.category(letter)[0]
    return found if found in "LN" else " " if letter.isspace() else "other"


def words_of(text: str) -> list[str]:
    """A mark, an English ending, a run of letters, one digit, or a run of what is neither; spaces part."""
    found, at = [], 0
    while at < len(text):
        # Case is ignored: a long s ends a word as an s does.
        ahead = "".join(letter.casefold() if len(letter.casefold()) == 1 else "-" for letter in text[at : at + 16])
        known = next((mark for mark in (*MARKS, *ENDINGS) if ahead.startswith(mark)), "")
        size = len(known)
        if not known and kind(text[at]) == "N":
            size = 1
        elif not known and kind(text[at]) != " ":
            while at + size < len(text) and kind(text[at + size]) == kind(text[at]):
                size += 1
        if size:
            found.append(text[at : at + size])
        at += max(size, 1)
    return found


def byte_letters() -> list[str]:
    """Bytes that print stand for themselves, the others for U+0100 on, in their order."""
    found, free = [], iter(range(256, 512))
    for byte in range(256):
        prints = "!" <= chr(byte) <= "~" or (byte > 0xA0 and byte != 0xAD)
        found.append(chr(byte) if prints else chr(next(free)))
    return found


class Reference:
    """Merges the pair that was learnt first, everywhere in the word, until no pair is known."""

    def __init__(self, tokenizer: Any) -> None:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        self.vocab: dict[str, int] = model["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.letters = byte_letters()

    def word(self, word: str) -> list[int]:
        if word in MARKS:
            return [self.vocab[MARKS[word]]]
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            known = [pair for pair in itertools.pairwise(parts) if pair in self.ranks]
            if not known:
                return [self.vocab[part] for part in parts]
            best, merged = min(known, key=lambda pair: self.ranks[pair]), []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged

    def __call__(self, prompt: str, length: int = 77, pad: str = "<|endoftext|>") -> tuple[list[int], int]:
        """Ids, and how many tokens there were before the cut."""
        start, end = (self.vocab[mark] for mark in MARKS.values())
        inner = [token for word in words_of(clean(prompt).lower()) for token in self.word(word)]
        ids = [start, *inner, end]
        if len(ids) > length:
            return [*ids[: length - 1], end], len(ids)
        return ids + [self.vocab[pad]] * (length - len(ids)), len(ids)


def assigned(prompt: str) -> str:
    """Without code points that Python's tables and the regex package's may disagree on: they differ in age."""
    return "".join(letter for letter in prompt if unicodedata.category(letter) not in ("Cn", "Co"))


def test_a_thousand_hostile_prompts_are_encoded_as_described(tokenizer: Any) -> None:
    prompts = [assigned(prompt) for prompt in hostile_prompts(1_000)]
    texts, reference = Texts(tokenizer, SPEC), Reference(tokenizer)
    cut = {}
    for prompt in prompts:
        ids, mask = texts.tokens(prompt)
        expected, length = reference(prompt)
        assert ids.tolist() == expected, ascii(prompt[:200])
        assert mask.tolist() == [1] * min(length, 77) + [0] * (77 - min(length, 77))
        if length > 77:
            cut[prompt] = length - 77
            assert ids[-1] == tokenizer.eos_token_id
    assert texts.cut == cut
    assert 100 < len(cut) < 900  # both ends are tried


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \t\n b\u00a0c ", "a b c"),
        ("&amp;amp;lt; caf&eacute;", "< café"),
        ("<b>&amp;amp;", "<b>&"),
        ("\u201cit\u2019s\u201d", '"it\'s"'),
        ("schÃ¶n", "schön"),
        ("ﬁne", "fine"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
        ("a\0b\x1b[1mc", "abc"),
        ("Keeps CASE", "Keeps CASE"),
        ("", ""),
    ],
)
def test_text_is_mended_as_open_clip_does(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned


def test_special_tokens_in_a_prompt_stay_text_but_for_open_clips_own(tokenizer: Any) -> None:
    texts, end = Texts(tokenizer, SPEC), tokenizer.eos_token_id
    places = {prompt: (texts.tokens(prompt)[0] == end).nonzero()[0].item() for prompt in ("red", "red <|endoftext|>")}
    assert places == {"red": 2, "red <|endoftext|>": 2 + 13}  # < | e n d o f t e x t | >, less the merges there are
    ids, mask = texts.tokens("red <end_of_text> circle")
    assert ids[2] == end == ids[4]
    assert int(mask.sum()) == 5


def test_the_length_that_just_fits_is_not_cut(tokenizer: Any) -> None:
    texts, end = Texts(tokenizer, SPEC), tokenizer.eos_token_id
    fits, longer = "red " * 75, "red " * 76
    assert texts.tokens(fits)[0].tolist() == texts.tokens(longer)[0].tolist()
    assert texts.tokens(fits)[0][-1] == end
    assert texts.cut == {longer: 1}


def test_padding_and_length_are_the_callers_choice(tokenizer: Any) -> None:
    spec = SPEC.model_copy(update={"max_tokens": 9})
    ids, mask = Texts(tokenizer, spec, pad_token_id=0).tokens("a red circle")
    assert (ids.dtype, mask.dtype, ids.shape) == (torch.int64, torch.int64, (9,))
    assert ids[5:].tolist() == [0] * 4
    assert ids[:5].tolist() == Texts(tokenizer, spec).tokens("a red circle")[0][:5].tolist()
    assert mask.tolist() == [1] * 5 + [0] * 4


def test_a_prefix_comes_before_every_prompt(tokenizer: Any) -> None:
    spec = SPEC.model_copy(update={"prefix": "a photo of "})
    texts = Texts(tokenizer, spec)
    assert torch.equal(texts.tokens("red")[0], Texts(tokenizer, SPEC).tokens("a photo of red")[0])
    texts.tokens("red " * 74)
    assert list(texts.cut) == ["red " * 74]


def test_a_prompt_is_encoded_once(tokenizer: Any) -> None:
    texts = Texts(tokenizer, SPEC)
    assert texts.tokens("a red circle") is texts.tokens("a red circle")


def test_a_clip_vocabulary_without_cleaning_is_transformers_own_call(tokenizer: Any) -> None:
    texts = Texts(tokenizer, SPEC.model_copy(update={"text": "plain"}))
    for prompt in ("a  Red &amp; “circle”", "red <|endoftext|> circle", "red " * 100, ""):
        expected = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=77, split_special_tokens=True, return_tensors="pt"
        )
        ids, mask = texts.tokens(prompt)
        assert torch.equal(ids, expected["input_ids"][0])
        assert torch.equal(mask, expected["attention_mask"][0])
    assert texts.cut == {"red " * 100: 25}


def long_known(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in ((0, 0x24F), (0x386, 0x481), (0x2010, 0x2044),
                                                                (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)))  # fmt: skip


def test_bert_tokens_are_transformers_own_call(bert: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = Texts(bert, Preprocessing(family="image_reward", max_tokens=35, text="plain"))
    # transformers' own call goes by older Unicode tables than image-reward, so prompts of long known letters alone.
    prompts = [prompt for prompt in hostile_prompts() if all(map(long_known, prompt))]
    assert len(prompts) > 150
    prompts += ["a [SEP] red [MASK] circle", "[PAD]", "A Photo of CIRCLEs", "^ $ + red~circle"]
    with caplog.at_level(logging.WARNING):
        for prompt in prompts:
            ids, mask = texts.tokens(prompt)
            whole = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins pairs
            shown = "".join(c for c in whole if c in "\t\n\r" or unicodedata.category(c)[0] != "C")
            expected = bert(shown, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            assert torch.equal(ids, expected["input_ids"][0]), ascii(prompt[:200])
            assert torch.equal(mask, expected["attention_mask"][0])
            assert ids[0] == bert.cls_token_id
    assert caplog.records == []
    assert texts.cut["word " * 10_000] == 4 * 10_000 + 2 - 35  # w ##o ##r ##d
    assert "" not in texts.cut
    for hidden in (
        "red\x85circle",
        "red\u200dcircle",
        "red\ue000circle",
        "red\ud800circle\0",
        "red\U0010ffffcircle\x07",
    ):
        assert torch.equal(texts.tokens(hidden)[0], texts.tokens("redcircle")[0]), ascii(hidden)
    assert not torch.equal(texts.tokens("red\ncircle")[0], texts.tokens("redcircle")[0])
    # A mark that was a letter before Unicode 9, an ideograph of the eighth block, an Arabic point of Unicode 14.
    for new, old in (("red\u1885", "red"), ("a\U0002b8c7b", "a \U0002b8c7 b"), ("red\u0898circle", "redcircle")):
        assert torch.equal(texts.tokens(new)[0], texts.tokens(old)[0]), ascii(new)


def test_the_id_follows_what_decides_the_tokens(tokenizer: Any, bert: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTokenizer

    own = Texts(tokenizer, SPEC).id
    kind_, length, text, digest = own.split("/")
    assert (kind_, length, text, len(digest)) == ("clip-bpe", "77", "open_clip", 12)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    assert Texts(CLIPTokenizer(vocab=model["vocab"], merges=merges), SPEC).id == own
    build_clip_tokenizer(tmp_path, ("purple", "elephant"), max_length=77)
    others = [
        Texts(AutoTokenizer.from_pretrained(tmp_path), SPEC).id,
        Texts(tokenizer, SPEC, pad_token_id=0).id,
        *(Texts(tokenizer, SPEC.model_copy(update=change)).id
          for change in ({"max_tokens": 32}, {"text": "plain"}, {"prefix": "A photo depicts "})),
    ]  # fmt: skip
    assert len({own, *others}) == 6
    assert Texts(bert, Preprocessing(family="image_reward", max_tokens=35, text="plain")).id.startswith(
        "bert-wordpiece/35/plain/"
    )
