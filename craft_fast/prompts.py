"""Base prompts: read, cleaned, de-duplicated, checked against the model's words, and parted into train and held out.

Prompts are data everywhere. They name no file, fill no format string and reach HTML only escaped; ``prompt_id`` is
a digest of the cleaned text, so the order of a file never matters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from craft_fast.config import PromptSettings
from craft_fast.errors import ConfigError
from craft_fast.prompt_lines import Record, check_file, clean_text, excerpt, prompt_id, read_records
from craft_fast.records import Prompt, Split
from craft_fast.store.run import resolve_uri

MAX_SHOWN = 1000
MAX_PROMPTS = 1_000_000
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line that gave no prompt, and why; ``excerpt`` is safe to print."""

    line: int
    reason: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What one file gave. ``rejections`` holds the first 1,000, ``rejected`` counts all.

    ``known_words`` is filled when a line was rejected for a word that the model does not know.
    """

    source: str
    prompts: tuple[Prompt, ...]
    rejections: tuple[Rejection, ...]
    rejected: int
    duplicates: int
    known_words: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Lines worth saying about the file; empty when there was nothing but prompts."""
        said = []
        if self.duplicates:
            said.append(f"{self.source}: {self.duplicates} repeated prompts left out")
        if self.rejected:
            said.append(f"{self.source}: {self.rejected} lines rejected")
            said += [f"  line {r.line}: {r.reason} ({r.excerpt or 'no text'})" for r in self.rejections[:5]]
            if self.rejected > 5:
                said.append(f"  and {self.rejected - 5} more")
        if self.known_words:
            said.append(f"  known words: {', '.join(self.known_words[:200])}")
        return said


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts of a run: ``train`` in file order, ``heldout`` for evaluation only; ``notes`` to be shown."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    notes: tuple[str, ...]


def load_vocabulary(uri: str) -> frozenset[str]:
    """The words a model knows, lower case.

    Args:
        uri: file or package URI of a JSON list of texts, or of an object that holds it under ``words``.

    Raises:
        ConfigError: not such a list.
    """
    path = _path(uri)
    check_file(path, "vocabulary")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ConfigError("The vocabulary cannot be read.", where=str(path), why=f"not JSON: {err}") from None
    words = value.get("words") if isinstance(value, dict) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        why = 'a JSON list such as ["a", "red"] is read'
        raise ConfigError("The vocabulary is not a list of words.", where=str(path), why=why)
    return frozenset(part for word in words for part in _WORD.findall(word.lower()))


def read_prompts(source: str | Path, settings: PromptSettings, *, split: Split = "train") -> PromptFile:
    """Read one file of prompts; lines that cannot be used are reported, never fatal by themselves.

    Args:
        source: path or ``package:NAME/FILE``; .txt one a line, .csv/.tsv with a column prompt, text or caption,
            .jsonl of texts or of objects with such a key.
        settings: ``max_chars`` and ``vocabulary`` are looked at.
        split: what the prompts are for.

    Returns:
        Prompts in file order without repetitions, and what was left out.

    Raises:
        ConfigError: the file cannot be read as a whole, or no prompt is left.
    """
    path = _path(source)
    known = load_vocabulary(settings.vocabulary) if settings.vocabulary else None
    prompts: dict[str, Prompt] = {}
    rejections: list[Rejection] = []
    unknown: dict[str, int] = {}
    rejected = duplicates = 0
    for record in read_records(path):
        text, reason = (record.text, record.reason) if record.reason else clean_text(record.text, settings.max_chars)
        if not reason and known is not None:
            strange = sorted({word for word in _WORD.findall(text.lower()) if word not in known})
            reason = f"unknown words: {', '.join(excerpt(word, 30) for word in strange[:10])}" if strange else ""
            for word in strange:
                unknown.setdefault(word, record.line)
        if reason:
            rejected += 1
            if len(rejections) < MAX_SHOWN:
                rejections.append(Rejection(record.line, reason, excerpt(text)))
            continue
        key = prompt_id(text)
        if key in prompts:
            duplicates += 1
        elif len(prompts) >= MAX_PROMPTS:
            where, why = f"{path}, line {record.line}", f"at most {MAX_PROMPTS:,} are read"
            raise ConfigError("The prompt file holds too many prompts.", where=where, why=why)
        else:
            prompts[key] = Prompt(key, text, split, record.line, _meta(record))
    words = tuple(sorted(known)) if known is not None and unknown else ()
    found = PromptFile(path.name, tuple(prompts.values()), tuple(rejections), rejected, duplicates, words)
    if not prompts:
        raise _nothing_left(path, found, unknown, known)
    return found


