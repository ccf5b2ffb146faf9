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
from craft_fast.config import (
    EngineSettings,
    ExportSettings,
    GenerateSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from craft_fast.export import export_lora
from craft_fast.qlora.lora import add_lora, lora_state_dict
from craft_fast.records import Group, Prompt, Variant
from craft_fast.sdxl import published, vae_strips
from craft_fast.sdxl.costs_parts import vae_cost
from craft_fast.sdxl.drawing import draw
from craft_fast.sdxl.load import SdxlModel, free_memory, load_sdxl, pick_device, pick_dtype, unload
from craft_fast.sdxl.sampling import Denoiser, make_scheduler
from craft_fast.sdxl.text import encode_prompts
from craft_fast.sdxl.unet import tuned_unet
from craft_fast.sdxl.vae import Concessions, decode_latents, encode_images, wants_strips
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
    assert model.vae.dtype == torch.float32
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


# ---- graphs


def latents_of(model: SdxlModel, settings: GenerateSettings, **options: Any) -> tuple[torch.Tensor, int]:
    """Latents of three batches, and how many graphs were recorded."""
    embeds, empty = encode_prompts(model, PROMPTS), encode_prompts(model, [""])
    with Denoiser(model, settings, **options) as denoiser:
        parts = [denoiser.draw(embeds, empty, [seed, seed + 1, seed + 2]) for seed in (1, 11, 21)]
        recorded = sum(replay.recorded for replay in denoiser._replays.values())
    return torch.cat(parts), recorded


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim"])
@pytest.mark.parametrize("interval", [[0.0, 1.0], [0.25, 0.75]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_give_the_bits_of_those_that_are_not(
    folder: Path, scheduler: str, interval: list[float], dtype: str
) -> None:
    settings = GenerateSettings(
        scheduler=scheduler,  # type: ignore[arg-type]
        num_inference_steps=8,
        guidance_scale=3.0,
        guidance_interval=interval,
        batch_size=2,
    )
    found = {}
    for graph in (True, False):
        model = load_sdxl(folder, device="cuda", dtype=dtype, engine=EngineSettings(graph=graph))
        found[graph], recorded = latents_of(model, settings)
        shapes = 2 * (1 if interval == [0.0, 1.0] else 2)  # batches of two and of one, guided and not
        assert recorded == (shapes if graph else 0)
    assert torch.equal(found[True], found[False])


def test_graphs_give_their_memory_back(folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="bfloat16")
    settings = GenerateSettings(num_inference_steps=8, guidance_scale=3.0, batch_size=3)
    latents_of(model, settings, record=False)
    free_memory()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    _, recorded = latents_of(model, settings)
    assert recorded == 1
    free_memory()
    # What libraries keep for a stream of their own stays.
    assert torch.cuda.memory_allocated() - before[0] < 40 * 2**20
    assert torch.cuda.memory_reserved() - before[1] < 80 * 2**20


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "ddim"])
def test_no_step_waits_for_the_device(folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_sdxl(folder, device="cuda", dtype="float32", engine=EngineSettings(graph=False))
    settings = GenerateSettings(scheduler=scheduler, num_inference_steps=6, guidance_scale=3.0)  # type: ignore[arg-type]
    latents_of(model, settings)  # kernels are loaded
    cls = type(make_scheduler(model, scheduler))
    step, calls = cls.step, []

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(1)
        result = step(*args, **options)
        # From the end of the first step to the end of the last: five forwards and five steps.
        torch.cuda.set_sync_debug_mode("error" if len(calls) % 6 else "default")
        return result

    monkeypatch.setattr(cls, "step", watched)
    try:
        latents_of(model, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 18


# ---- phases and the VAE


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_each_phase_has_the_memory_to_itself(folder: Path, run: Run) -> None:
    together = load_sdxl(folder, device="cpu", dtype="float32")
    sizes = {name: bytes_of(getattr(together, name)) for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
    del together
    engine = EngineSettings(resident="never", graph=False)
    model = load_sdxl(folder, device="cuda", dtype="float32", engine=engine)
    free_memory()
    before, held = torch.cuda.memory_allocated(), {}  # type: ignore[var-annotated]
    use = model.use

    def noted(*parts: str) -> None:
        use(*parts)
        held[parts] = torch.cuda.memory_allocated() - before

    model.use = noted  # type: ignore[method-assign]
    text = Prompt("p0", "a star")
    group = Group(text, (Variant("p0", 0, "a star"), Variant("p0", 1, "a star, sharp")))
    generate(run, model, [group], settings=SETTINGS, seed=0, key="k")
    assert model.loaded == ()
    texts = sizes["text_encoder"] + sizes["text_encoder_2"]
    slack = 2**20
    assert texts <= held["text_encoder", "text_encoder_2"] <= texts + slack
    assert sizes["vae"] <= held[("vae",)] <= sizes["vae"] + slack
    free_memory()
    assert torch.cuda.memory_allocated() - before <= slack


def test_peak_of_a_full_size_run_is_below_the_sum_of_its_parts() -> None:
    """Sizes alone: the full text encoders, UNet and VAE, one after the other."""
    makers = {
        "text": lambda: published.random_text_encoders(device="cuda", dtype=torch.bfloat16),
        "unet": lambda: (published.random_unet(device="cuda", dtype=torch.bfloat16),),
        "vae": lambda: (published.random_vae(device="cuda", dtype=torch.float32),),
    }
    free_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sizes = {}
    for name, make in makers.items():
        parts = make()
        sizes[name] = sum(map(bytes_of, parts))
        del parts
        free_memory()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"phases: peak {peak / 2**30:.2f} GiB of {sum(sizes.values()) / 2**30:.2f} GiB together")
    assert peak < max(sizes.values()) + 2**28 < sum(sizes.values())


@pytest.mark.parametrize(
    ("dtype", "most_gib", "close"), [(torch.float16, 1.0, 0.02), (torch.bfloat16, 1.0, 0.1), (torch.float32, 1.8, 1e-3)]
)
def test_a_full_size_decode_in_strips(
    dtype: torch.dtype, most_gib: float, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = published.random_vae(device="cuda", dtype=dtype)
    latents = torch.randn(1, 4, 128, 128, device="cuda", dtype=dtype)
    found, peaks = {}, {}
    for name, run in {
        "whole": lambda: vae.decode(latents, return_dict=False)[0],
        "strips": lambda: vae_strips.decode(vae, latents),
    }.items():
        with torch.inference_mode():
            run()
            free_memory()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found[name] = run().float().cpu()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    total = peaks["strips"] + bytes_of(vae) / 2**30
    print(f"decode at 1024 px in {dtype}: whole {peaks['whole']:.2f} GiB, strips {peaks['strips']:.2f} GiB, "
          f"with weights {total:.2f} GiB")  # fmt: skip
    assert total < most_gib
    assert peaks["strips"] < peaks["whole"] / 2
    scale = found["whole"].abs().max()
    assert (found["strips"] - found["whole"]).abs().max() < close * scale
    setup: dict[str, Any] = {"height_px": 1024, "width_px": 1024, "dtype_bytes": dtype.itemsize}
    formula = vae_cost(published.VAE, **setup, tiled=True).activation_bytes / 2**30
    assert peaks["strips"] == pytest.approx(formula, rel=0.15)


def test_strips_are_taken_where_the_whole_does_not_fit(folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="float32")
    total = torch.cuda.mem_get_info()[1]
    free_memory()

    def wanted() -> bool:
        return wants_strips(model, 1, 1024, 1024, element_size=4)

    whole = vae_cost(model.vae_config, height_px=1024, width_px=1024, dtype_bytes=4).activation_bytes
    assert not wanted()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + whole) / total)
        assert wanted()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not wanted()


def test_running_out_of_memory_for_real_halves_the_batch(folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="float32", engine=EngineSettings(graph=False))
    settings = GenerateSettings(num_inference_steps=2, guidance_scale=2.0, batch_size=64, height_px=256, width_px=256)
    prompts = [f"a star {i}" for i in range(64)]
    embeds, empty = encode_prompts(model, prompts), encode_prompts(model, [""])
    with Denoiser(model, settings) as denoiser:
        expected = denoiser.draw(embeds, empty, range(64))
    free_memory()
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with Denoiser(model, settings) as denoiser:
        denoiser.draw(embeds, empty, range(64))
    need = torch.cuda.max_memory_reserved() - before
    free_memory()
    concessions, said = Concessions(), []  # type: ignore[var-annotated]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * need) / total)
        with Denoiser(model, settings, concessions=concessions, warn=said.append) as denoiser:
            found = denoiser.draw(embeds, empty, range(64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert concessions.images_at_once in (16, 32)
    assert said
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


def test_what_overflows_in_half_precision_is_decoded_in_float32(folder: Path) -> None:
    model = load_sdxl(folder, device="cuda", dtype="float16", vae_dtype="float16")
    latents = rng.normal((1, 4, 16, 16), 0) * 1e6
    said: list[str] = []
    image = decode_latents(model, latents, warn=said.append)
    assert len(said) == 1
    assert model.vae.dtype == torch.float16
    model.vae.to(torch.float32)
    assert (decode_latents(model, latents).int() - image.int()).abs().max() <= 1
