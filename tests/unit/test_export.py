"""Export: the file against diffusers' own loader, and the checks that stand before it counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from craft_fast import rng
from craft_fast.config import ExportSettings, ModelSettings, Settings, TrainSettings
from craft_fast.errors import IntegrityError
from craft_fast.export import check_fit, export_lora, lora_tensors
from craft_fast.qlora.lora import add_lora, lora_state_dict
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.unet import is_pristine, pristine_unet, stored_shapes, tuned_unet
from craft_fast.store import atomic
from craft_fast.store.run import Run, open_run
from craft_fast.store.safe_load import load_safetensors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def make_settings(
    folder: Path, *, rank: int = 4, alpha: float = 4.0, dtype: str = "float32", method: str = "lora"
) -> Settings:
    return Settings(
        model=ModelSettings(path=str(folder)),
        train=TrainSettings(rank=rank, lora_alpha=alpha, method=method),  # type: ignore[arg-type]
        export=ExportSettings(name="mine", dtype=dtype),  # type: ignore[arg-type]
    )


def trained(model: SdxlModel, settings: Settings) -> tuple[dict[str, Tensor], Any]:
    """An adapter with both matrices away from zero, and the UNet that carries it."""
    unet = pristine_unet(model)
    add_lora(unet, rank=settings.train.rank, lora_alpha=settings.train.lora_alpha, target_modules=TARGETS, seed=0)
    with torch.no_grad():
        for i, (name, p) in enumerate(unet.named_parameters()):
            if ".lora_" in name:
                p.copy_(rng.normal(p.shape, i) * 0.3)
    return lora_state_dict(unet), unet


def unet_output(unet: Any, cross: int = 64) -> Tensor:
    with torch.no_grad():
        result: Tensor = unet(
            rng.normal((2, 4, 16, 16), 1),
            torch.tensor(500),
            encoder_hidden_states=rng.normal((2, 32, cross), 2),
            added_cond_kwargs={"text_embeds": rng.normal((2, 32), 3), "time_ids": torch.full((2, 6), 64.0)},
        ).sample
    return result


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 8.0), (6, 2.5)])
def test_diffusers_loads_what_was_trained(run: Run, sdxl_folder: Path, rank: int, alpha: float) -> None:
    settings = make_settings(sdxl_folder, rank=rank, alpha=alpha)
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    base = unet_output(model.unet)
    state, unet = trained(model, settings)
    expected = unet_output(unet)
    assert (expected - base).abs().max() > 1e-2
    ref = export_lora(run, state, settings=settings, metadata={})
    assert ref == run.ref(run.path("lora", "mine.safetensors"))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.load_lora_weights(run.path(ref.path))
    assert (unet_output(pipe.unet) - expected).abs().max() < 1e-5
    with tuned_unet(model, run.path(ref.path)) as tuned:
        assert torch.equal(unet_output(tuned), unet_output(pipe.unet))
    assert is_pristine(model.unet)
    assert torch.equal(unet_output(model.unet), base)


def test_the_same_state_gives_the_same_bytes_and_a_header(run: Run, sdxl_folder: Path, sdxl: SdxlModel) -> None:
    settings = make_settings(sdxl_folder, alpha=8.0)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    first = export_lora(run, state, settings=settings, metadata={"seed": "3"})
    again = export_lora(run, dict(reversed(state.items())), settings=settings, metadata={"seed": "3"})
    assert first == again
    with safe_open(run.path(first.path), "pt") as file:
        header = file.metadata()
    assert header["craft_fast.seed"] == "3"
    assert (header["craft_fast.rank"], header["craft_fast.lora_alpha"]) == ("4", "8.0")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["ss_base_model_version"].startswith("sdxl_")


def test_the_scale_is_in_lora_b() -> None:
    state = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
    tensors = lora_tensors(state, scale=0.5, dtype=torch.float16)
    assert torch.equal(tensors["unet.a.lora_A.weight"], torch.ones(2, 3, dtype=torch.float16))
    assert torch.equal(tensors["unet.a.lora_B.weight"], torch.full((4, 2), 0.5, dtype=torch.float16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes(run: Run, sdxl_folder: Path, dtype: str) -> None:
    settings = make_settings(sdxl_folder, dtype=dtype)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    ref = export_lora(run, state, settings=settings, metadata={})
    tensors = load_safetensors(run.path(ref.path))
    assert {str(value.dtype) for value in tensors.values()} == {f"torch.{dtype}"}


def test_a_whole_unet(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, method="full")
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    base = unet_output(model.unet)
    state = {name: p + 0.01 * rng.normal(p.shape, 5) for name, p in model.unet.named_parameters()}
    ref = export_lora(run, state, settings=settings, metadata={})
    assert ref.path == "lora/mine-unet/diffusion_pytorch_model.safetensors"
    loaded = diffusers.UNet2DConditionModel.from_pretrained(run.path("lora", "mine-unet"))
    for result in (run.path(ref.path), run.path("lora", "mine-unet")):
        with tuned_unet(model, result) as tuned:
            assert torch.equal(unet_output(tuned), unet_output(loaded))
    assert not torch.equal(unet_output(loaded), base)
    assert torch.equal(unet_output(pristine_unet(model)), base)
    del state["conv_in.weight"]
    with pytest.raises(IntegrityError, match=r"conv_in\.weight"):
        export_lora(run, state, settings=settings, metadata={})


def no_such_layer(state: dict[str, Tensor]) -> None:
    state["nowhere.to_q.lora_A.weight"] = torch.zeros(4, 64)
    state["nowhere.to_q.lora_B.weight"] = torch.zeros(64, 4)


def half_a_pair(state: dict[str, Tensor]) -> None:
    del state[next(name for name in state if "lora_B" in name)]


def wrong_width(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = torch.zeros(4, 7)


def another_rank(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name][:2]


def not_a_number(state: dict[str, Tensor]) -> None:
    state[next(iter(state))][0, 0] = float("nan")


def nothing(state: dict[str, Tensor]) -> None:
    state.clear()


@pytest.mark.parametrize("damage", [no_such_layer, half_a_pair, wrong_width, another_rank, not_a_number, nothing])
def test_what_does_not_fit_is_not_written(
    run: Run, sdxl_folder: Path, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    settings = make_settings(sdxl_folder)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    damage(state)
    with pytest.raises(IntegrityError) as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert refused.value.exit_code == 6
    assert not run.path("lora", "mine.safetensors").exists()


def test_a_value_too_large_for_the_dtype_is_refused(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, dtype="float16")
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    state[next(iter(state))][0, 0] = 1e6
    with pytest.raises(IntegrityError, match="float16") as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert "float32" in refused.value.hint


def test_a_file_that_reads_back_differently_is_refused(
    run: Run, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(sdxl_folder)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    write = atomic.write_safetensors

    def flip(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
        damaged = {name: value.clone() for name, value in tensors.items()}
        next(iter(damaged.values()))[0, 0] += 1
        return write(path, damaged, metadata)

    monkeypatch.setattr(atomic, "write_safetensors", flip)
    with pytest.raises(IntegrityError, match="reads back differently"):
        export_lora(run, state, settings=settings, metadata={})
    assert not run.path("lora", "mine.safetensors").exists()


def test_a_lora_that_is_a_pickle_is_not_loaded(sdxl: SdxlModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"unet.a.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="pickle"), tuned_unet(sdxl, path):
        pass
    assert is_pristine(sdxl.unet)


def test_a_lora_of_another_model_is_not_loaded(sdxl: SdxlModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    up, down = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight", torch.zeros(4, 99)
    atomic.write_safetensors(path, {up: torch.zeros(99, 4), up.replace("lora_B", "lora_A"): down})
    with pytest.raises(IntegrityError, match="does not load"), tuned_unet(sdxl, path):
        pass
    assert is_pristine(sdxl.unet)


def test_shapes_come_from_the_header(sdxl_folder: Path, sdxl: SdxlModel) -> None:
    expected = {name: tuple(value.shape) for name, value in sdxl.unet.state_dict().items()}
    assert stored_shapes(sdxl_folder / "unet") == expected
    with pytest.raises(IntegrityError, match="empty"):
        check_fit({}, expected, where="here")


def test_the_config_travels_with_a_whole_unet(run: Run, sdxl_folder: Path, sdxl: SdxlModel) -> None:
    state = {name: p.detach() for name, p in sdxl.unet.named_parameters()}
    export_lora(run, state, settings=make_settings(sdxl_folder, method="full"), metadata={})
    written = json.loads(run.path("lora", "mine-unet", "config.json").read_text())
    assert written == json.loads((sdxl_folder / "unet" / "config.json").read_text())
