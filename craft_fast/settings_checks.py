"""Checks that no single field's type makes; ``load_settings`` reports them beside the others."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from string import ascii_letters
from typing import Any

from craft_fast.config import (
    OFFICIAL_REWARDS,
    REWARD_FAMILIES,
    ExpandSettings,
    GenerateSettings,
    ModelSettings,
    RewardSettings,
    Settings,
    TrainSettings,
)

SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

# Where installed packages name their rewards (craft_fast.rewards.plugin).
PLUGIN_GROUP = "craft_fast.rewards"
# Published models whose authors' own package can score (craft_fast.rewards.packages).
PACKAGED_REWARDS = ("hpsv2.1", "hpsv2.0", "image-reward")

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
        for text in _reward(f"rewards.{name}", reward):
            yield {"rewards"}, text
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


def _reward(key: str, reward: RewardSettings) -> Iterator[str]:
    """Findings on one reward: which fields its kind needs, and which it has no use for."""
    kind = reward.kind
    built_in = (*OFFICIAL_REWARDS, *REWARD_FAMILIES, "function")
    plugins = [] if kind in built_in else _plugins()
    if kind not in (*built_in, *plugins):
        known = list(dict.fromkeys([*built_in, *plugins]))
        close = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]}?" if close else ""
        told = f"must be one of {', '.join(known)}, or an installed plug-in's name"
        yield f"{key}.kind: found {kind!r}; {told}{guess}"
        return
    if kind == "function" and not re.fullmatch(r"[\w.]+:\w+", reward.path):
        found = repr(reward.path) if reward.path else "nothing"
        yield f"{key}.path: found {found}; must be module:callable for kind function"
    if kind in set(REWARD_FAMILIES) - set(OFFICIAL_REWARDS) and not reward.path:
        published = ", ".join(OFFICIAL_REWARDS)
        yield (
            f"{key}.path: found nothing; must be a folder, hub id or package:NAME/FOLDER for kind {kind}; "
            f"a published model needs no path but its own kind: {published}"
        )
    if kind in plugins and reward.path:
        yield f"{key}.path: found {reward.path!r}; must be empty for a plug-in, whose arguments are {key}.options"
    if reward.backend == "package" and kind not in PACKAGED_REWARDS:
        yield f"{key}.backend: found package with kind {kind}; must be native, or kind {', '.join(PACKAGED_REWARDS)}"
    if reward.options and kind not in plugins:
        found = ", ".join(reward.options)
        yield f"{key}.options: found {found} with kind {kind}; must be empty, only plug-ins take options"


def _plugins() -> list[str]:
    """Names of installed reward plug-ins."""
    from importlib.metadata import entry_points  # 18 ms, and nearly every command reads settings

    return sorted(entry_points(group=PLUGIN_GROUP).names)


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
