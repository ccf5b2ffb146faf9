"""What scoring takes: each judge's weights, activations and operations, and what is to be fetched before.

Published models are known by name, whether their files are here or not; a family's folder is read for its sizes. No
weight is read, nothing is hashed and no network is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES, RewardSettings
from craft_fast.errors import CraftError, EnvironmentProblem
from craft_fast.sdxl.costs import CONTEXT_BYTES, CUBLAS_BYTES

if TYPE_CHECKING:
    from craft_fast.rewards.catalog import Asset
    from craft_fast.rewards.network_reward import Need

# Most that shaping pictures works on at once, craft_fast.rewards.pixels.
_SHAPING_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Judge:
    """One reward network.

    Attributes:
        need: weights in the dtype that scores, activations and operations for a picture.
        side_px: S, of its pictures.
        pads: pictures are shaped as floats, not as bytes.
        stored_bytes: of its weights on disk.
        fetch: its files that are not on this machine.
        package: the authors' package scores, in a process of its own.
    """

    need: Need
    side_px: int
    pads: bool
    stored_bytes: int
    fetch: tuple[Asset, ...] = ()
    package: bool = False


def judges(
    rewards: Mapping[str, RewardSettings], *, held_out: bool, element: int
) -> tuple[dict[str, Judge | None], list[str]]:
    """What the settings' networks take; functions and plug-ins are left out.

    Args:
        rewards: of the settings.
        held_out: those that only judge the result, too.
        element: bytes of a value in the dtype that scores.

    Returns:
        By name, None where files of a size that is not known are missing; and what is left out and may take memory.
    """
    found: dict[str, Judge | None] = {}
    apart: list[str] = []
    for name, spec in rewards.items():
        if spec.kind == "function" or (spec.held_out and not held_out):
            continue
        if spec.kind in (*OFFICIAL_REWARDS, *REWARD_FAMILIES):
            found[name] = _judge(spec, element)
        else:
            apart.append(name)
    return found, apart


def _judge(spec: RewardSettings, element: int) -> Judge | None:
    from craft_fast.rewards.loaders import is_published

    try:
        return _published(spec, element) if is_published(spec) else _family(spec, element)
    except CraftError:  # what is wrong with a reward's files, doctor says
        return None


def _published(spec: RewardSettings, element: int) -> Judge:
    from craft_fast.rewards import published, shelf
    from craft_fast.rewards.catalog import get
    from craft_fast.store.run import resolve_uri

    official = get(spec.kind)
    folder = resolve_uri(spec.path) if spec.path else None
    have = shelf.find(official, folder=folder if isinstance(folder, Path) else None)
    config: Mapping[str, Any] = published.OFFICIAL[spec.kind]
    # Beside files of the user's own, a configuration tells when they are of another size.
    if folder is not None and "config" in have.found:
        config = _configured(official.spec.family, have.found["config"], config)
    package = spec.backend == "package"
    by_role = {asset.role: asset.size for asset in official.assets}
    stored = sum(
        have.found[role].stat().st_size if role in have.found else by_role.get(role, 0) for role in ("weights", "head")
    )
    described, element = official.spec, 4 if package else element
    need = network_need(described.family, config, element=element, tokens=described.max_tokens)
    return Judge(need, described.image_size, described.fit == "pad", stored, have.missing, package)


def _configured(family: str, path: Path, usual: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return usual
    if family == "aesthetic" and "vision_config" in given:
        tower = {**given["vision_config"], "projection_dim": given.get("projection_dim", 512)}
        return {**usual, "tower": tower}
    wanted = {"clip": "vision_config", "image_reward": "vision", "mps": "cross"}.get(family, "")
    return given if wanted in given else usual


def _family(spec: RewardSettings, element: int) -> Judge:
    """From a family's folder: config.json, and the sizes of its files.

    Raises:
        CraftError: it is not there or not right.
    """
    from craft_fast.rewards.base import read_preprocessing
    from craft_fast.rewards.loaders import reward_folder

    folder = reward_folder(spec.path, offline=True)
    described = read_preprocessing(folder, spec.kind)
    files = [folder / "model.safetensors", folder / "head.safetensors"]
    stored = sum(file.stat().st_size for file in files if file.is_file())
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if described.family == "aesthetic":
            config = {"tower": config.get("vision_config", config), "head": _head_sizes(folder)}
        need = network_need(described.family, config, element=element, tokens=described.max_tokens)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentProblem(
            "A reward's folder does not say its sizes", where=str(folder), why=str(error)
        ) from None
    return Judge(need, described.image_size, described.fit == "pad" and described.resize != "none", stored)


def _head_sizes(folder: Path) -> list[int]:
    from craft_fast.sdxl.identify import read_header

    shapes = read_header(folder / "head.safetensors").shapes
    return [shapes[f"layers.{index}.weight"][0] for index in (0, 2, 4, 6)]


def network_need(family: str, config: Mapping[str, Any], *, element: int, tokens: int) -> Need:
    """A network's cost in the words of those that schedule it.

    Args:
        family: clip, aesthetic, image_reward or mps.
        config: as in ``rewards.published.OFFICIAL``.
        element: bytes of a value of weights and states.
        tokens: of a prompt.
    """
    from craft_fast.rewards.costs import network_cost
    from craft_fast.rewards.network_reward import Need

    cost = network_cost(family, config, element=element, max_tokens=tokens)
    return Need(cost.weight_bytes(element), cost.image_bytes, cost.image_flops / 1e9)


# ---- memory


def shaping_bytes(images: int, *, height_px: int, width_px: int, side_px: int, pads: bool) -> int:
    """Most that shaping takes: pictures are made S x S, some at a time, before they are looked at.

    Args:
        images: in a chunk.
        height_px: of a picture.
        width_px: of a picture.
        side_px: S.
        pads: as floats: a picture's bytes and its floats; else bytes, and integers of the first pass.
    """
    picture = 3 * height_px * width_px
    some = min(images, max(1, _SHAPING_BYTES // (4 * picture)))
    kept = images * 3 * side_px**2 * (4 if pads else 1)
    if pads:
        return kept + some * (1 + 4) * picture
    if (height_px, width_px) == (side_px, side_px):
        return kept + some * picture
    each = 3 * max(height_px, side_px) * side_px * 12
    return kept + some * picture + min(some, max(1, _SHAPING_BYTES // each)) * each


def at_once(need: Need, images: int, room: int) -> int:
    """How many pictures go through a network at a time, as ``NetworkReward.images_at_once`` has it."""
    if need.image_bytes <= 0:
        return images
    return min(images, max(1, (room - need.weight_bytes) // need.image_bytes))


def scoring_bytes(
    need: Need, *, images: int, images_at_once: int, height_px: int, width_px: int, side_px: int, pads: bool, gpu: bool
) -> int:
    """Weights, and the most of what shaping and the network work on, for a chunk of pictures.

    Args:
        need: of the network.
        images: in a chunk.
        images_at_once: in a forward.
        height_px: of a picture.
        width_px: of a picture.
        side_px: S.
        pads: see ``shaping_bytes``.
        gpu: the decoded pictures are elsewhere, and cuBLAS has its workspace.
    """
    shaping = shaping_bytes(images, height_px=height_px, width_px=width_px, side_px=side_px, pads=pads)
    pixels = images * 3 * side_px**2 * (4 if pads else 1)
    working = max(shaping, pixels + images_at_once * need.image_bytes)
    return need.weight_bytes + working + (CUBLAS_BYTES if gpu else images * 3 * height_px * width_px)


def package_bytes(judge: Judge) -> int:
    """What the authors' package takes beside this process: weights in float32, and a context of its own."""
    return judge.need.weight_bytes + judge.need.image_bytes + CONTEXT_BYTES


# ---- what is to be fetched


def to_fetch(found: Mapping[str, Judge | None]) -> dict[str, Asset]:
    """Missing files of published models by their place; files that two models share once."""
    return {asset.key: asset for judge in found.values() if judge is not None for asset in judge.fetch}
