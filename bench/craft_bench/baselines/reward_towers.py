"""Image towers as large as those of the published rewards, with random weights: what scoring costs.

HPSv2.1 and PickScore are CLIP ViT-H/14 (https://github.com/mlfoundations/open_clip, model_configs/ViT-H-14.json); the
LAION aesthetic predictor V2 is CLIP ViT-L/14. A prompt's text is encoded once, an image by every tower, so the image
towers are what counts. Weights in float32 under float16 autocast, as our rewards run them on a GPU.

Shapes: B images, S their side in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_fast.sdxl.published import materialize

HUGE: dict[str, int] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 1024,
}  # fmt: skip
LARGE: dict[str, int] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
SMALL: dict[str, int] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
FULL = (HUGE, HUGE, LARGE)  # h, p, a
TINY = (SMALL, SMALL, SMALL)


class RewardTowers:
    """The towers of the three rewards that judge a candidate.

    Args:
        configs: one for each reward.
        device: where.
        seed: of the weights.
    """

    def __init__(self, configs: tuple[dict[str, int], ...], *, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.towers = [_tower(config, device, seed + index) for index, config in enumerate(configs)]
        self.sides = [config["image_size"] for config in configs]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Embed images with every tower, one after the other.

        Args:
            images: uint8 [B, 3, H, W], on any device.

        Returns:
            float32 [B, towers]: the first number of each embedding, so that nothing of the work can be left out.
        """
        pixels = images.to(self.device, torch.float32) / 127.5 - 1.0
        firsts = []
        for tower, side in zip(self.towers, self.sides, strict=True):
            small = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
            firsts.append(tower(pixel_values=small.to(tower.dtype)).image_embeds[:, 0].float())
        return torch.stack(firsts, dim=1)


def _tower(config: dict[str, int], device: torch.device, seed: int) -> Any:
    import transformers

    with torch.device("meta"):
        tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    materialize(tower, device, torch.float16 if device.type == "cuda" else torch.float32)
    draw = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith(".weight") else 0.0)  # of norms; biases and the class token
                continue
            parameter.normal_(0.0, float(parameter.shape[1:].numel()) ** -0.5, generator=draw)
    return tower.eval().requires_grad_(False)
