"""Prompts to tokens, as the published implementations of each reward make them.

Shapes: T tokens of one prompt, start, end and padding included.

transformers' CLIP tokenizer is not open_clip's: it takes text as it comes, composes letters (NFC), lower-cases letter
by letter (a final sigma differs) and takes other marks for special. Here open_clip's own steps are done, and the
vocabulary's merges are left to the tokenizers library.
"""

from __future__ import annotations

import hashlib
import html
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import ftfy
import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor

from craft_fast.rewards.base import Preprocessing

# What open_clip takes for its start and end where a prompt writes it; CLIP's own <|endoftext|> is plain text to it.
_MARKS = ("<start_of_text>", "<end_of_text>")
# CLIP's words: a mark, an English ending, a run of letters, one digit, a run of anything else that is not space.
_WORDS = regex.compile(
    "|".join([*_MARKS, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+"]),
    regex.IGNORECASE,
)


def clean(text: str) -> str:
    """Mend a prompt as open_clip does before its BPE: ftfy, HTML entities twice, whitespace to single spaces.

    Lower-casing comes after it. Lone surrogates, which no encoding can hold, become U+FFFD.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


# What BERT's published tokenizer takes for a word by itself: CJK ideographs.
_IDEOGRAPHS = regex.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def _bert_words(text: str) -> str:
    """Text as BERT's published tokenizer has it before its word pieces; uncased, special tokens apart.

    Lower case, what does not show left out (control, format, private, unassigned), ideographs and punctuation apart,
    accents taken off. The tokenizers library does these steps by other Unicode tables than Python's, which
    image-reward goes by: of 1,000 hostile prompts 259 had other tokens than the package gives them, here none has.
    """
    category = unicodedata.category
    shown = [letter for letter in text.lower() if letter in "\t\n\r" or category(letter)[0] != "C"]
    parted = _IDEOGRAPHS.sub(r" \g<0> ", "".join(" " if category(letter) == "Zs" else letter for letter in shown))
    bare = [letter for letter in unicodedata.normalize("NFD", parted) if category(letter) != "Mn"]
    return "".join(f" {letter} " if _is_punctuation(letter) else letter for letter in bare)


def _is_punctuation(letter: str) -> bool:
    # Of ASCII all that is neither letter, digit nor space, such as $ and ^, which Unicode counts as symbols.
    ascii_mark = "!" <= letter <= "~" and not letter.isalnum()
    return ascii_mark or unicodedata.category(letter)[0] == "P"


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary: its own, or one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_LETTERS = _byte_letters()


class Texts:
    """A reward's tokenizer; every prompt is tokenised once.

    Where the spec's text is open_clip and the vocabulary is CLIP's kind, tokens are open_clip's: special tokens written
    in a prompt stay text, but for open_clip's own ``<start_of_text>`` and ``<end_of_text>``. Where it is plain, they
    are those of transformers' call, and CLIP's special tokens stay text too; BERT's do not, and characters that do
    not show are left out, as by image-reward.

    Args:
        tokenizer: of transformers.
        spec: max_tokens, text and prefix of the reward.
        pad_token_id: fills up short prompts; None: the tokenizer's own, else its end token.

    Attributes:
        id: kind, length, cleaning and digest of vocabulary and padding, for ``Provenance.tokenizer``.
        cut: prompts that were too long, and how many of their tokens were lost.
    """

    def __init__(self, tokenizer: Any, spec: Preprocessing, *, pad_token_id: int | None = None) -> None:
        self.cut: dict[str, int] = {}
        self._tokenizer = tokenizer
        self._spec = spec
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        own = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = int(pad_token_id if pad_token_id is not None else own if own is not None else 0)
        parts = _parts(tokenizer)
        self._clip, self._wordpiece = _is_clip(parts), parts["type"] == "WordPiece"
        self._uncased = self._wordpiece and bool((parts.get("normalizer") or {}).get("lowercase"))
        self.id = self._name(parts)

    def tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Tokenise a prompt.

        Args:
            prompt: any text.

        Returns:
            Token ids and mask (1 for start, prompt and end, 0 for padding), int64 [T] each, T the spec's max_tokens.
        """
        if prompt not in self._tokens:
            self._tokens[prompt] = self._tokenise(prompt)
        return self._tokens[prompt]

    def _tokenise(self, prompt: str) -> tuple[Tensor, Tensor]:
        text, length = self._spec.prefix + prompt, self._spec.max_tokens
        if self._spec.text == "open_clip":
            text = clean(text)
        found = self._open_clip(text) if self._clip and self._spec.text == "open_clip" else self._plain(text)
        if len(found) > length:
            self.cut[prompt] = len(found) - length
            found = self._cut(found, text)
        ids = torch.full((length,), self._pad, dtype=torch.int64)
        ids[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids, (torch.arange(length) < len(found)).to(torch.int64)

    def _open_clip(self, text: str) -> list[int]:
        """Start, the text's tokens and end, of any length."""
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        merge = self._tokenizer.backend_tokenizer.model.tokenize
        found = [start]
        for word in _WORDS.findall(text.lower()):
            if word in _MARKS:
                found.append(start if word == _MARKS[0] else end)
            else:
                found += [token.id for token in merge("".join(_LETTERS[byte] for byte in word.encode()))]
        return [*found, end]

    def _plain(self, text: str, **more: Any) -> list[int]:
        """What transformers' own call gives; ``more`` says how it is cut."""
        sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no lone surrogates
        if self._uncased:
            # Special tokens stay as they are; every second part is one.
            marks = "|".join(map(regex.escape, self._tokenizer.all_special_tokens))
            parts = regex.split(f"({marks})", sound)
            sound = "".join(part if i % 2 else _bert_words(part) for i, part in enumerate(parts))
        found: list[int] = self._tokenizer(sound, split_special_tokens=self._clip, verbose=False, **more)["input_ids"]
        return found

    def _cut(self, found: list[int], text: str) -> list[int]:
        """The beginning, closed by the end token."""
        length = self._spec.max_tokens
        if self._clip and self._spec.text == "open_clip":
            return [*found[: length - 1], found[-1]]
        return self._plain(text, truncation=True, max_length=length)

    def _name(self, parts: Mapping[str, Any]) -> str:
        exact = self._clip and self._spec.text == "open_clip"
        kind = "clip-bpe" if self._clip else "bert-wordpiece" if self._wordpiece else parts["type"].lower()
        # Nothing but the vocabulary decides open_clip's tokens, in whichever files it came; MPS looks at padding too.
        decides = {key: parts[key] for key in (("vocab", "merges") if exact else sorted(parts))} | {"pad": self._pad}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{kind}/{self._spec.max_tokens}/{self._spec.text}/{digest}"
        return f"{name}/prefix {self._spec.prefix!r}" if self._spec.prefix else name


def _parts(tokenizer: Any) -> dict[str, Any]:
    """What decides a tokenizer's tokens, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"type": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "merges": []}
    whole = json.loads(backend.to_str())
    model = whole["model"]
    return {
        "type": model["type"],
        "vocab": model["vocab"],
        "merges": model.get("merges", []),
        "suffix": model.get("end_of_word_suffix"),
        **{key: whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")},
    }


def _is_clip(parts: Mapping[str, Any]) -> bool:
    """Whether it is a byte-level BPE whose words end in ``</w>``."""
    if parts["type"] != "BPE" or parts.get("suffix") != "</w>":
        return False
    return all(letter + end in parts["vocab"] for letter in _LETTERS.values() for end in ("", "</w>"))
