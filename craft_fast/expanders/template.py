"""Variants from templates with slots: offline, seeded per prompt, the default."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence

from craft_fast.config import SlotSettings
from craft_fast.expanders.base import Expansion
from craft_fast.records import Prompt
from craft_fast.rng import derive_seed
from craft_fast.store.digest import digest_json

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TRIES = 50
_MAX_ENUMERATED = 20_000


class TemplateExpander:
    """Draws a template without replacement for each variant and fills its slots.

    Args:
        templates: texts with ``{prompt}`` and ``{slot}``.
        slots: what each slot may become, and the words of a prompt that leave it empty.
    """

    def __init__(self, templates: Sequence[str], slots: Mapping[str, SlotSettings]) -> None:
        self.templates = tuple(templates)
        self.slots = dict(slots)
        self.key = digest_json(["template", self.templates, {n: s.model_dump() for n, s in self.slots.items()}])

    def expand(self, prompts: Sequence[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        """Yield ``k`` texts a prompt that differ from it and from each other; a function of seed and prompt alone."""
        for prompt in prompts:
            rng = random.Random(derive_seed(seed, "expand", prompt.prompt_id))
            texts = self._draw(prompt.text, k, rng)
            if len(texts) < k:
                problem = f"the templates make {len(texts)} texts that differ, {k} wanted: add to expand.templates"
                yield Expansion(prompt.prompt_id, problem=problem)
            else:
                yield Expansion(prompt.prompt_id, tuple(texts))

    def _draw(self, prompt: str, k: int, rng: random.Random) -> list[str]:
        choices = {name: self._choices(name, prompt) for name in self.slots}
        texts: dict[str, None] = {}
        pile: list[str] = []
        for _ in range(_TRIES * k):
            if len(texts) == k:
                return list(texts)
            if not pile:
                pile = rng.sample(self.templates, len(self.templates))
            text = _fill(pile.pop(), {name: rng.choice(options) for name, options in choices.items()}, prompt)
            if text != prompt:
                texts.setdefault(text)
        # Drawing has all but run out of new texts: take what is left in order.
        for text in itertools.islice(self._all(prompt, choices), _MAX_ENUMERATED):
            if len(texts) < k and text != prompt:
                texts.setdefault(text)
        return list(texts)

    def _choices(self, name: str, prompt: str) -> Sequence[str]:
        slot = self.slots[name]
        held = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) for word in slot.unless)
        return [""] if held else slot.choices

    def _all(self, prompt: str, choices: Mapping[str, Sequence[str]]) -> Iterator[str]:
        for template in self.templates:
            names = [name for name in dict.fromkeys(_SLOT.findall(template)) if name in choices]
            for values in itertools.product(*(choices[name] for name in names)):
                yield _fill(template, dict(zip(names, values, strict=True)), prompt)


def _fill(template: str, values: Mapping[str, str], prompt: str) -> str:
    """Fill the slots, tidy what empty ones left, then put the prompt in untouched: braces in it stay text."""
    text = _SLOT.sub(lambda m: m[0] if m[1] == "prompt" else values.get(m[1], m[0]), template)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?:\s*,)+(?=\s*,)|\s+(?=,)", "", text).strip().strip(",").strip()
    return text.replace("{prompt}", prompt, 1)
