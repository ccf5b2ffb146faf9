"""The world's training pictures: of mixed quality and with some wrong captions, as on the web.

Rich captions name the background and hold words of quality, and go with better and better described pictures;
plain ones often go with flawed or wrongly described ones. That is what leaves the base model room to improve.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.tiny.architecture import MAX_TOKENS
from craft_fast.tiny.random_model import build_clip_tokenizer
from craft_fast.tiny.render import encode_scene
from craft_fast.tiny.world import (
    BACKGROUNDS,
    FLAW_WORDS,
    QUALITY_WORDS,
    WORDS,
    Scene,
    caption,
    mistaken,
    random_scene,
)

RICH_SHARE = 0.35
RICH_WRONG, PLAIN_WRONG = 0.04, 0.45
RICH_FLAWED, PLAIN_FLAWED = 0.08, 0.65


class WordTokens:
    """Captions to token ids, [MAX_TOKENS] each, equal to the CLIP tokenizers' own output on the world's words."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer

        self.vocab_size = build_clip_tokenizer(folder / "tokenizer", WORDS, max_length=MAX_TOKENS)
        build_clip_tokenizer(folder / "tokenizer_2", WORDS, max_length=MAX_TOKENS, pad_id=0)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.ids = {word: self.tokenizer(word).input_ids[1] for word in WORDS}

    def encode(self, texts: list[str], *, pad: int | None = None) -> Tensor:
        """Token ids int64 [B, MAX_TOKENS]; padded with the end token, or with ``pad``."""
        start, end = self.vocab_size - 2, self.vocab_size - 1
        rows = []
        for text in texts:
            ids = [start, *(self.ids[word] for word in re.findall(r"[a-z]+|,", text)), end]
            rows.append(ids + [end if pad is None else pad] * (MAX_TOKENS - len(ids)))
        return torch.tensor(rows)


@dataclass
class Item:
    """One training picture's recipe: the true scene, its caption, and its flaws (blur, noise, fade)."""

    scene: Scene
    text: str
    flaws: tuple[bool, bool, bool]


def rich_words(rng: random.Random) -> tuple[str, ...]:
    """Two or three words of quality in any order."""
    return tuple(rng.sample(QUALITY_WORDS, rng.choice((2, 3, 3))))


def _flaws(rng: random.Random) -> tuple[bool, bool, bool]:
    chosen = set(rng.sample(range(3), 1 if rng.random() < 0.7 else 2))
    return (0 in chosen, 1 in chosen, 2 in chosen)


def web_item(rng: random.Random) -> Item:
    """Draw one picture's recipe from the mixture described at the top."""
    scene = replace(random_scene(rng, name_background=0.0), background=rng.choice(list(BACKGROUNDS)))
    if rng.random() < RICH_SHARE:
        said = mistaken(scene, rng) if rng.random() < RICH_WRONG else scene
        flaws = _flaws(rng) if rng.random() < RICH_FLAWED else (False, False, False)
        return Item(scene, caption(said, rich_words(rng)), flaws)
    said = scene if rng.random() < 0.3 else replace(scene, background=None)
    said = mistaken(said, rng) if rng.random() < PLAIN_WRONG else said
    flaws = _flaws(rng) if rng.random() < PLAIN_FLAWED else (False, False, False)
    told = tuple(word for word, has in zip(FLAW_WORDS, flaws, strict=True) if has) if rng.random() < 0.2 else ()
    return Item(scene, caption(said, told), flaws)


def web_items(count: int, seed: int) -> list[Item]:
    """``count`` recipes, a pure function of ``seed``."""
    rng = random.Random(seed)
    return [web_item(rng) for _ in range(count)]


def codes_of(items: list[Item]) -> Tensor:
    """Scene codes int64 [B, 7] of recipes."""
    return torch.tensor([encode_scene(item.scene) for item in items])
