"""Checks that need more than one setting at a time; ``load_settings`` reports them beside the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import ascii_letters

from craft_fast.config import ExpandSettings, Settings

SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

Finding = tuple[set[str], str]


def cross_checks(settings: Settings) -> Iterator[Finding]:
    """Yield the sections a finding is about, and one line that says key, value found and what is allowed."""
    yield from _rewards(settings)
    for text in _expand(settings.expand):
        yield {"expand"}, text
    for key in ("height_px", "width_px"):
        value = getattr(settings.generate, key)
        if value % 8:
            yield {"generate"}, f"generate.{key}: found {value}; must be a multiple of 8"
    device = settings.model.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", device):
        yield {"model"}, f"model.device: found {device!r}; must be auto, cpu, cuda or cuda:N"


def _rewards(settings: Settings) -> Iterator[Finding]:
    rewards = settings.rewards
    training = [name for name, reward in rewards.items() if not reward.held_out]
    for name, reward in rewards.items():
        if not _NAME.fullmatch(name) or name[0] not in ascii_letters:
            yield {"rewards"}, f"rewards: found the name {name!r}; must be letters, digits and _, at most 40"
        if not reward.path:
            what = "a folder, hub id, package:NAME/FOLDER or module:callable"
            yield {"rewards"}, f"rewards.{name}.path: found nothing; must be {what}"
        elif reward.kind == "function" and not re.fullmatch(r"[\w.]+:\w+", reward.path):
            yield {"rewards"}, f"rewards.{name}.path: found {reward.path!r}; must be module:callable for kind function"
    if not training:
        yield {"rewards"}, "rewards: found none that is not held out; at least one must give the samples their weight"
    for name in settings.filter.rewards:
        if name not in training:
            why = "is held out" if name in rewards else "is not among rewards"
            yield (
                {"rewards", "filter"},
                f"filter.rewards: found {name!r}, which {why}; must be among {', '.join(training) or 'rewards'}",
            )
    if len(set(settings.filter.rewards)) < len(settings.filter.rewards):
        yield {"filter"}, f"filter.rewards: found {settings.filter.rewards}; each name may be there once"


def _expand(expand: ExpandSettings) -> Iterator[str]:
    if expand.kind == "file" and not expand.file:
        yield "expand.file: found nothing; must name the file of variants when expand.kind is file"
    if expand.kind in {"openai", "transformers"}:
        if not expand.model:
            yield f"expand.model: found nothing; must name the model when expand.kind is {expand.kind}"
        for word in ("{prompt}", "{n}"):
            if word not in expand.instruction:
                yield f"expand.instruction: found no {word}; it must be there"
    if expand.kind == "openai" and not re.match(r"https?://[^/\s]+", expand.base_url):
        yield f"expand.base_url: found {expand.base_url!r}; must begin with http:// or https://"
    if expand.kind != "template":
        return
    if not expand.templates:
        yield "expand.templates: found none; at least one text with {prompt} must be there"
    for i, template in enumerate(expand.templates):
        names = SLOT.findall(template)
        if names.count("prompt") != 1:
            yield f"expand.templates.{i}: found {template!r}; must hold {{prompt}} once"
        for name in sorted(set(names) - {"prompt"} - set(expand.slots)):
            known = ", ".join(f"{{{slot}}}" for slot in ["prompt", *expand.slots])
            yield f"expand.templates.{i}: found {{{name}}}; must be one of {known}"
