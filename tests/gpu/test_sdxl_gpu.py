"""SDXL on a GPU: the same pictures as on the CPU, in every dtype, and memory given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from craft_fast import rng
from craft_fast.candidates import generate
from craft_fast.config import ExportSettings, GenerateSettings, ModelSettings, Settings, TrainSettings
from craft_fast.export import export_lora
from craft_fast.qlora.lora import add_lora, lora_state_dict
from craft_fast.records import Group, Prompt, Variant
from craft_fast.sdxl.load import SdxlModel, load_sdxl, pick_device, pick_dtype, unload
from craft_fast.sdxl.sampling import draw, make_scheduler
from craft_fast.sdxl.unet import tuned_unet
from craft_fast.sdxl.vae import encode_images
from craft_fast.store.run import Run, open_run
from craft_fast.tiny.random_model import build_random_sdxl

pytestmark = pytest.mark.gpu

PROMPTS = ["a red circle left of a blue square", "a star", "two green hearts, sharp"]
SETTINGS = GenerateSettings(num_inference_steps=4, guidance_scale=2.0, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def pictures(model: SdxlModel, unet: Any = None) -> torch.Tensor:
    return draw(model, PROMPTS, [1, 2, 3], settings=SETTINGS, unet=unet).images.float()


def test_automatic_choices() -> None:
    assert pick_device("auto").type == "cuda"
    bf16 = torch.cuda.get_device_capability()[0] >= 8
    assert pick_dtype("auto", pick_device("auto")) == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(("dtype", "mean", "most"), [("float32", 0.5, 8), ("bfloat16", 8.0, 255), ("float16", 2.0, 64)])
def test_pictures_are_those_of_the_cpu(folder: Path, dtype: str, mean: float, most: float) -> None:
    expected = pictures(load_sdxl(folder, device="cpu", dtype="float32"))
    model = load_sdxl(folder, device="cuda", dtype=dtype)
    assert model.vae.dtype == {"bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    difference = (pictures(model) - expected).abs()
    assert difference.mean() < mean
    assert difference.max() <= most
    latents = encode_images(model, expected.to(torch.uint8))
    assert latents.dtype == torch.float32
    assert latents.device.type == "cuda"


def test_sampling_equals_the_pipeline(folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="float32")
    ours = draw(model, PROMPTS, [1, 2, 3], settings=SETTINGS)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(model, SETTINGS.scheduler)
    noise = torch.stack([rng.normal((4, 16, 16), seed) for seed in (1, 2, 3)]).cuda()
    theirs = pipe(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="latent"
    ).images.cpu()  # fmt: skip
    assert (ours.latents - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_candidates_are_made_again_with_the_same_bytes(run: Run, folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="auto")
    texts = [Prompt(f"p{i}", f"a star {i}") for i in range(4)]
    groups = [
        Group(p, tuple(Variant(p.prompt_id, j, f"{p.text} {'sharp ' * j}".strip()) for j in range(3))) for p in texts
    ]
    rows = generate(run, model, groups, settings=SETTINGS, seed=0, key="k")
    run.manifest.drop_candidates("k", [row.prompt_id for row in rows])
    assert generate(run, model, groups, settings=SETTINGS, seed=0, key="k") == rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_lora_is_what_was_trained(run: Run, folder: Path, dtype: str) -> None:
    settings = Settings(
        model=ModelSettings(path=str(folder)),
        train=TrainSettings(rank=4, lora_alpha=8.0),
        export=ExportSettings(name="mine"),
    )
    trained = load_sdxl(folder, device="cuda", dtype=dtype)
    add_lora(trained.unet, rank=4, lora_alpha=8.0, target_modules=["to_q", "to_v"], seed=0)
    with torch.no_grad():
        for name, p in trained.unet.named_parameters():
            if ".lora_" in name:
                p.add_(0.2 * rng.normal(p.shape, len(name)).to(p.device))
    ref = export_lora(run, lora_state_dict(trained.unet), settings=settings, metadata={})
    model = load_sdxl(folder, device="cuda", dtype=dtype)
    base = pictures(model)
    with tuned_unet(model, run.path(ref.path)) as unet:
        tuned = pictures(model, unet)
    # The adapter trains in float32 and diffusers loads it in the model's dtype.
    assert (tuned - pictures(trained)).abs().mean() < (0.5 if dtype == "float32" else 8.0)
    assert (tuned - base).abs().max() > 10
    assert torch.equal(pictures(model), base)


def test_unload_gives_the_memory_back(folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    model = load_sdxl(folder, device="cuda", dtype="float32")
    held = torch.cuda.memory_allocated() - before
    assert held > 2_000_000
    unload(model)
    assert torch.cuda.memory_allocated() - before < held / 10
