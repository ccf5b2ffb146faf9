"""Latents to images and back, whole or in strips, in whatever dtype the VAE has.

Shapes: B images, H x W pixels, h x w latent pixels. Latents are in UNet space: VAE latents times ``scaling_factor``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from craft_fast.errors import CraftError, ResourceError
from craft_fast.sdxl import vae_strips
from craft_fast.sdxl.costs_parts import vae_cost
from craft_fast.sdxl.load import SdxlModel, free_memory

# Decoder activations are the largest tensors of generation, so no more than this is decoded in one call.
_PIXELS_AT_ONCE = 1024 * 1024
# Kept free beside the estimate, for cuDNN's workspaces and the fragments of the allocator.
_MARGIN_BYTES = 256 * 1024**2


@dataclass
class Concessions:
    """What memory and precision have forced so far, so that it is neither tried nor said again in the same run.

    Attributes:
        images_at_once: images denoised together, after a larger number did not fit; None: as the settings say.
        no_graphs: the denoising step fits, its recording did not.
        strips: whole images did not fit the VAE.
        said_float32: it was said that the VAE overflows in its dtype.
    """

    images_at_once: int | None = None
    no_graphs: bool = False
    strips: bool = False
    said_float32: bool = False


def _silent(message: str) -> None:
    return None


@torch.inference_mode()
def decode_latents(
    model: SdxlModel,
    latents: torch.Tensor,
    *,
    concessions: Concessions | None = None,
    warn: Callable[[str], None] = _silent,
) -> torch.Tensor:
    """Decode to images; at most about a megapixel at a time, in strips where ``engine.vae_tiling`` says so.

    What comes out of a half-precision VAE as NaN or infinity is decoded again in float32.

    Args:
        model: the SDXL; its VAE's dtype is used.
        latents: [B, 4, h, w], any float dtype, UNet space.
        concessions: of this run; changed when memory or precision runs out.
        warn: told of that.

    Returns:
        uint8 [B, 3, H, W] on the CPU.

    Raises:
        CraftError: the VAE returned NaN or infinity, in float32 too. ResourceError: it does not fit, in strips either.
    """
    vae, factor = model.vae, model.vae_scale_factor
    size = latents.shape[-2] * factor, latents.shape[-1] * factor
    work = _Work(model, concessions or Concessions(), warn, "decode", *size)
    scaled = _to_vae_space(vae, latents.to(model.device, torch.float32))
    images = []
    for part in torch.split(scaled, max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))):
        image = work(part, lambda x: vae.decode(x, return_dict=False)[0], lambda x: vae_strips.decode(vae, x))
        images.append((image * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu())
    return torch.cat(images)


@torch.no_grad()
def encode_images(
    model: SdxlModel,
    images: torch.Tensor,
    *,
    concessions: Concessions | None = None,
    warn: Callable[[str], None] = _silent,
) -> torch.Tensor:
    """Encode to the mode of the VAE's posterior: no randomness. Strips and dtypes as in ``decode_latents``.

    Args:
        model: the SDXL.
        images: uint8 [B, 3, H, W].
        concessions: of this run; changed when memory or precision runs out.
        warn: told of that.

    Returns:
        float32 [B, 4, h, w], UNet space, on the model's device.

    Raises:
        CraftError, ResourceError: as ``decode_latents``.
    """
    vae, size = model.vae, tuple(images.shape[-2:])
    work = _Work(model, concessions or Concessions(), warn, "encode", *size)
    parts = []
    for part in torch.split(images, max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))):
        scaled = part.to(model.device, torch.float32) / 127.5 - 1
        parts.append(work(scaled, lambda x: vae.encode(x).latent_dist.mode(), lambda x: vae_strips.encode(vae, x)))
    return _to_unet_space(vae, torch.cat(parts))


def png_bytes(image: torch.Tensor) -> bytes:
    """A uint8 [3, H, W] image as PNG; the same bytes for the same pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# ---- whole or in strips


