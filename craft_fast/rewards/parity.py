"""The same pictures scored both ways: by the native network, and by the authors' own package or plain transformers.

``craft-fast rewards verify`` prints what is found here. hpsv2.1, hpsv2.0 and image-reward are held against their
package's own ``score()``; the others against ``plain``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from craft_fast.config import REWARD_FAMILIES, RewardSettings
from craft_fast.errors import ConfigError, Interrupted
from craft_fast.rewards import catalog
from craft_fast.rewards.base import REWARD_FILE
from craft_fast.rewards.network_reward import full_float32
from craft_fast.rewards.pixels import Pictures

if TYPE_CHECKING:
    from craft_fast.rewards.loaders import RewardSource
    from craft_fast.rewards.packages.environments import Environment

TOLERANCE = 1e-5
HALVES = ("float16", "bfloat16")
PROMPTS = (
    "a red circle on a blue table",
    "two dogs running along a beach at sunset, oil painting, thick brush strokes",
    "Portrait of an old fisherman, 85mm, f/1.8",
    # Longer than any of the networks reads: both ways must cut it alike.
    " ".join(["a very long description of a green hill under a clear sky with three white sheep"] * 12),
    "",
)
# What tokenizers disagree on; the packages' own must be met on these too. Plain transformers takes text as it comes.
HOSTILE_PROMPTS = (
    "“curly quotes” &amp;amp; an &lt;entity&gt;",
    "a cafÃ© in Mojibake, ﬁne ligatures",
    "<|endoftext|> a cat 🐱 [SEP] [unused0]",
    "tabs\tand\n\nlines   and spaces ",
)


@dataclass(frozen=True, slots=True)
class Deviation:
    """What half precision does to the native scores: against its own float32, in the reward's unit."""

    dtype: str
    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Parity:
    """What comparing one reward found.

    Attributes:
        reward: its name.
        against: what it was held against.
        pairs: pictures with a prompt that were scored both ways.
        largest: difference of two scores, in the reward's unit.
        mean: of all differences.
        allowed: the tolerance, times the largest score where that is above 1.
        at: picture and prompt of the largest difference.
        lowest, highest: of the reference's scores.
        deviations: of half precisions from float32.
        device: the two were compared on.
        seconds: for all of it.
    """

    reward: str
    against: str
    pairs: int
    largest: float
    mean: float
    allowed: float
    at: str
    lowest: float
    highest: float
    deviations: tuple[Deviation, ...]
    device: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no difference is above what is allowed."""
        return self.largest <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def compare(
    reward: str,
    source: RewardSource,
    device: torch.device | str = "cpu",
    *,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    tolerance: float = TOLERANCE,
    dtypes: Sequence[str] = HALVES,
    environment: Environment | None = None,
    architecture: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Parity:
    """Score pictures both ways; a score's floor is left away.

    Args:
        reward: a published model's name, or any other for a family's folder.
        source: its files.
        device: for both ways; the package's own ``score()`` is called on a CPU, on a GPU (where it is in half
            precision) its network is used in float32.
        pictures: uint8 [3, H, W], of any sizes.
        prompts: as many as pictures.
        tolerance: largest difference that is right, for scores up to 1.
        dtypes: half precisions of the native network whose deviation is measured.
        environment: of the package; None: where it was installed.
        architecture: see ``PackageReward``.
        should_stop: asked between the ways.

    Raises:
        EnvironmentProblem: the package's environment is not there. ConfigError: there is nothing to compare with.
        IntegrityError: damaged files. Interrupted: asked to stop.
    """
    device, began = torch.device(device), time.monotonic()
    # At a floor all scores are equal, whatever lies under it.
    source = replace(source, spec=source.spec.model_copy(update={"score_floor": None}))
    against, expected = _reference(reward, source, device, pictures, prompts, environment, architecture, should_stop)
    found = _native(reward, source, device, "float32", pictures, prompts)
    deviations = []
    for dtype in dtypes:
        _check(should_stop)
        away = (_native(reward, source, device, dtype, pictures, prompts) - found).abs()
        deviations.append(Deviation(dtype, float(away.max()), float(away.mean())))
    difference = (found - expected).abs()
    worst = int(difference.argmax())
    _, height, width = pictures[worst].shape
    return Parity(
        reward, against, len(pictures), float(difference.max()), float(difference.mean()),
        tolerance * max(1.0, float(expected.abs().max())), f"{width}x{height} px, {prompts[worst][:60]!r}",
        float(expected.min()), float(expected.max()), tuple(deviations), str(device), time.monotonic() - began,
    )  # fmt: skip


def _native(
    name: str,
    source: RewardSource,
    device: torch.device,
    dtype: str,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
) -> Tensor:
    """Scores float32 [B] of the toolkit's own network."""
    from craft_fast.rewards.loaders import network_reward

    reward = network_reward(name, source, device, resident=False, dtype=dtype)
    try:
        return reward.score_pictures(Pictures.of(pictures), prompts)
    finally:
        reward.rest()
        reward.close()


