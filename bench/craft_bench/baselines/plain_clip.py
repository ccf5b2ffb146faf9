"""transformers' CLIPModel in float32, called as PickScore's page shows it: what most scripts that score pictures do.

https://huggingface.co/yuvalkirstain/PickScore_v1: a processor for each call, pictures and texts through the model,
unit embeddings, ``logit_scale.exp() * cosine``. Weights are a copy of those that ours has.

Shapes: B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PlainClip:
    """The model, the tokenizer and the processor of pictures.

    Args:
        state: of a CLIPModel, on the device, in float32.
        config: of that CLIPModel, as a dict.
        tokenizer: of transformers.
        max_tokens: of a prompt.
        side: of the network's pictures.
        pad: longest side to ``side`` and floats that are not rounded, as HPSv2 does; else PIL, cropped.
        device: where.
    """

    def __init__(
        self, state: dict[str, Tensor], config: dict[str, Any], tokenizer: Any, *, max_tokens: int, side: int,
        pad: bool, device: torch.device,
    ) -> None:  # fmt: skip
        from transformers import CLIPConfig, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        with torch.device("meta"):
            self.model: Any = CLIPModel(CLIPConfig(**config))
        self.model.load_state_dict(state, assign=True)
        _fill_position_ids(self.model, device)
        self.model.eval().requires_grad_(False)
        self.tokenizer, self.max_tokens, self.pad, self.side, self.device = tokenizer, max_tokens, pad, side, device
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines of pictures uint8 [B, 3, H, W] on the CPU and B prompts, float32 [B] on the CPU."""
        pixels = self._padded(images) if self.pad else self._processed(images)
        texts = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        pooled = self.model.text_model(input_ids=texts["input_ids"].to(self.device)).pooler_output
        text = F.normalize(self.model.text_projection(pooled), dim=-1)
        seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        image = F.normalize(self.model.visual_projection(seen), dim=-1)
        return (image * text).sum(-1).cpu()

    def _processed(self, images: Tensor) -> Tensor:
        found: Tensor = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_first")[
            "pixel_values"
        ]
        return found

    def _padded(self, images: Tensor) -> Tensor:
        """Square pictures alone: there is nothing to pad then."""
        small = F.interpolate(images / 255, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        return (small - mean) / std


def _fill_position_ids(model: Any, device: torch.device) -> None:
    """Buffers that no file holds: 0, 1, 2, ..."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.arange(buffer.shape[-1], device=device).expand(1, -1)
