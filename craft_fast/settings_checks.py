"""Checks that no single field's type makes; ``load_settings`` reports them beside the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from string import ascii_letters
from typing import Any

from craft_fast.config import ExpandSettings, GenerateSettings, ModelSettings, Settings, TrainSettings

SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

Finding = tuple[set[str], str]


def cross_checks(settings: Settings) -> Iterator[Finding]:
    """Yield the sections a finding is about, and one line that says key, value found and what is allowed."""
    yield from _rewards(settings)
    for text in _expand(settings.expand):
        yield {"expand"}, text
    for text in _generate(settings.generate):
        yield {"generate"}, text
    for text in _model(settings.model):
        yield {"model"}, text
    for text in _train(settings.train):
        yield {"train"}, text


def not_finite(data: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of every NaN and infinity in unchecked values, with what to say of it."""
    for path, value in _leaves(data):
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"found {value}; must be a finite number"


def _leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from _leaves(value, (*path, str(i)))
    else:
        yield path, data


def _generate(generate: GenerateSettings) -> Iterator[str]:
    for key in ("height_px", "width_px"):
        value = getattr(generate, key)
        if value % 8:
            yield f"generate.{key}: found {value}; must be a multiple of 8"
    begin, end = generate.guidance_interval
    if not 0.0 <= begin < end <= 1.0:
        yield f"generate.guidance_interval: found [{begin}, {end}]; must be [begin, end] with 0 <= begin < end <= 1"


def _model(model: ModelSettings) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", model.device):
        yield f"model.device: found {model.device!r}; must be auto, cpu, cuda or cuda:N"
    if model.zero_terminal_snr == "yes" and model.prediction_type == "epsilon":
        # At zero SNR the input is the noise itself: predicting it says nothing of the image (arXiv 2305.08891, 3.2).
        yield (
            "model.zero_terminal_snr: found yes with model.prediction_type epsilon; "
            "must be no, or model.prediction_type v_prediction"
        )


def _train(train: TrainSettings) -> Iterator[str]:
    if train.nf4_convs and train.method not in {"auto", "qlora"}:
        yield f"train.nf4_convs: found true with train.method {train.method}; must be false, or train.method qlora"
    if train.method != "full" and len(set(train.target_modules)) < len(train.target_modules):
        yield f"train.target_modules: found {train.target_modules}; each name may be there once"


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
