"""Drawing with the UNet in NF4 on a GPU: its memory at full size, the way there, and recorded steps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.budget import GIB, ModelShape, machine_of, with_changes
from craft_fast.config import EngineSettings, GenerateSettings
from craft_fast.plan.stages import Costs
from craft_fast.sdxl import costs, published
from craft_fast.sdxl.drawing import draw
from craft_fast.sdxl.drawing_form import load_in_form
from craft_fast.sdxl.load import SdxlModel, free_memory, load_sdxl
from craft_fast.sdxl.sampling import Denoiser
from craft_fast.sdxl.text import encode_prompts
from craft_fast.sdxl.unet import is_pristine, pristine_unet
from craft_fast.settings_io import load_settings
from craft_fast.tiny.random_model import build_random_sdxl

pytestmark = pytest.mark.gpu

PROMPTS = ["a red circle left of a blue square", "a star"]
SDXL = ModelShape(published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def load(folder: Path, form: Any = "nf4", **engine: Any) -> SdxlModel:
    return load_sdxl(folder, device="cuda", dtype="bfloat16", engine=EngineSettings(**engine), unet_form=form)


def test_the_full_size_unet_draws_below_2_6_gib() -> None:
    """1024 px, one image, guided. Planned: 1.24 GiB of weights and 0.31 of activations; the issue's limit is 2.6."""
    device = torch.device("cuda", torch.cuda.current_device())
    gc.collect()
    free_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    unet = load_in_form(
        lambda where: published.random_unet(device=where, dtype=torch.bfloat16), "nf4", device=device,
        dtype=torch.bfloat16, where=Path("random"),
    )  # fmt: skip
    held, loading = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    settings = with_changes(
        load_settings("sdxl"),
        {"generate.unet": "nf4", "generate.batch_size": 1, "train.method": "qlora", "engine.resident": "never"},
    )
    planned = Costs.of(settings, machine_of(device), SDXL)
    assert held == pytest.approx(planned.unet_weights(), rel=0.02)
    # On the way one dense layer is there beside it (59 MB, twice while its rows are put in order), never the whole.
    assert loading < held + 400 * 2**20
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    text = torch.randn(2, 77, 2048, **made)
    conditions = {"text_embeds": text[:, 0, :1280], "time_ids": torch.full((2, 6), 1024.0, **made)}
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        for _ in range(2):
            noise = unet(
                torch.randn(2, 4, 128, 128, **made), torch.tensor(500, device=device), text,
                added_cond_kwargs=conditions, return_dict=False,
            )[0]  # fmt: skip
    peak = torch.cuda.max_memory_allocated() - before
    print(f"NF4 UNet: {held / GIB:.2f} GiB, loading {loading / GIB:.2f}, drawing {peak / GIB:.2f}")
    assert bool(torch.isfinite(noise).all())
    assert peak < 2.6 * GIB
    expected = planned.unet_weights() + planned.denoise_bytes(1) + costs.CUBLAS_BYTES
    assert peak == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("batch", [1, 2])
def test_recorded_steps_with_quantised_layers_give_the_same_bits(folder: Path, batch: int) -> None:
    settings = GenerateSettings(num_inference_steps=5, batch_size=batch)
    found, said = [], []
    for graph in (False, True):
        model = load(folder, graph=graph)
        embeds, negative = encode_prompts(model, PROMPTS), encode_prompts(model, [""])
        with Denoiser(model, settings, warn=said.append) as denoiser:
            found.append(denoiser.draw(embeds, negative, [1, 2]))
            if graph:
                assert denoiser.record
    assert said == []
    assert torch.equal(*found)


def test_nf4_draws_what_is_near_on_the_gpu_as_on_the_cpu(folder: Path) -> None:
    """bfloat16 and another quantiser's rounding beside the CPU's float32."""
    settings = GenerateSettings(num_inference_steps=2)
    here = draw(load(folder), PROMPTS, [1, 2], settings=settings).latents
    there = load_sdxl(folder, device="cpu", dtype="float32", unet_form="nf4")
    expected = draw(there, PROMPTS, [1, 2], settings=settings).latents
    assert (here - expected).norm() < 0.08 * expected.norm()
    assert torch.equal(draw(load(folder), PROMPTS, [1, 2], settings=settings).latents, here)


def test_training_gets_a_dense_unet_and_drawing_its_memory_back(folder: Path) -> None:
    model = load(folder, resident="always")
    free_memory()
    before = torch.cuda.memory_allocated()
    dense = pristine_unet(model)
    assert is_pristine(dense)
    assert {p.device.type for p in dense.parameters()} == {"cuda"}
    del dense
    model.unet = None
    free_memory()
    assert model.unet.conv_in.weight.is_cuda
    free_memory()
    assert abs(torch.cuda.memory_allocated() - before) < 100_000
