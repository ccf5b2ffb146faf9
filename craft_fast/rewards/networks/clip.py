"""CLIP dual encoder: HPSv2.1 (arXiv 2306.09341), PickScore (arXiv 2305.01569), CLIPScore (arXiv 2104.08718)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from craft_fast.rewards.networks.filling import fill, read_tensors, unfilled
from craft_fast.store.atomic import write_json, write_safetensors


class ClipReward(nn.Module):
    """Cosine of the image and text embeddings, times ``score_scale``.

    No padding mask is used: attention is causal and the state is taken at the first end token, which no token behind
    it reaches, so any padding gives the same embedding.

    Args:
        clip: the dual encoder.
        score_scale: what the cosine is multiplied by.
    """

    def __init__(self, clip: CLIPModel, score_scale: float = 1.0) -> None:
        super().__init__()
        self.clip = clip
        self.score_scale = score_scale

    def image_embedding(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to unit embeddings, float32 [B, D]."""
        weight = self.clip.visual_projection.weight
        pooled = self.clip.vision_model(pixel_values=pixel_values.to(weight.dtype)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def text_embedding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, T] to unit embeddings, float32 [B, D]; the mask is not looked at, see above."""
        pooled = self.clip.text_model(input_ids=input_ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """What ``score_encoded`` takes: unit embeddings, float32 [B, D]."""
        return (self.text_embedding(input_ids, attention_mask),)

    def score_encoded(self, pixel_values: Tensor, text: Tensor) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against what ``encode_text`` gave."""
        return (self.image_embedding(pixel_values) * text).sum(-1) * self.score_scale

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against token ids [B, T]."""
        return self.score_encoded(pixel_values, *self.encode_text(input_ids, attention_mask))

    def logit_scale(self) -> float:
        """The factor that the model was trained with: e to the stored value, about 100."""
        return float(self.clip.logit_scale.detach().double().exp())

    def save_folder(self, folder: Path) -> None:
        """Write weights and configuration in transformers' layout."""
        write_json(folder / "config.json", self.clip.config.to_dict())
        write_safetensors(folder / "model.safetensors", self.clip.state_dict(), metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path, score_scale: float = 1.0, *, dtype: torch.dtype = torch.float32) -> ClipReward:
        """Read a ``CLIPModel`` folder.

        Args:
            folder: with ``config.json`` and ``model.safetensors``.
            score_scale: see the class.
            dtype: of the weights.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = CLIPModel.config_class.from_pretrained(folder, local_files_only=True)
        clip = unfilled(lambda: CLIPModel(config), dtype)
        fill(clip, read_tensors(folder / "model.safetensors"), dtype)
        return cls(clip, score_scale).eval()
