"""Latents to images and back.

Shapes: B images, H x W pixels, h x w latent pixels. Latents are in UNet space: VAE latents times ``scaling_factor``.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from craft_fast.errors import CraftError
from craft_fast.sdxl.load import SdxlModel

# Decoder activations are the largest tensors of generation: about 1 KiB a pixel in fp32 at SDXL's widths.
_PIXELS_AT_ONCE = 1024 * 1024


@torch.inference_mode()
def decode_latents(model: SdxlModel, latents: torch.Tensor) -> torch.Tensor:
    """Decode to images; at most about a megapixel at a time.

    Args:
        model: the SDXL; its VAE's dtype is used.
        latents: [B, 4, h, w], any float dtype, UNet space.

    Returns:
        uint8 [B, 3, H, W] on the CPU.

    Raises:
        CraftError: the VAE returned NaN or infinity.
    """
    vae = model.vae
    pixels = latents.shape[-2] * latents.shape[-1] * model.vae_scale_factor**2
    scaled = _to_vae_space(vae, latents.to(model.device, torch.float32))
    images = []
    for part in torch.split(scaled, max(1, _PIXELS_AT_ONCE // pixels)):
        image = vae.decode(part.to(vae.dtype), return_dict=False)[0].float()
        if not bool(torch.isfinite(image).all()):
            raise CraftError(
                "The VAE returned NaN or infinity",
                where=str(model.path / "vae"),
                why=f"decoding in {vae.dtype}",
                hint="--set model.dtype=bfloat16 or float32",
            )
        images.append((image * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu())
    return torch.cat(images)


@torch.no_grad()
def encode_images(model: SdxlModel, images: torch.Tensor) -> torch.Tensor:
    """Encode to the mode of the VAE's posterior: no randomness.

    Args:
        model: the SDXL.
        images: uint8 [B, 3, H, W].

    Returns:
        float32 [B, 4, h, w], UNet space, on the model's device.
    """
    vae = model.vae
    parts = []
    for part in torch.split(images, max(1, _PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))):
        pixels = part.to(model.device, torch.float32) / 127.5 - 1
        parts.append(vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float())
    return _to_unet_space(vae, torch.cat(parts))


def png_bytes(image: torch.Tensor) -> bytes:
    """A uint8 [3, H, W] image as PNG; the same bytes for the same pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _mean_std(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Per-channel statistics that some SDXL descendants carry; SDXL itself has none."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)


def _to_vae_space(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    factor = float(vae.config.scaling_factor)
    statistics = _mean_std(vae, latents)
    return latents / factor if statistics is None else latents * statistics[1] / factor + statistics[0]


def _to_unet_space(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    factor = float(vae.config.scaling_factor)
    statistics = _mean_std(vae, latents)
    return latents * factor if statistics is None else (latents - statistics[0]) * factor / statistics[1]