def wants_strips(
    model: SdxlModel,
    images: int,
    height_px: int,
    width_px: int,
    *,
    element_size: int,
    half: str = "decode",
    forced: bool = False,
) -> bool:
    """Whether to work in strips: ``engine.vae_tiling``, where auto asks if the whole fits what is free.

    Args:
        model: the SDXL.
        images: of one call.
        height_px: of each.
        width_px: of each.
        element_size: bytes of an element of the dtype that is worked in.
        half: ``decode`` or ``encode``.
        forced: auto becomes always; it was tried and did not fit.
    """
    choice = model.engine.vae_tiling
    if choice != "auto":
        return choice == "always"
    if forced or model.device.type != "cuda":
        return forced
    cost = vae_cost(
        model.vae_config, height_px=height_px, width_px=width_px, images=images, dtype_bytes=element_size, half=half
    )
    return cost.activation_bytes + _MARGIN_BYTES > _free_bytes(model.device)


def _free_bytes(device: torch.device) -> int:
    """What this process may still allocate: under its cap, and of what other programs have left."""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(cap - allocated, free + reserved - allocated)


Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Work:
    """Runs the VAE on one part after another: in strips where memory asks, in float32 where its dtype overflows."""

    model: SdxlModel
    concessions: Concessions
    warn: Callable[[str], None]
    verb: str
    height_px: int
    width_px: int

    def __call__(self, part: torch.Tensor, whole: Run, strips: Run) -> torch.Tensor:
        """What ``whole`` makes of ``part`` (float32), or ``strips``: float32 and finite."""
        vae = self.model.vae
        result = self._within_memory(part.to(vae.dtype), whole, strips).float()
        if bool(torch.isfinite(result).all()):
            return result
        if vae.dtype != torch.float32:
            result = self._in_float32(part, whole, strips)
            if bool(torch.isfinite(result).all()):
                return result
        raise CraftError(
            "The VAE returned NaN or infinity",
            where=f"the VAE of {self.model.path}",
            why=f"{self.verb} in {vae.dtype}" + ("" if vae.dtype == torch.float32 else ", and in float32"),
            hint="after training, a lower train.learning_rate; otherwise check the VAE's files, or set model.vae",
        )

    def _in_float32(self, part: torch.Tensor, whole: Run, strips: Run) -> torch.Tensor:
        """The same in float32; the way there and back changes no weight, as float32 holds all half-precision values."""
        vae, dtype = self.model.vae, self.model.vae.dtype
        if not self.concessions.said_float32:
            self.concessions.said_float32 = True
            self.warn(
                f"The VAE overflows in {str(dtype).removeprefix('torch.')}; such images are {self.verb}d again in "
                "float32. SDXL's own VAE wants model.vae_dtype=float32; "
                "for half precision there is model.vae=madebyollin/sdxl-vae-fp16-fix"
            )
        vae.to(torch.float32)
        try:
            return self._within_memory(part.float(), whole, strips)
        finally:
            vae.to(dtype)

    def _within_memory(self, part: torch.Tensor, whole: Run, strips: Run) -> torch.Tensor:
        """Whole or in strips as decided beforehand; when whole does not fit after all, in strips from then on."""
        model, given = self.model, self.concessions
        in_strips = wants_strips(
            model, len(part), self.height_px, self.width_px, element_size=part.element_size(), half=self.verb,
            forced=given.strips,
        )  # fmt: skip
        try:
            return strips(part) if in_strips else whole(part)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            if in_strips or model.engine.vae_tiling == "never":
                hints = ["--set engine.resident=never"] if model.resident else []
                hints += [] if in_strips else ["--set engine.vae_tiling=auto"]
                raise ResourceError(
                    f"Not enough GPU memory to {self.verb} an image",
                    where=f"the VAE, {self.width_px} x {self.height_px} px, {part.dtype}",
                    why=reason,
                    hint=", or ".join([*hints, "--set model.vae_dtype=bfloat16", "a smaller image"]),
                ) from error
        # Out of the except block: what it holds keeps the failed call's tensors alive.
        given.strips = True
        free_memory()
        self.warn(
            f"A whole image did not fit the VAE ({reason}); images are {self.verb}d in strips from here on. "
            "--set engine.vae_tiling=always decides it beforehand"
        )
        return self._within_memory(part, whole, strips)


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
