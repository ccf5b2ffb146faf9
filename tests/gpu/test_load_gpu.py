"""Loading on a GPU: no more memory than the weights that are wanted, phase by phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from craft_fast.config import EngineSettings
from craft_fast.sdxl import published
from craft_fast.sdxl.load import free_memory, load_sdxl
from craft_fast.sdxl.published import random_unet, random_vae
from craft_fast.tiny.random_model import build_random_sdxl

pytestmark = pytest.mark.gpu


def weights_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_full_unet_is_made_in_place_and_runs(dtype: torch.dtype) -> None:
    free_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    unet = random_unet(device="cuda", dtype=dtype)
    held = 2 * published.UNET_PARAMETERS
    # 1,680 weights, each rounded up to 512 bytes.
    assert torch.cuda.max_memory_allocated() - before < held + 2_000_000
    latents = torch.randn(1, 4, 32, 32, device="cuda", dtype=dtype)
    text = torch.randn(1, 77, 2048, device="cuda", dtype=dtype)
    conditions = {"text_embeds": text[:, 0, :1280], "time_ids": torch.full((1, 6), 256.0, device="cuda", dtype=dtype)}
    noise = unet(latents, torch.tensor(500, device="cuda"), text, added_cond_kwargs=conditions).sample
    assert noise.dtype == dtype
    assert bool(torch.isfinite(noise).all())
    del unet, noise
    vae = random_vae(device="cuda", dtype=torch.float32)
    assert bool(torch.isfinite(vae.decode(latents.float()).sample).all())


def test_phases_hold_one_phase_at_a_time(tmp_path: Path) -> None:
    folder = build_random_sdxl(tmp_path / "model")
    model = load_sdxl(folder, device="cuda", dtype="bfloat16", engine=EngineSettings(resident="never"))
    before = torch.cuda.memory_allocated()
    for parts in (("text_encoder", "text_encoder_2"), ("unet",), ("vae",)):
        torch.cuda.reset_peak_memory_stats()
        model.use(*parts)
        modules = [getattr(model, part) for part in parts]
        assert {p.device.type for module in modules for p in module.parameters()} == {"cuda"}
        wanted = sum(weights_bytes(module) for module in modules)
        count = sum(len(module.state_dict()) for module in modules)
        # The allocator rounds each weight up to 512 bytes; the finite check looks at one weight at a time.
        assert torch.cuda.max_memory_allocated() - before < wanted + 512 * count + 600_000
        del modules
    model.rest()
    assert torch.cuda.memory_allocated() - before < 100_000