def _nothing_left(
    path: Path, found: PromptFile, unknown: Mapping[str, int], known: Iterable[str] | None
) -> ConfigError:
    if not found.rejected:
        why = "no line of it holds text"
        return ConfigError("The prompt file is empty.", where=str(path), why=why, hint="one prompt a line")
    reasons = "".join(f"\n    line {r.line}: {r.reason}" for r in found.rejections[:10])
    more = f"\n    and {found.rejected - 10} more" if found.rejected > 10 else ""
    if unknown and known is not None:
        words = ", ".join(f"{excerpt(word, 30)} (line {line})" for word, line in list(unknown.items())[:30])
        return ConfigError(
            "No prompt is left: the model does not know the words of any.",
            where=str(path),
            why=f"unknown: {words}{reasons}{more}",
            hint=f"known words: {', '.join(sorted(known)[:200])}; or --preset sdxl for a model that knows them all",
        )
    return ConfigError("No prompt is left: every line was rejected.", where=str(path), why=reasons + more)


def _meta(record: Record) -> dict[str, Any]:
    """The short scalar columns beside a prompt, such as its category."""
    kept: dict[str, Any] = {}
    for name, value in (record.fields or {}).items():
        short = (isinstance(value, str) and 0 < len(value) <= 200) or (isinstance(value, int) and abs(value) < 2**53)
        if short and len(kept) < 20:
            kept[name[:40]] = value
    return kept


def _path(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith("package:"):
        return Path(resolve_uri(source))
    return Path(source).expanduser()


def load_prompts(settings: PromptSettings) -> PromptSets:
    """Read the prompts of a run and part them.

    Without a held-out file a prompt is held out by a hash of its text, so that adding prompts moves none of the
    others. What a held-out file shares with the training prompts is trained on and not evaluated, and that is said:
    a person's own prompts must not vanish because a held-out file that came with a preset holds them too.

    Raises:
        ConfigError: a file cannot be read, or no training prompt is left.
    """
    training = read_prompts(settings.file, settings)
    notes = training.notes()
    if settings.heldout_file is not None:
        train = list(training.prompts)
        other = held_out_prompts(settings, {prompt.prompt_id for prompt in train})
        apart = list(other.heldout)
        notes += other.notes
    else:
        train, apart = hold_out_share(training.prompts, settings.heldout_share)
    if not train:
        raise ConfigError(
            "No training prompt is left.",
            where=training.source,
            why=f"all {len(training.prompts)} are held out",
            hint="give more prompts, or set prompts.heldout_file",
        )
    return PromptSets(tuple(train[: settings.limit]), tuple(apart), tuple(notes))


def hold_out_share(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """Part prompts by a hash of their text, so that adding some moves none of the others.

    Args:
        prompts: of one file.
        share: of them that is held out, about; above 0 it is at least one of several.

    Returns:
        Prompts to train on, and those held out.
    """
    held = {prompt.prompt_id: replace(prompt, split="heldout") for prompt in prompts if _is_held_out(prompt, share)}
    train = [prompt for prompt in prompts if prompt.prompt_id not in held]
    if not held and len(train) > 1 and share > 0:
        # A handful of prompts may hash to one side; evaluation needs at least one.
        last = min(train, key=lambda prompt: prompt.prompt_id)
        train.remove(last)
        held[last.prompt_id] = replace(last, split="heldout")
    return train, list(held.values())


def unknown_words(settings: PromptSettings, texts: Iterable[str]) -> str:
    """One line on captions with words that ``prompts.vocabulary`` lacks; '' where there are none."""
    if not settings.vocabulary:
        return ""
    known = load_vocabulary(settings.vocabulary)
    strange = [sorted({word for word in _WORD.findall(text.lower()) if word not in known}) for text in texts]
    words = sorted({word for some in strange for word in some})
    shown = ", ".join(excerpt(word, 30) for word in words[:8])
    number = sum(map(bool, strange))
    return f"{number} captions have words that this model does not know: {shown}" if number else ""


def held_out_prompts(settings: PromptSettings, trained: Collection[str]) -> PromptSets:
    """The prompts of the held-out file, less those that are trained on.

    Args:
        settings: ``heldout_file`` is read.
        trained: prompt_ids that are trained on; they are not evaluated.

    Raises:
        ConfigError: the file cannot be read, or no prompt of it is left.
    """
    assert settings.heldout_file is not None
    found = read_prompts(settings.heldout_file, settings, split="heldout")
    left = tuple(prompt for prompt in found.prompts if prompt.prompt_id not in trained)
    if not left:
        raise ConfigError(
            "No held-out prompt is left.",
            where=found.source,
            why=f"all {len(found.prompts)} are training prompts, too",
            hint="give other held-out prompts, or set prompts.heldout_file to null to hold out a share",
        )
    notes = found.notes()
    if overlap := len(found.prompts) - len(left):
        notes.append(f"{overlap} held-out prompts are also training prompts; they are not evaluated")
    return PromptSets((), left, tuple(notes))


def _is_held_out(prompt: Prompt, share: float) -> bool:
    # Not the id's own digits: whoever sorts by id must not find the held-out prompts first.
    digest = hashlib.sha256(b"heldout\0" + prompt.text.encode("utf-8")).digest()
    return int.from_bytes(digest[:6], "big") < share * 2**48
