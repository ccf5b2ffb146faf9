"""The VAE in strips against the whole, on trained weights; what half precision overflows; what memory forces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from craft_fast import rng
from craft_fast.config import EngineSettings, GenerateSettings
from craft_fast.errors import CraftError, ResourceError
from craft_fast.sdxl import published, vae_strips
from craft_fast.sdxl.costs_parts import vae_cost
from craft_fast.sdxl.drawing import Drawn, draw
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.vae import Concessions, decode_latents, encode_images, wants_strips
from tests.unit.live_bytes import LiveBytes, flash_attention

PROMPTS = ["a red circle left of a blue square", "a green star on a yellow background", "two white hearts"]
GIB = 1024**3


@pytest.fixture(scope="module")
def trained() -> SdxlModel:
    """The packaged SDXL, whose VAE is trained."""
    return load_sdxl("package:craft_fast.tiny/assets/sdxl", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def drawn(trained: SdxlModel) -> Drawn:
    settings = GenerateSettings(num_inference_steps=6, guidance_scale=2.0)
    return draw(trained, PROMPTS, [1, 2, 3], settings=settings)


@pytest.fixture
def tiling(trained: SdxlModel) -> Iterator[Callable[[str], None]]:
    """Sets ``engine.vae_tiling``."""

    def set_to(choice: str) -> None:
        trained.engine = EngineSettings(vae_tiling=choice)  # type: ignore[arg-type]

    yield set_to
    set_to("auto")


# ---- strips


def test_strips_are_the_whole_picture(
    trained: SdxlModel, drawn: Drawn, tiling: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_strips, "STRIP_PIXELS", 64 * 9)
    tiling("never")
    whole, latents = decode_latents(trained, drawn.latents), encode_images(trained, drawn.images)
    tiling("always")
    strips, latents_of_strips = decode_latents(trained, drawn.latents), encode_images(trained, drawn.images)
    assert whole.float().std() > 30
    difference = (whole.int() - strips.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3
    assert (latents - latents_of_strips).abs().max() < 1e-4 * latents.abs().max()


def test_tiles_of_diffusers_would_not_be(trained: SdxlModel, drawn: Drawn, tiling: Callable[[str], None]) -> None:
    # Why strips: each tile has its own norms. When this fails, diffusers' tiles have become as good.
    tiling("never")
    whole = decode_latents(trained, drawn.latents)
    vae = trained.vae
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, 32, 8
    try:
        tiles = decode_latents(trained, drawn.latents)
    finally:
        vae.use_tiling = False
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
    difference = (whole.int() - tiles.int()).abs().float()
    assert difference.mean() > 3
    assert difference.max() > 50


@pytest.mark.parametrize("strip_pixels", [1, 100, 333, 10**6])
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 4, 12, 8), (1, 4, 10, 26)])
def test_strips_of_any_height(trained: SdxlModel, shape: tuple[int, ...], strip_pixels: int) -> None:
    vae = trained.vae
    latents = rng.normal(shape, 7)
    images = torch.rand(shape[0], 3, 4 * shape[2], 4 * shape[3], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        picture, code = vae.decode(latents).sample, vae.encode(images).latent_dist.mode()
    assert (vae_strips.decode(vae, latents, strip_pixels=strip_pixels) - picture).abs().max() < 2e-5
    found = vae_strips.encode(vae, images, strip_pixels=strip_pixels)
    assert (found - code).abs().max() < 2e-5 * code.abs().max()


@pytest.mark.parametrize(("dtype", "whole_gib", "strips_gib"), [(torch.float16, 1.4, 0.6), (torch.float32, 2.8, 1.15)])
def test_memory_of_a_full_size_decode(dtype: torch.dtype, whole_gib: float, strips_gib: float) -> None:
    # Tensors alone: what libraries take inside an op comes on top, and more of it for the whole.
    vae = published.random_vae(device="meta", dtype=dtype)
    latents = torch.empty(1, 4, 128, 128, device="meta", dtype=dtype)
    images = torch.empty(1, 3, 1024, 1024, device="meta", dtype=dtype)

    def peak_gib(run: Callable[[Any, torch.Tensor], Any], x: torch.Tensor) -> float:
        with torch.inference_mode(), flash_attention(), LiveBytes() as live:
            run(vae, x)
        return live.peak / GIB

    assert peak_gib(lambda vae, x: vae.decode(x), latents) > whole_gib
    for half, run, x in (("decode", vae_strips.decode, latents), ("encode", vae_strips.encode, images)):
        found = peak_gib(run, x)
        assert found < strips_gib
        formula = vae_cost(
            published.VAE, height_px=1024, width_px=1024, dtype_bytes=dtype.itemsize, tiled=True, half=half
        )  # fmt: skip
        assert formula.activation_bytes / GIB == pytest.approx(found, rel=0.02)


def test_a_decoder_block_of_another_kind_is_done_as_a_whole(trained: SdxlModel) -> None:
    vae = trained.vae

    class Strange(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
            out: torch.Tensor = self.block(x)
            return out

    latents = rng.normal((1, 4, 16, 16), 3)
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        picture, code = vae.decode(latents).sample, vae.encode(images).latent_dist.mode()
    halves = vae.decoder.up_blocks, vae.encoder.down_blocks
    before = [blocks[1] for blocks in halves]
    for blocks in halves:
        blocks[1] = Strange(blocks[1])
    try:
        assert (vae_strips.decode(vae, latents, strip_pixels=500) - picture).abs().max() < 2e-5
        assert (vae_strips.encode(vae, images, strip_pixels=500) - code).abs().max() < 2e-5 * code.abs().max()
    finally:
        for blocks, block in zip(halves, before, strict=True):
            blocks[1] = block


def test_the_choice(trained: SdxlModel, tiling: Callable[[str], None]) -> None:
    def choice(*, forced: bool = False) -> bool:
        return wants_strips(trained, 1, 4096, 4096, element_size=4, forced=forced)

    tiling("always")
    assert choice()
    tiling("never")
    assert not choice(forced=True)
    tiling("auto")
    assert not choice()  # a CPU, and results there stay what they were
    assert choice(forced=True)


# ---- memory


def out_of_memory(module: torch.nn.Module, calls: list[int]) -> Any:
    """A hook that raises what torch raises."""

    def hook(*_: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("half", ["decode", "encode"])
def test_a_whole_that_does_not_fit_goes_on_in_strips(
    trained: SdxlModel, drawn: Drawn, tiling: Callable[[str], None], half: str
) -> None:
    def run(**options: Any) -> torch.Tensor:
        if half == "decode":
            return decode_latents(trained, drawn.latents, **options).float()
        return encode_images(trained, drawn.images, **options)

    tiling("auto")
    expected = run()
    concessions, said, calls = Concessions(), [], []  # type: ignore[var-annotated]
    network = trained.vae.decoder if half == "decode" else trained.vae.encoder
    hook = out_of_memory(network, calls)
    try:
        found = [run(concessions=concessions, warn=said.append) for _ in range(2)]
        tiling("never")
        with pytest.raises(ResourceError, match=half) as caught:
            run(concessions=concessions, warn=said.append)
    finally:
        hook.remove()
    assert all((image - expected).abs().max() <= (1 if half == "decode" else 1e-3) for image in found)
    assert len(calls) == 2  # the first time, and where strips were not allowed
    assert len(said) == 1
    assert "engine.vae_tiling=always" in said[0]
    assert "2.00 GiB" in said[0]
    assert "more of it" not in said[0]
    assert "engine.vae_tiling=auto" in caught.value.hint
    assert "2.00 GiB" in caught.value.why


def test_strips_that_do_not_fit_are_the_end(trained: SdxlModel, drawn: Drawn, tiling: Callable[[str], None]) -> None:
    tiling("always")
    calls: list[int] = []
    hook = out_of_memory(trained.vae.decoder.mid_block, calls)
    try:
        with pytest.raises(ResourceError) as caught:
            decode_latents(trained, drawn.latents)
    finally:
        hook.remove()
    assert "engine.resident=never" in caught.value.hint
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


# ---- precision


@pytest.fixture
def half(trained: SdxlModel) -> Iterator[SdxlModel]:
    """The trained model with its VAE in float16."""
    weights = {name: value.clone() for name, value in trained.vae.state_dict().items()}
    trained.vae.to(torch.float16)
    yield trained
    trained.vae.to(torch.float32).load_state_dict(weights)


@pytest.mark.parametrize("choice", ["never", "always"])
def test_what_overflows_in_half_precision_is_decoded_in_float32(
    half: SdxlModel, drawn: Drawn, tiling: Callable[[str], None], choice: str
) -> None:
    tiling(choice)
    # Beyond 65,504 float16 knows infinity alone; the decoder's norms bring such latents back into range.
    latents = torch.stack([drawn.latents[0], drawn.latents[1] * 1e6])
    weights = [value.clone() for value in half.vae.state_dict().values()]
    with torch.no_grad():
        assert not half.vae.decode(latents.half() / half.vae.config.scaling_factor).sample.isfinite().all()
    concessions, said = Concessions(), []  # type: ignore[var-annotated]
    found = [decode_latents(half, latents, concessions=concessions, warn=said.append) for _ in range(2)]
    assert half.vae.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(weights, half.vae.state_dict().values(), strict=True))
    assert len(said) == 1
    assert "model.vae_dtype=float32" in said[0]
    assert "sdxl-vae-fp16-fix" in said[0]
    half.vae.to(torch.float32)
    assert all(torch.equal(image, decode_latents(half, latents)) for image in found)


def test_pictures_that_do_not_overflow_are_decoded_once(half: SdxlModel, drawn: Drawn) -> None:
    said: list[str] = []
    dtypes: list[torch.dtype] = []
    hook = half.vae.decoder.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    try:
        image = decode_latents(half, drawn.latents, warn=said.append)
    finally:
        hook.remove()
    assert dtypes == [torch.float16]
    assert said == []
    assert (image.int() - drawn.images.int()).abs().float().mean() < 1


def test_what_is_not_finite_in_float32_either_is_an_error(half: SdxlModel, drawn: Drawn) -> None:
    with pytest.raises(CraftError, match="NaN") as caught:
        decode_latents(half, drawn.latents * float("nan"))
    assert "float16" in caught.value.why
    assert "float32" in caught.value.why
    assert half.vae.dtype == torch.float16


def test_encoding_overflows_alike(half: SdxlModel, drawn: Drawn) -> None:
    with torch.no_grad():
        half.vae.encoder.conv_in.weight.mul_(3e4)
    said: list[str] = []
    latents = encode_images(half, drawn.images, warn=said.append)
    assert bool(latents.isfinite().all())
    assert len(said) == 1
