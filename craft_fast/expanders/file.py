"""Variants that the user brings: JSONL of ``{prompt, variants}``, or CSV/TSV with columns prompt and variant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from craft_fast.errors import ConfigError
from craft_fast.expanders.base import MAX_VARIANT_CHARS, Expansion
from craft_fast.prompt_lines import check_file, clean_text, prompt_id, read_records
from craft_fast.records import Prompt
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import resolve_uri


class FileExpander:
    """Reads variants once; a prompt's first ``k`` of them are taken, in file order.

    Args:
        source: path or package URI.

    Raises:
        ConfigError: the file cannot be read or holds no variants.
    """

    def __init__(self, source: str) -> None:
        path = Path(resolve_uri(source)) if source.startswith("package:") else Path(source).expanduser()
        check_file(path, "file of variants")
        self.path = path
        self.key = sha256_file(path)
        self._variants, self._problems = _read(path)
        if not self._variants:
            raise ConfigError(
                "The file of variants holds none.",
                where=str(path),
                why=next(iter(self._problems), "no line with a prompt and variants"),
                hint='JSONL: {"prompt": "...", "variants": ["...", "..."]}; CSV or TSV: columns prompt and variant',
            )

    def expand(self, prompts: Sequence[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        """Yield the file's variants; a prompt with fewer than ``k`` of them is a problem. ``seed`` changes nothing."""
        for prompt in prompts:
            found = [text for text in self._variants.get(prompt.prompt_id, {}) if text != prompt.text]
            if len(found) < k:
                problem = f"{len(found)} variants in {self.path.name}, {k} wanted"
                yield Expansion(prompt.prompt_id, problem=problem)
            else:
                yield Expansion(prompt.prompt_id, tuple(found[:k]))


def _read(path: Path) -> tuple[dict[str, dict[str, None]], list[str]]:
    """Prompt id to its variants without repetitions, and the first problems."""
    variants: dict[str, dict[str, None]] = {}
    problems: list[str] = []
    for record in read_records(path):
        base, reason = (record.text, record.reason) if record.reason else clean_text(record.text, MAX_VARIANT_CHARS)
        fields = record.fields or {}
        texts = fields.get("variants", fields.get("variant"))
        texts = [texts] if isinstance(texts, str) else texts
        if not reason and not isinstance(texts, list):
            reason = "no variants beside the prompt"
        if reason:
            if len(problems) < 10:
                problems.append(f"line {record.line}: {reason}")
            continue
        known = variants.setdefault(prompt_id(base), {})
        for text in texts or []:
            version, why = clean_text(text, MAX_VARIANT_CHARS) if isinstance(text, str) else ("", "not a text")
            if not why:
                known.setdefault(version)
    return variants, problems
