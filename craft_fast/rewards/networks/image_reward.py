"""BLIP cross-encoder with an MLP: ImageReward (arXiv 2304.05977)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from craft_fast.rewards.networks.attention import fuse_blip_attention
from craft_fast.rewards.networks.filling import fill, read_tensors, unfilled
from craft_fast.rewards.networks.head import ScoreHead
from craft_fast.store.atomic import write_json, write_safetensors


class ImageReward(nn.Module):
    """BLIP text encoder that cross-attends to the image's patch states; head on its first token.

    Args:
        config: ``vision`` and ``text`` (values of transformers' Blip configurations), ``mlp`` (four inner sizes).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = BlipVisionModel(BlipVisionConfig(**config["vision"]))
        text = BlipTextConfig(**config["text"], encoder_hidden_size=config["vision"]["hidden_size"], is_decoder=True)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = ScoreHead(config["text"]["hidden_size"], tuple(config["mlp"]))
        self.score_mean = 0.0
        self.score_std = 1.0
        fuse_blip_attention(self)

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to states [B, P, D] of the patches and of the class token."""
        weight = self.visual_encoder.embeddings.patch_embedding.weight
        states: Tensor = self.visual_encoder(pixel_values=pixel_values.to(weight.dtype)).last_hidden_state
        return states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """The tokens themselves, int64 [B, T] each: the text encoder looks at the picture in every layer."""
        return input_ids, attention_mask

    def score_encoded(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against what ``encode_text`` gave."""
        # No mask over the patches: all are there, and a mask of ones only keeps faster kernels out.
        states = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.image_states(pixel_values),
            is_decoder=False,
        ).last_hidden_state
        score: Tensor = self.mlp(states[:, 0].to(next(self.mlp.parameters()).dtype)).float()
        return (score - self.score_mean) / self.score_std

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against token ids [B, T]."""
        return self.score_encoded(pixel_values, input_ids, attention_mask)

    def save_folder(self, folder: Path) -> None:
        """Write ``config.json`` {vision, text, mlp} and ``model.safetensors``."""
        write_json(folder / "config.json", self.config)
        write_safetensors(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_folder(
        cls, folder: Path, score_mean: float = 0.0, score_std: float = 1.0, *, dtype: torch.dtype = torch.float32
    ) -> ImageReward:
        """Read a folder that ``save_folder`` wrote.

        Args:
            folder: with ``config.json`` and ``model.safetensors``.
            score_mean: taken off the head's output.
            score_std: what that is divided by.
            dtype: of the weights, but the head's, which are float32.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network: ImageReward = unfilled(lambda: cls(config), dtype)
        fill(network, read_tensors(folder / "model.safetensors"), dtype)
        network.mlp.float()
        network.score_mean, network.score_std = score_mean, score_std
        return network
