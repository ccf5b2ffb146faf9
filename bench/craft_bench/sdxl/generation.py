"""Images from noise: denoising with guidance, and the VAE, on random weights.

Shapes: B images, latents [B, 4, h, w].
"""

from __future__ import annotations

import time

import torch

from craft_bench.measure import synchronize
from craft_bench.rows import Row
from craft_bench.sdxl.cases import GenerateCase
from craft_bench.sdxl.measure import percentiles
from craft_bench.sdxl.model import random_model, shape_of
from craft_bench.sdxl.planned import planned_images, probed
from craft_bench.sdxl.problem import SEED, clean, peaks
from craft_bench.sdxl.stepping import Work
from craft_fast.budget import machine_of
from craft_fast.config import EngineSettings, GenerateSettings, ModelSettings, Settings, TrainSettings
from craft_fast.plan.stages import Costs
from craft_fast.rng import derive_seed, generator, normal
from craft_fast.sdxl import costs as formulas
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.sampling import Denoiser
from craft_fast.sdxl.text import PromptEmbeds
from craft_fast.sdxl.vae import decode_latents

GUIDANCE = 5.0
REPEATS = 3


def settings_of(case: GenerateCase, work: Work, vae_dtype: torch.dtype) -> Settings:
    """A case as the settings of a run: Euler with guidance, at the size's own resolution."""
    size = work.size
    return Settings(
        model=ModelSettings(
            device=work.device.type, dtype=_name(work.dtype), vae_dtype=_name(vae_dtype)  # type: ignore[arg-type]
        ),
        generate=GenerateSettings(
            scheduler="euler", num_inference_steps=size.denoising_steps, guidance_scale=GUIDANCE,
            batch_size=case.batch, height_px=size.side_px, width_px=size.side_px,
        ),
        engine=EngineSettings(graph=case.graph, resident="always"),
        train=TrainSettings(method="lora"),
    )  # fmt: skip


def measure_images(case: GenerateCase, work: Work) -> Row:
    """Seconds an image, of denoising and of decoding; the first batch, which records the graph, is not timed.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    clean(work.device)
    vae_dtype = getattr(torch, case.vae_dtype) if work.device.type == "cuda" else torch.float32
    settings = settings_of(case, work, vae_dtype)
    costs = Costs.of(settings, machine_of(work.device), shape_of(work.size))
    probe = probed(costs, wanted=case.probe, deadline_s=work.effort.probe_s)
    clean(work.device)
    model = random_model(work.size, work.device, work.dtype, settings.engine, vae_dtype=vae_dtype)
    model.use("unet", "vae")
    embeds, negative, noise = _inputs(model, work, case.batch)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    denoising, decoding = [], []
    with Denoiser(model, settings.generate) as denoiser:
        for repeat in range(1 + (1 if work.effort.most < 10 else REPEATS)):
            work.check()
            synchronize(work.device)
            began = time.perf_counter()
            latents = denoiser.denoise(embeds, negative, noise)
            synchronize(work.device)
            between = time.perf_counter()
            decode_latents(model, latents)
            synchronize(work.device)
            if repeat:
                denoising.append(between - began)
                decoding.append(time.perf_counter() - between)
    allocated, reserved = peaks(work.device)
    whole = percentiles([1e3 * (a + b) for a, b in zip(denoising, decoding, strict=True)])
    denoise_s, decode_s = percentiles(denoising)[1] / case.batch, percentiles(decoding)[1] / case.batch
    flops = denoising_flops(costs) * work.size.denoising_steps
    return {
        "p20_ms": whole[0], "p50_ms": whole[1], "p80_ms": whole[2],
        "s_per_image": whole[1] / 1e3 / case.batch, "denoise_s": denoise_s, "decode_s": decode_s,
        "images_per_s": case.batch / (whole[1] / 1e3), "peak_gib": allocated, "peak_reserved_gib": reserved,
        "steps": work.size.denoising_steps, "guidance_scale": GUIDANCE, "scheduler": "euler",
        "vae_dtype": _name(vae_dtype), "timed": len(denoising),
        "model_tflop": flops / case.batch / 1e12,
        "mfu": flops / (denoise_s * case.batch) / 1e12 / work.matmul_tflops,
        "mfu_means": "UNet forwards of both halves of guidance over the time of denoising, of the matrix rate",
        "planned": planned_images(costs, probe, whole[1], allocated),
    }  # fmt: skip


def _inputs(model: SdxlModel, work: Work, batch: int) -> tuple[PromptEmbeds, PromptEmbeds, torch.Tensor]:
    size, draw = work.size, generator(derive_seed(SEED, "bench", "generate"))
    width = int(size.unet["cross_attention_dim"])

    def embeds(count: int) -> PromptEmbeds:
        text = torch.randn((count, size.tokens, width), generator=draw).to(work.device, work.dtype)
        pooled = torch.randn((count, size.pooled_width), generator=draw).to(work.device, work.dtype)
        return PromptEmbeds(text, pooled, [False] * count)

    noise = normal((batch, *model.latent_shape(size.side_px, size.side_px)), derive_seed(SEED, "bench", "start"))
    return embeds(batch), embeds(1), noise


def denoising_flops(costs: Costs) -> float:
    """Operations of one denoising step of the batch, both halves of guidance."""
    batch = costs.settings.generate.batch_size * (2 if costs.guided else 1)
    height, width = costs.size["height_px"], costs.size["width_px"]
    setup = formulas.unet_setup(
        height_px=height, width_px=width, batch=batch, vae_scale_factor=costs.shape.vae_scale_factor,
        tokens=costs.shape.tokens,
    )  # fmt: skip
    return formulas.unet_pass(costs.shape.unet, setup).forward_flops


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
