"""The three network families of the published reward models, at any size, over transformers' own classes.

Shapes: B batch, S image side in pixels, T tokens, D embedding.
Families: CLIP dual encoder (HPSv2.1, arXiv 2306.09341; PickScore, arXiv 2305.01569), CLIP image tower with an MLP
(LAION aesthetic predictor V2), BLIP cross-encoder with an MLP (ImageReward, arXiv 2304.05977).
Files are safetensors and JSON; keys are checked strictly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from craft_fast.errors import IntegrityError
from craft_fast.sdxl.published import materialize
from craft_fast.store.atomic import write_json, write_safetensors
from craft_fast.store.safe_load import load_safetensors


class ScoreHead(nn.Module):
    """Five linear layers with dropouts and no activations, as LAION's and ImageReward's heads are.

    Args:
        width: D, size of the embedding.
        hidden: sizes of the four inner layers; the published heads use (1024, 128, 64, 16).
    """

    def __init__(self, width: int, hidden: tuple[int, int, int, int] = (1024, 128, 64, 16)) -> None:
        super().__init__()
        first, second, third, fourth = hidden
        self.layers = nn.Sequential(
            nn.Linear(width, first),
            nn.Dropout(0.2),
            nn.Linear(first, second),
            nn.Dropout(0.2),
            nn.Linear(second, third),
            nn.Dropout(0.1),
            nn.Linear(third, fourth),
            nn.Linear(fourth, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Embedding [B, D] to score [B]."""
        score: Tensor = self.layers(embedding).squeeze(-1)
        return score


def _strict(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise IntegrityError(
            "The reward's weights do not fit its configuration.",
            where=str(where),
            why=f"missing keys: {sorted(missing)[:5]}, unexpected keys: {sorted(unexpected)[:5]}",
            hint="use the checkpoint that belongs to this reward.json",
        )


def _unfilled(make: Callable[[], Any]) -> Any:
    """A network whose weights a file will fill, without drawing random ones first: 6 s for CLIP ViT-L on one core.

    Where memory is short, rewards are read again for every block of candidates.
    """
    with torch.device("meta"):
        network = make()
    materialize(network, "cpu", torch.float32)
    return network


def _head_sizes(tensors: dict[str, Tensor]) -> tuple[int, tuple[int, int, int, int]]:
    rows = [tensors[f"layers.{i}.weight"].shape[0] for i in (0, 2, 4, 6)]
    return tensors["layers.0.weight"].shape[1], (rows[0], rows[1], rows[2], rows[3])


class ClipReward(nn.Module):
    """Cosine of the image and text embeddings, times ``score_scale``."""

    def __init__(self, clip: CLIPModel, score_scale: float = 1.0) -> None:
        super().__init__()
        self.clip = clip
        self.score_scale = score_scale

    def image_embedding(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to unit embeddings [B, D]."""
        pooled = self.clip.vision_model(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(self.clip.visual_projection(pooled), dim=-1)

    def text_embedding(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids [B, T] to unit embeddings [B, D]."""
        pooled = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(self.clip.text_projection(pooled), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B] of pixels [B, 3, S, S] against token ids [B, T]."""
        image = self.image_embedding(pixel_values)
        text = self.text_embedding(input_ids, attention_mask)
        return (image * text).sum(-1) * self.score_scale

    def save_folder(self, folder: Path) -> None:
        """Write weights and configuration in transformers' layout."""
        write_json(folder / "config.json", self.clip.config.to_dict())
        write_safetensors(folder / "model.safetensors", self.clip.state_dict(), metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path, score_scale: float = 1.0) -> ClipReward:
        """Read a ``CLIPModel`` folder.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = CLIPModel.config_class.from_pretrained(folder, local_files_only=True)
        clip = _unfilled(lambda: CLIPModel(config))
        tensors = load_safetensors(folder / "model.safetensors")
        # Older checkpoints carry position ids, which are constants that transformers now builds itself.
        _strict(clip, {k: v.float() for k, v in tensors.items() if not k.endswith("position_ids")}, folder)
        return cls(clip, score_scale)


class AestheticReward(nn.Module):
    """CLIP image tower, unit embedding, linear head; the text is not looked at."""

    def __init__(self, tower: CLIPVisionModelWithProjection, head: ScoreHead) -> None:
        super().__init__()
        self.tower = tower
        self.head = head

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Scores [B] of pixels [B, 3, S, S]."""
        embedding = nn.functional.normalize(self.tower(pixel_values=pixel_values).image_embeds, dim=-1)
        score: Tensor = self.head(embedding)
        return score

    def save_folder(self, folder: Path) -> None:
        """Write tower and head (``head.safetensors``, LAION's key names)."""
        write_json(folder / "config.json", self.tower.config.to_dict())
        write_safetensors(folder / "model.safetensors", self.tower.state_dict(), metadata={"format": "pt"})
        write_safetensors(folder / "head.safetensors", self.head.state_dict())

    @classmethod
    def from_folder(cls, folder: Path) -> AestheticReward:
        """Read tower and head.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = CLIPVisionModelWithProjection.config_class.from_pretrained(folder, local_files_only=True)
        tower = _unfilled(lambda: CLIPVisionModelWithProjection(config))
        tensors = load_safetensors(folder / "model.safetensors")
        _strict(tower, {k: v.float() for k, v in tensors.items() if not k.endswith("position_ids")}, folder)
        head_tensors = load_safetensors(folder / "head.safetensors")
        head = ScoreHead(*_head_sizes(head_tensors))
        _strict(head, {k: v.float() for k, v in head_tensors.items()}, folder / "head.safetensors")
        return cls(tower, head)


class ImageReward(nn.Module):
    """BLIP text encoder that cross-attends to the image's patch states; head on its first token."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = BlipVisionModel(BlipVisionConfig(**config["vision"]))
        text = BlipTextConfig(**config["text"], encoder_hidden_size=config["vision"]["hidden_size"], is_decoder=True)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = ScoreHead(config["text"]["hidden_size"], tuple(config["mlp"]))
        self.score_mean = 0.0
        self.score_std = 1.0

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B] of pixels [B, 3, S, S] against token ids [B, T]."""
        patches = self.visual_encoder(pixel_values=pixel_values).last_hidden_state
        states = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            is_decoder=False,
        ).last_hidden_state
        score: Tensor = (self.mlp(states[:, 0]) - self.score_mean) / self.score_std
        return score

    def save_folder(self, folder: Path) -> None:
        """Write ``config.json`` {vision, text, mlp} and ``model.safetensors``."""
        write_json(folder / "config.json", self.config)
        write_safetensors(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_folder(cls, folder: Path, score_mean: float = 0.0, score_std: float = 1.0) -> ImageReward:
        """Read a folder that ``save_folder`` wrote.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network: ImageReward = _unfilled(lambda: cls(config))
        tensors = load_safetensors(folder / "model.safetensors")
        _strict(network, {k: v.float() for k, v in tensors.items()}, folder)
        network.score_mean, network.score_std = score_mean, score_std
        return network