def _reference(
    name: str,
    source: RewardSource,
    device: torch.device,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    environment: Environment | None,
    architecture: Mapping[str, Any] | None,
    should_stop: Callable[[], bool],
) -> tuple[str, Tensor]:
    """Scores float32 [B] of the other way, and what that is."""
    _check(should_stop)
    if package_for(name) is not None:
        return _packaged(name, source, device, pictures, prompts, environment, architecture)
    from transformers import __version__

    from craft_fast.rewards.plain import Plain

    plain, scores = Plain(source, device), []
    with full_float32():
        for picture, prompt in zip(pictures, prompts, strict=True):
            _check(should_stop)
            scores.append(plain.score(picture, prompt))
    kinds = {"clip": "CLIPModel", "aesthetic": "CLIPVisionModelWithProjection and the bare equation"}
    return (
        f"transformers {__version__}: {kinds.get(source.spec.family, 'CLIPModel and the bare equations')}",
        torch.tensor(scores),
    )


def _packaged(
    name: str,
    source: RewardSource,
    device: torch.device,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    environment: Environment | None,
    architecture: Mapping[str, Any] | None,
) -> tuple[str, Tensor]:
    from craft_fast.rewards.packages.client import load_package_reward

    settings = RewardSettings(kind=name, backend="package")
    dtype = "auto" if device.type == "cpu" else "float32"
    reward = load_package_reward(
        name, settings, source, device, dtype=dtype, environment=environment, architecture=architecture
    )
    label = reward.provenance.backend
    try:
        if device.type == "cpu":
            return f"{label}, its own score()", reward.score_own(pictures, prompts)
        return f"{label}, its network in float32", reward.score_pictures(Pictures.of(pictures), prompts)
    finally:
        reward.close()


def package_for(reward: str) -> str | None:
    """The package that a reward is held against, None: plain transformers."""
    return catalog.OFFICIALS[reward].package if reward in catalog.OFFICIALS else None


def find_source(reward: str, folder: Path | None = None) -> RewardSource:
    """The files of a reward to compare; no network is asked.

    Args:
        reward: a published model's name; any name where the folder has a ``reward.json``.
        folder: where its files are; None: where ``craft-fast rewards fetch`` puts them.

    Raises:
        EnvironmentProblem: files are missing; the hint gets them.
        ConfigError, IntegrityError: as reading the reward.
    """
    from craft_fast.rewards.loaders import open_source

    kind, path = reward, "" if folder is None else str(folder)
    if folder is not None and (folder / REWARD_FILE).is_file():
        # reward.json decides the family; reading it again checks the rest of it.
        kind = family_of(folder)
    else:
        catalog.get(reward)
    return open_source(reward, RewardSettings(kind=kind, path=path), offline=True)


def family_of(folder: Path) -> str:
    """The family that a folder's ``reward.json`` names.

    Raises:
        ConfigError: it is not JSON, or names none.
    """
    path = folder / REWARD_FILE
    try:
        found = json.loads(path.read_bytes())
        family = found.get("family") if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        family = None
    if family not in REWARD_FAMILIES:
        why = f"its family is none of {', '.join(REWARD_FAMILIES)}"
        raise ConfigError("A reward.json is not right.", where=str(path), why=why)
    return str(family)


def sample(
    images: Sequence[Tensor] = (), texts: Sequence[str] = (), *, hostile: bool = False
) -> tuple[list[Tensor], list[str]]:
    """Pictures with a prompt each, the built-in ones where none are given; the shorter of the two goes round.

    Args:
        images: uint8 [3, H, W].
        texts: prompts.
        hostile: the built-in prompts with those that tokenizers disagree on.
    """
    pictures = list(images) or built_in_pictures()
    prompts = list(texts) or [*PROMPTS, *(HOSTILE_PROMPTS if hostile else ())]
    count = max(len(pictures), len(prompts))
    return [pictures[i % len(pictures)] for i in range(count)], [prompts[i % len(prompts)] for i in range(count)]


def built_in_pictures() -> list[Tensor]:
    """Pictures uint8 [3, H, W] drawn by code: square, wide, tall, of the networks' own size; noise, edges, smooth."""
    generator = torch.Generator().manual_seed(20)
    noise = torch.randint(0, 256, (3, 301, 301), dtype=torch.uint8, generator=generator)
    # Of SDXL's 1216 x 832: on this shape the two ways to place a crop differ by a pixel.
    return [_scene(384, 384), _scene(416, 608), _scene(608, 416), noise, _scene(224, 224), _scene(150, 700)]


def _scene(height: int, width: int) -> Tensor:
    """A smooth sky, a hard-edged disc, and fine stripes, which resizing without antialiasing would alias."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    colours = torch.stack([0.2 + 0.5 * x, 0.3 + 0.4 * y, 0.9 - 0.5 * x * y])
    colours[:, ((x - 0.6) * width) ** 2 + ((y - 0.4) * height) ** 2 < (0.2 * min(height, width)) ** 2] = 0.05
    stripes = torch.where((torch.arange(width) // 2) % 2 == 0, 0.9, 0.1)
    colours[:, int(0.8 * height) :] = stripes
    return (colours * 255).round().to(torch.uint8)


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Interrupted("Stopped", hint="the same command compares anew")
