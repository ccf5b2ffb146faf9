"""CLIP image tower with an MLP: LAION's aesthetic predictor V2 (improved-aesthetic-predictor)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from craft_fast.rewards.networks.filling import TensorFile, fill, read_tensors, unfilled
from craft_fast.rewards.networks.head import ScoreHead
from craft_fast.store.atomic import write_json, write_safetensors


class AestheticReward(nn.Module):
    """CLIP image tower, unit embedding, linear head; the text is not looked at."""

    def __init__(self, tower: CLIPVisionModelWithProjection, head: ScoreHead) -> None:
        super().__init__()
        self.tower = tower
        self.head = head

    def image_embedding(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to unit embeddings, float32 [B, D]."""
        weight = self.tower.visual_projection.weight
        return F.normalize(self.tower(pixel_values=pixel_values.to(weight.dtype)).image_embeds.float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Nothing: the text is not looked at."""
        return ()

    def score_encoded(self, pixel_values: Tensor) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S]."""
        dtype = next(self.head.parameters()).dtype
        score: Tensor = self.head(self.image_embedding(pixel_values).to(dtype))
        return score.float()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S]."""
        return self.score_encoded(pixel_values)

    def save_folder(self, folder: Path) -> None:
        """Write tower and head (``head.safetensors``, LAION's key names)."""
        write_json(folder / "config.json", self.tower.config.to_dict())
        write_safetensors(folder / "model.safetensors", self.tower.state_dict(), metadata={"format": "pt"})
        write_safetensors(folder / "head.safetensors", self.head.state_dict())

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype = torch.float32) -> AestheticReward:
        """Read tower and head.

        Args:
            folder: with ``config.json``, ``model.safetensors`` and ``head.safetensors``.
            dtype: of the tower's weights; the head's are float32.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = CLIPVisionModelWithProjection.config_class.from_pretrained(folder, local_files_only=True)
        tower = unfilled(lambda: CLIPVisionModelWithProjection(config), dtype)
        fill(tower, read_tensors(folder / "model.safetensors"), dtype)
        return cls(tower, read_head(read_tensors(folder / "head.safetensors"))).eval()


def read_head(tensors: TensorFile) -> ScoreHead:
    """The head of a file with LAION's key names, in float32: 3.7 MB, and rounding adds up over five layers.

    Raises:
        IntegrityError: keys missing or left over.
    """
    width, *rest = head_sizes(tensors.shapes)
    first, second, third, fourth = rest
    head: ScoreHead = unfilled(lambda: ScoreHead(width, (first, second, third, fourth)), torch.float32)
    fill(head, tensors, torch.float32)
    return head


def head_sizes(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> tuple[int, int, int, int, int]:
    """Width of the embedding and of the four inner layers; zeros stand for what is not there or not a matrix."""
    found = [shapes.get(f"{prefix}layers.{index}.weight", ()) for index in (0, 2, 4, 6)]
    rows = [shape[0] if len(shape) == 2 else 0 for shape in found]
    return (found[0][1] if len(found[0]) == 2 else 0), rows[0], rows[1], rows[2], rows[3]
