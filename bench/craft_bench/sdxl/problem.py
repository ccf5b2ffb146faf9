"""The work that is measured: a UNet with random weights and cached samples, the same for whoever does it.

Shapes: B samples of a step, N cached samples, latents [N, 4, h, w], T text tokens.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from craft_fast.rng import derive_seed, generator
from craft_fast.sdxl import published
from craft_fast.sdxl.text import add_time_ids
from craft_fast.store.run import resolve_uri

SEED = 20260
TINY = "package:craft_fast.tiny/assets/sdxl"
RANK = 16
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0
SAMPLES = 32

SizeName = Literal["full", "tiny"]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        name: ``full``: SDXL base as published at 1024 px; ``tiny``: the packaged tiny one, for a CPU.
        unet, vae: configurations.
        side_px: height and width of an image.
        tokens: T.
        batches: micro-batches, in the order of their importance.
        caps_gib: memory caps.
        matmul: side of the matrices that measure the card's rate.
        generated: images made together.
        denoising_steps: of one image.
        passes: sample passes of the headline's training.
    """

    name: SizeName
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    side_px: int
    tokens: int
    batches: tuple[int, ...]
    caps_gib: tuple[float, ...]
    matmul: int
    generated: tuple[int, ...]
    denoising_steps: int
    passes: int

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return int(self.side_px // 2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def pooled_width(self) -> int:
        """Width of the pooled prompt embedding."""
        return int(self.unet["projection_class_embeddings_input_dim"] - 6 * self.unet["addition_time_embed_dim"])


def make_size(name: SizeName) -> Size:
    """One of the two sizes."""
    if name == "full":
        return Size(
            "full", published.UNET, published.VAE, side_px=1024, tokens=77, batches=(1, 4, 8),
            caps_gib=(4, 6, 8, 12, 16, 24), matmul=8192, generated=(4, 1), denoising_steps=30, passes=1000,
        )  # fmt: skip
    return Size(
        "tiny", _tiny_config("unet"), _tiny_config("vae"), side_px=64, tokens=32, batches=(1, 4, 8),
        caps_gib=(0.02, 0.06), matmul=512, generated=(4, 1), denoising_steps=4, passes=24,
    )  # fmt: skip


def _tiny_config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(resolve_uri(TINY)) / part / "config.json").read_text("utf-8"))
    return config


def text_configs(size: Size) -> dict[str, Mapping[str, Any]]:
    """Arguments for ``published.random_text_encoders``."""
    if size.name == "full":
        return {"config": published.TEXT_ENCODER, "config_2": published.TEXT_ENCODER_2}
    return {"config": _tiny_config("text_encoder"), "config_2": _tiny_config("text_encoder_2")}


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_unet(size: Size, device: torch.device, dtype: torch.dtype, *, wait_on_cpu: bool = False) -> Any:
    """The UNet with random weights, pristine; the same bits each time on one device.

    Args:
        size: of what.
        device: where values are drawn, and where the network is.
        dtype: of the weights.
        wait_on_cpu: the network is on the CPU, drawn on ``device`` tensor by tensor, where it would not fit as a whole.
    """
    if not wait_on_cpu or device.type == "cpu":
        return published.random_unet(device=device, dtype=dtype, seed=SEED, config=size.unet)
    unet = published.empty("unet", size.unet)
    published.materialize(unet, "cpu", dtype)
    draw = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if "norm" in name and name.endswith(".weight") else 0.0)
            else:
                std = float(parameter.shape[1:].numel()) ** -0.5
                drawn = torch.empty(parameter.shape, device=device, dtype=dtype)
                parameter.copy_(drawn.normal_(0.0, std, generator=draw))
    return unet


@dataclass(frozen=True)
class StepInputs:
    """What one step is given.

    Attributes:
        latents: float32 [B, 4, h, w].
        prompt_embeds: [B, T, D], the model's dtype.
        pooled_prompt_embeds: [B, P], likewise.
        timesteps: int64 [B].
        noise_ids: int64 [B], names of the samples for ``craft_kernels.noise_and_target``.
        noise_seed: its seed.
        step: its step.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    timesteps: Tensor
    noise_ids: Tensor
    noise_seed: int
    step: int


class Cached:
    """N cached samples on the device, and the draws of each step: functions of (batch size, step) alone.

    Attributes:
        alphas_cumprod: float32 [1000] on the device, SDXL's.
        time_ids: [1, 6], the micro-conditioning of every sample.
        noise_seed: of the noise that is a function of what names it.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, *, samples: int = SAMPLES) -> None:
        self.device = device
        draw = generator(derive_seed(SEED, "bench", "cache"))
        side, width = size.latent_side, int(size.unet["cross_attention_dim"])
        self.latents = torch.randn((samples, 4, side, side), generator=draw).to(device)
        self.prompt_embeds = torch.randn((samples, size.tokens, width), generator=draw).to(device, dtype)
        self.pooled_prompt_embeds = torch.randn((samples, size.pooled_width), generator=draw).to(device, dtype)
        self.time_ids = add_time_ids(size.side_px, size.side_px, device=device, dtype=dtype)
        self.alphas_cumprod = sdxl_alphas_cumprod().to(device)
        self.noise_seed = derive_seed(SEED, "bench", "noise")

    def step(self, batch: int, step: int) -> StepInputs:
        """The inputs of a step; made on the CPU and copied, as from a cache."""
        count = len(self.latents)
        rows = (torch.arange(batch) + step * batch) % count
        draw = generator(derive_seed(SEED, "bench", batch, step))
        timesteps = torch.randint(len(self.alphas_cumprod), (batch,), generator=draw)
        on_device = rows.to(self.device)
        return StepInputs(
            self.latents[on_device],
            self.prompt_embeds[on_device],
            self.pooled_prompt_embeds[on_device],
            timesteps.to(self.device),
            rows.to(self.device),
            self.noise_seed,
            step,
        )


def sdxl_alphas_cumprod() -> Tensor:
    """Cumulative products of SDXL's schedule (scaled linear, 0.00085 to 0.012, 1,000 steps), float32 [1000]."""
    config = published.SCHEDULER
    first, last = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    betas = torch.linspace(first, last, config["num_train_timesteps"], dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def clean(device: torch.device) -> None:
    """Give back what the last case left, and begin to watch for a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: torch.device) -> tuple[float | None, float | None]:
    """Peak GiB allocated and reserved since ``clean`` or a reset; None on a CPU, where torch counts nothing."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
