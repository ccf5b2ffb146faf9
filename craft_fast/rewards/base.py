"""What every reward is, and what a reward folder says about itself.

Shapes: B batch, H, W picture, S the network's image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from craft_fast.errors import ConfigError
from craft_fast.records import Provenance

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
REWARD_FILE = "reward.json"

Triple = tuple[float, float, float]


class Reward(Protocol):
    """A judge of pictures against prompts; higher is better.

    Attributes:
        name: short name, as in the settings.
        held_out: never filters or weights; only judges the result.
        key: digest of weights, preprocessing and settings; equal keys give equal scores on equal machines.
        provenance: how its scores come about on this machine; known without the network being read.
    """

    name: str
    held_out: bool
    key: str
    provenance: Provenance

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures.

        Args:
            images: uint8 [B, 3, H, W], RGB.
            prompts: B texts.

        Returns:
            float32 [B] on the CPU, in the reward's own unit.
        """

    def memory_bytes(self, images: int) -> int:
        """Memory that scoring ``images`` at once takes on its device, weights included; 0: not known, or none."""

    def cost(self) -> float:
        """Operations for one picture, in GFLOP; 0: not known. Only the order of rewards follows it."""

    def rest(self) -> None:
        """Leave the accelerator's memory to others until the next ``score``."""

    def close(self) -> None:
        """Free the network; ``score`` may not be called again."""


class Preprocessing(BaseModel):
    """The content of ``reward.json``: the family, how its inputs are made, and how its output becomes a score.

    Attributes:
        family: of the network.
        image_size: S, pixels.
        resize: none: pictures are S x S already; bicubic: as ``fit`` says.
        fit: how a picture becomes S x S. crop: shortest side to S, centre crop, bytes into bytes as PIL does
            (PickScore, LAION, ImageReward, MPS, CLIPScore). pad: longest side to S, zeros around, floats that are not
            rounded (HPSv2). stretch: both sides to S, as PIL does.
        antialias: of ``pad``; torchvision before 0.17 had none there, so published HPSv2 scores differ in it.
        crop_rounding: where a crop begins that does not divide evenly: floor, as transformers does (PickScore, MPS,
            CLIPScore ViT-L/14), or round to even, as torchvision does (LAION, ImageReward, CLIPScore ViT-B/32); one
            pixel off on 1216x832.
        mean, std: of each channel.
        max_tokens: of a prompt, start and end included; longer ones are cut.
        text: open_clip: mended (ftfy), HTML entities resolved twice, whitespace collapsed, as open_clip does before its
            BPE; plain: as it is.
        prefix: put before every prompt.
        score_scale: what the cosine is multiplied by.
        score_floor: lower scores become this.
        score_mean, score_std: the score is shifted and scaled by.
        condition, threshold: MPS: the text whose likeness selects a prompt's tokens, and how like they must be.
        tokenizer: folder or hub id, where the reward's folder has none of its own.
        note: told in the provenance of every score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    family: Literal["clip", "aesthetic", "image_reward", "mps"]
    image_size: int = Field(default=224, ge=8, le=2048)
    resize: Literal["none", "bicubic"] = "bicubic"
    fit: Literal["crop", "pad", "stretch"] = "crop"
    antialias: bool = True
    crop_rounding: Literal["floor", "round"] = "floor"
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    max_tokens: int = Field(default=77, ge=2, le=4096)
    text: Literal["open_clip", "plain"] = "open_clip"
    prefix: str = ""
    score_scale: float | Literal["logit_scale"] = 1.0
    score_floor: float | None = None
    score_mean: float = 0.0
    score_std: float = Field(default=1.0, gt=0)
    condition: str = ""
    threshold: float = 0.0
    tokenizer: str | None = None
    note: str = ""


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
