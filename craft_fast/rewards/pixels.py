"""Pictures to a reward network's pixels.

Shapes: B batch, H, W picture, S the network's image side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError
from craft_fast.rewards.base import REWARD_FILE, Preprocessing


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
