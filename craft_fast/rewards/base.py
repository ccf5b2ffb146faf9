"""What every reward is, and how pictures are prepared for a reward network.

Shapes: B batch, H, W picture, S the network's image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
REWARD_FILE = "reward.json"

Triple = tuple[float, float, float]


class Reward(Protocol):
    """A judge of pictures against prompts; higher is better.

    Attributes:
        name: short name, as in the settings.
        held_out: never filters or weights; only judges the result.
        key: digest of weights and preprocessing; equal keys give equal scores.
    """

    name: str
    held_out: bool
    key: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures.

        Args:
            images: uint8 [B, 3, H, W], RGB.
            prompts: B texts.

        Returns:
            float32 [B] on the CPU, in the reward's own unit.
        """

    def rest(self) -> None:
        """Leave the accelerator's memory to others until the next ``score``."""

    def close(self) -> None:
        """Free the network; ``score`` may not be called again."""


class Preprocessing(BaseModel):
    """The content of ``reward.json``: the family, and how its inputs are made.

    ``fit``: how a picture becomes S x S. crop: shortest side to S, centre crop, pixels rounded as PIL does
    (PickScore, LAION, ImageReward). pad: longest side to S, zeros around (HPSv2). stretch: both sides to S.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    family: Literal["clip", "aesthetic", "image_reward"]
    image_size: int = Field(default=224, ge=8, le=2048)
    resize: Literal["none", "bicubic"] = "bicubic"
    fit: Literal["crop", "pad", "stretch"] = "crop"
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    max_tokens: int = Field(default=77, ge=2, le=4096)
    score_scale: float | Literal["logit_scale"] = 1.0
    score_mean: float = 0.0
    score_std: float = Field(default=1.0, gt=0)
    tokenizer: str | None = None


# PickScore as published: a CLIPModel folder without a reward.json, its score logit_scale.exp() * cosine.
PICKSCORE = Preprocessing(family="clip", score_scale="logit_scale", tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


def read_preprocessing(folder: Path, kind: str) -> Preprocessing:
    """Read a reward folder's ``reward.json``; a clip folder without one is taken as PickScore's.

    Args:
        folder: of the reward.
        kind: the settings' kind, which the file's family must equal.

    Raises:
        ConfigError: missing where it is needed, not JSON, unknown keys, values out of range, or another family.
    """
    path = folder / REWARD_FILE
    if not path.is_file():
        if kind == "clip":
            return PICKSCORE
        raise ConfigError(
            "The reward's folder does not say how its pictures are prepared.",
            where=str(path),
            why="there is no such file",
            hint=f'write one that holds at least {{"family": "{kind}", "image_size": 224, "resize": "bicubic"}}',
        )
    try:
        found = Preprocessing.model_validate_json(path.read_bytes())
    except ValidationError as err:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors(include_url=False)]
        raise ConfigError("A reward.json is not right.", where=str(path), why="; ".join(problems)[:1000]) from None
    if found.family != kind:
        raise ConfigError(
            "A reward is not of the kind that the settings say.",
            where=str(path),
            why=f"its family is {found.family}, the settings say kind: {kind}",
            hint=f"set its kind to {found.family}",
        )
    return found


def prepare(images: Tensor, spec: Preprocessing) -> Tensor:
    """Pictures to a network's pixels: resized, cropped or padded, normalised.

    Args:
        images: uint8 [B, 3, H, W].
        spec: how.

    Returns:
        float32 [B, 3, S, S] on the pictures' device.

    Raises:
        ConfigError: ``resize`` is none and the pictures are not S x S.
    """
    size = spec.image_size
    pixels = images.to(torch.float32)
    if spec.resize == "none" or tuple(images.shape[2:]) == (size, size):
        if tuple(images.shape[2:]) != (size, size):
            height, width = images.shape[2:]
            raise ConfigError(
                "A reward takes pictures of one size only.",
                where=REWARD_FILE,
                why=f"pictures of {width}x{height} px, the reward takes {size}x{size} and its resize is none",
                hint=f"set generate.width_px and generate.height_px to {size}, or resize to bicubic",
            )
        return _standardise(pixels / 255, spec)
    if spec.fit == "pad":
        return _standardise(_pad(_resize(pixels, size, longest=True) / 255, size), spec)
    if spec.fit == "stretch":
        return _standardise(_round(_bicubic(pixels, (size, size))) / 255, spec)
    pixels = _round(_resize(pixels, size, longest=False))
    top, left = (pixels.shape[2] - size) // 2, (pixels.shape[3] - size) // 2
    return _standardise(pixels[:, :, top : top + size, left : left + size] / 255, spec)


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def _resize(pixels: Tensor, size: int, *, longest: bool) -> Tensor:
    """One side, the longest or the shortest, to ``size``; the other in proportion."""
    height, width = pixels.shape[2:]
    if longest:  # HPSv2 rounds the other side
        scale = size / max(height, width)
        return _bicubic(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))
    short = min(height, width)  # transformers and PIL's users cut it off
    return _bicubic(pixels, (size * height // short, size * width // short))


def _round(pixels: Tensor) -> Tensor:
    """PIL resizes bytes into bytes; HPSv2 resizes floats and rounds nothing."""
    return pixels.round().clamp(0, 255)


def _pad(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[2:]
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(pixels, (left, size - width - left, top, size - height - top))


def _standardise(pixels: Tensor, spec: Preprocessing) -> Tensor:
    mean = torch.tensor(spec.mean, device=pixels.device).reshape(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).reshape(1, 3, 1, 1)
    return (pixels - mean) / std
