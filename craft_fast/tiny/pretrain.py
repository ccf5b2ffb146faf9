"""Pretraining of the small autoencoder, UNet and text encoders on the world's pictures.

Shapes: B batch, latents [B, 4, 16, 16], pictures [B, 3, 64, 64] in -1..1, tokens [B, 32].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from craft_fast.progress import Progress
from craft_fast.rng import derive_seed
from craft_fast.tiny.architecture import build_scheduler, build_text_encoders, build_unet, build_vae
from craft_fast.tiny.fitting import Batch, Fitter
from craft_fast.tiny.pictures import WordTokens, codes_of, web_items
from craft_fast.tiny.render import add_flaws, render

MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


def _generator(device: torch.device, *parts: str | int) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(0, *parts))


def draw_pictures(codes: Tensor, flaws: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 64, 64] in -1..1 of scene codes [B, 7] with flaws [B, 3]."""
    clean, _ = render(codes, generator)
    return add_flaws(clean, flaws, generator) / 127.5 - 1


def fit_vae(
    work: Path, *, seed: int, steps: int, device: torch.device, progress: Progress, batch: int = 128
) -> AutoencoderKL:
    """Train the autoencoder: absolute and squared error, and a faint KL; sets ``scaling_factor`` to 1 / std."""
    torch.manual_seed(derive_seed(seed, "vae"))
    vae = build_vae().to(device)
    items = web_items(20_000, derive_seed(seed, "vae", "items"))
    codes, flaws = codes_of(items).to(device), torch.tensor([item.flaws for item in items], device=device)

    def draw(step: int) -> Batch:
        generator = _generator(device, seed, "vae", step)
        chosen = torch.randint(len(items), (batch,), generator=generator, device=device)
        noise = torch.randn(batch, 4, 16, 16, generator=generator, device=device)
        return draw_pictures(codes[chosen], flaws[chosen], generator), noise

    def loss(pictures: Tensor, noise: Tensor) -> Tensor:
        moments = vae.quant_conv(vae.encoder(pictures)).float()
        mean, log_variance = moments.chunk(2, 1)
        log_variance = log_variance.clamp(-30, 10)
        again = vae.decoder(vae.post_quant_conv(mean + torch.exp(0.5 * log_variance) * noise)).float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        total: Tensor = F.l1_loss(again, pictures) + F.mse_loss(again, pictures) + 1e-4 * divergence
        return total

    Fitter(vae, loss, draw, rate=2e-3).fit(steps, work / "vae.safetensors", progress, "autoencoder")
    with torch.no_grad():
        latents = torch.cat([vae.encode(draw(-1 - i)[0]).latent_dist.mean for i in range(8)])
    vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
    return vae.eval()


@dataclass
class Base:
    """The small SDXL's trainable parts."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    def embed(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] of both tokenizers to prompt_embeds [B, T, 128] and pooled [B, 64], as SDXL does."""
        first = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


def time_ids(batch: int, device: torch.device) -> Tensor:
    """SDXL's size conditioning [B, 6] for an uncropped 64 px picture."""
    return torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]], device=device).expand(batch, 6)


def encode_pictures(vae: AutoencoderKL, codes: Tensor, flaws: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents float16 [N, 4, 16, 16] of N drawn pictures."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(codes), 1024):
            pictures = draw_pictures(codes[start : start + 1024], flaws[start : start + 1024], generator)
            parts.append((vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor).half())
    return torch.cat(parts)


def fit_base(
    work: Path,
    vae: AutoencoderKL,
    words: WordTokens,
    *,
    seed: int,
    steps: int,
    pictures: int,
    device: torch.device,
    progress: Progress,
    batch: int = 256,
) -> Base:
    """Train UNet and both text encoders together: epsilon prediction, min-SNR weights, 10 % empty captions."""
    torch.manual_seed(derive_seed(seed, "base"))
    base = Base(build_unet().to(device), *(encoder.to(device) for encoder in build_text_encoders(words.vocab_size)))
    # SDXL reads the last but one layer of both; only the second encoder's last one is used, for the pooled text.
    first = getattr(base.text_encoder, "text_model", base.text_encoder)
    first.encoder.layers[-1].requires_grad_(False)
    first.final_layer_norm.requires_grad_(False)
    items = web_items(pictures, derive_seed(seed, "base", "items"))
    flaws = torch.tensor([item.flaws for item in items], device=device)
    progress.info(f"encoding {pictures} pictures")
    latents = encode_pictures(vae, codes_of(items).to(device), flaws, _generator(device, seed, "base", "pictures"))
    texts = [item.text for item in items] + [""]
    ids, ids_2 = words.encode(texts).to(device), words.encode(texts, pad=0).to(device)
    signal = build_scheduler().alphas_cumprod.to(device)
    sizes = time_ids(batch, device).contiguous()

    def draw(step: int) -> Batch:
        generator = _generator(device, seed, "base", step)
        chosen = torch.randint(len(items), (batch,), generator=generator, device=device)
        empty = torch.rand(batch, generator=generator, device=device) < 0.1
        said = torch.where(empty, len(items), chosen)
        t = torch.randint(1000, (batch,), generator=generator, device=device)
        noise = torch.randn(batch, 4, 16, 16, generator=generator, device=device)
        return latents[chosen].float(), ids[said], ids_2[said], t, noise

    def loss(x0: Tensor, ids: Tensor, ids_2: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a = signal[t][:, None, None, None]
        embeds, pooled = base.embed(ids, ids_2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        predicted = base.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, embeds, added_cond_kwargs=added).sample.float()
        snr = a / (1 - a)
        total: Tensor = (snr.clamp(max=MIN_SNR_GAMMA) / snr * (predicted - noise).square()).mean()
        return total

    module = nn.ModuleList([base.unet, base.text_encoder, base.text_encoder_2])
    Fitter(module, loss, draw, rate=1.5e-3).fit(steps, work / "base.safetensors", progress, "UNet and text encoders")
    module.eval().requires_grad_(False)
    return base
