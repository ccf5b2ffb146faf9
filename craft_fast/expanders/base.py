"""The one interface of all expanders, and what they share: instructions in, answers parsed, groups built.

An expander never raises for one prompt: it yields an ``Expansion`` with a problem, and the prompt is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from craft_fast.errors import CraftError
from craft_fast.progress import Progress, Silent
from craft_fast.prompt_lines import clean_text, excerpt
from craft_fast.records import Group, Prompt, Variant

MAX_VARIANT_CHARS = 2000
_BULLET = re.compile(r"^\s*(?:[-*•]+|\(?\d{1,3}[.):\]]|#{1,6})\s+")
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_REFUSAL = re.compile(
    r"^(?:i(?:'m| am) (?:really |very )?(?:sorry|unable|not able)|sorry,|i cannot|i won't|as an ai\b|unfortunately,? i"
    r"|i can't (?:help|assist|do|create|rewrite|fulfil|comply|provide))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Expansion:
    """K variants of one prompt, or the problem that left it without."""

    prompt_id: str
    variants: tuple[str, ...] = ()
    problem: str | None = None


class Expander(Protocol):
    """Writes variants. ``key`` digests what beside the settings decides them, such as a file's content."""

    key: str

    def expand(self, prompts: Sequence[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        """Yield one expansion a prompt, in the prompts' order: ``k`` variants that differ, or a problem."""


@dataclass(frozen=True, slots=True)
class ExpandResult:
    """Groups of the prompts that have their variants, and the problems of those dropped."""

    groups: tuple[Group, ...]
    dropped: tuple[Expansion, ...]


def build_groups(
    prompts: Sequence[Prompt], expander: Expander, k: int, seed: int, progress: Progress | None = None
) -> ExpandResult:
    """Expand training prompts into groups; held-out ones become groups of the base prompt alone.

    Args:
        prompts: training and held-out prompts.
        expander: asked for the training prompts only.
        k: variants of each prompt.
        seed: the run's.
        progress: told of every prompt, and warned of the dropped ones.

    Returns:
        Groups in the prompts' order, without those whose expansion failed.

    Raises:
        CraftError: not one training prompt has its variants.
    """
    progress = progress or Silent()
    training = [prompt for prompt in prompts if prompt.split == "train"]
    done: dict[str, Expansion] = {}
    with progress.task("expanding", len(training), "prompts") as task:
        for expansion in expander.expand(training, k, seed):
            done[expansion.prompt_id] = expansion
            task.advance()
    groups, dropped = [], []
    for prompt in prompts:
        found = done.get(prompt.prompt_id, Expansion(prompt.prompt_id))
        if found.problem is not None:
            dropped.append(found)
            continue
        texts = (prompt.text, *found.variants)
        groups.append(Group(prompt, tuple(Variant(prompt.prompt_id, j, text) for j, text in enumerate(texts))))
    _say_dropped(dropped, {p.prompt_id: p for p in training}, progress)
    if training and len(dropped) == len(training):
        raise CraftError(
            "No prompt could be expanded.",
            where="expand",
            why=f"the first of {len(dropped)} problems: {dropped[0].problem}",
            hint="--set expand.kind=template needs no server and no model",
        )
    return ExpandResult(tuple(groups), tuple(dropped))


def _say_dropped(dropped: Sequence[Expansion], prompts: dict[str, Prompt], progress: Progress) -> None:
    if not dropped:
        return
    progress.warn(f"{len(dropped)} of {len(prompts)} prompts dropped, they could not be expanded")
    for found in dropped[:5]:
        prompt = prompts[found.prompt_id]
        progress.warn(f"  line {prompt.line}: {found.problem} ({excerpt(prompt.text)})")


def fill_instruction(instruction: str, prompt: str, n: int) -> str:
    """Put the prompt and the number into the instruction, in one pass: braces in a prompt stay text."""
    return re.sub(r"\{(prompt|n)\}", lambda match: prompt if match[1] == "prompt" else str(n), instruction)


def parse_answer(answer: str, prompt: str, k: int) -> tuple[tuple[str, ...], str | None]:
    """Find ``k`` versions of a prompt in what a language model wrote.

    Takes one version a line, numbered or not, quoted or not, or a JSON list of texts; leaves out reasoning in
    ``<think>``, headings, repetitions, and the prompt itself.

    Args:
        answer: the model's text.
        prompt: the base prompt.
        k: versions wanted.

    Returns:
        The first ``k`` versions and None, or nothing and the problem.
    """
    text = _THOUGHTS.sub("", answer).strip()
    if _REFUSAL.match(text.replace("\u2019", "'")):
        return (), f"the model refused: {excerpt(text)}"
    found: dict[str, str] = {}
    for line in _answer_lines(text):
        version, reason = clean_text(_BULLET.sub("", line).strip().strip("\"'\u201c\u201d`*"), MAX_VARIANT_CHARS)
        heading = version.endswith(":") or not any(c.isalpha() for c in version)
        if reason or heading or version.casefold() == prompt.casefold():
            continue
        found.setdefault(version.casefold(), version)
    if len(found) < k:
        return (), f"{len(found)} usable versions in the answer, {k} asked: {excerpt(text)}"
    return tuple(found.values())[:k], None


def _answer_lines(text: str) -> Iterable[str]:
    body = text.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if body.startswith("["):
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return body.splitlines()
        if isinstance(value, list):
            return [item for item in value if isinstance(item, str)]
    return body.splitlines()
