"""Phases: where networks do not stay on the device, one phase's are freed before the next one's are loaded."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from craft_fast.config import EngineSettings
from craft_fast.errors import IntegrityError
from craft_fast.sdxl import weights
from craft_fast.sdxl.load import WEIGHTED, SdxlModel, load_sdxl, unload
from craft_fast.sdxl.unet import is_pristine, pristine_unet

TEXTS = ("text_encoder", "text_encoder_2")


class Watched:
    """A model's source that notes, whenever a network is loaded, which others are alive."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.seen: dict[str, weakref.ref[nn.Module]] = {}
        self.alive: list[tuple[str, tuple[str, ...]]] = []

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        self.alive.append((part, self.now()))
        module: nn.Module = self.source.load(part, device, dtype)
        self.seen[part] = weakref.ref(module)
        return module

    def now(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, reference in self.seen.items() if reference() is not None))


def watched(folder: Path, resident: str) -> tuple[SdxlModel, Watched]:
    model = load_sdxl(folder, device="cpu", dtype="float32", engine=EngineSettings(resident="never"))
    model.resident = resident != "never"
    watch = Watched(model.source)
    model.source = watch  # type: ignore[assignment]
    return model, watch


def test_two_phases_are_never_alive_together(sdxl_folder: Path) -> None:
    model, watch = watched(sdxl_folder, "never")
    gc.disable()  # what only the collector would free must not be waited for
    try:
        model.use(*TEXTS)
        assert watch.now() == TEXTS
        model.use("unet", "vae")
        model.use("unet", "vae")
        assert watch.now() == ("unet", "vae")
        model.use("vae")
        model.rest()
        assert watch.now() == ()
        model.use("unet")
    finally:
        gc.enable()
    assert watch.alive == [
        ("text_encoder", ()),
        ("text_encoder_2", ("text_encoder",)),
        ("unet", ()),
        ("vae", ("unet",)),
        ("unet", ()),
    ]


def test_resident_networks_stay(sdxl_folder: Path) -> None:
    model, watch = watched(sdxl_folder, "always")
    model.use(*TEXTS)
    model.use("unet")
    model.rest()
    model.use("vae")
    model.use("text_encoder")
    assert watch.now() == tuple(sorted(WEIGHTED))
    assert [part for part, _ in watch.alive] == list(WEIGHTED)


@pytest.mark.parametrize("resident", ["auto", "always"])
def test_without_phases_all_is_loaded_at_once(sdxl_folder: Path, resident: str) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32", engine=EngineSettings(resident=resident))
    assert model.resident
    assert model.loaded == WEIGHTED


def test_sizes_and_configurations_need_no_network(sdxl_folder: Path) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32", engine=EngineSettings(resident="never"))
    assert model.vae_scale_factor == 4
    assert model.latent_shape(64, 128) == (4, 16, 32)
    assert model.tokenizer("a star").input_ids
    assert model.loaded == ()
    for config, part in ((model.unet_config, model.unet), (model.vae_config, model.vae)):
        loaded = {name: value for name, value in part.config.items() if not name.startswith("_")}
        for name, value in loaded.items():
            assert _plain(config[name]) == _plain(value), name
        assert config.block_out_channels == config["block_out_channels"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_a_network_is_loaded_on_use_and_freed_by_none(sdxl_folder: Path) -> None:
    model, watch = watched(sdxl_folder, "always")
    unet = model.unet
    assert model.unet is unet
    model.unet = None
    del unet
    gc.collect()
    assert watch.now() == ()
    assert model.loaded == ()
    assert model.unet is not None
    unload(model)
    assert model.loaded == ()
    with pytest.raises(ValueError, match="decoder"):
        model.use("decoder")


def test_a_changed_unet_is_freed_before_it_is_read_again(sdxl_folder: Path) -> None:
    model, watch = watched(sdxl_folder, "never")
    model.use("unet")
    model.unet.requires_grad_(True)
    pristine_unet(model)
    assert watch.alive == [("unet", ()), ("unet", ())]
    assert is_pristine(model.unet)


def test_our_own_layers_are_not_pristine(sdxl_folder: Path) -> None:
    class Layer(nn.Linear):
        pass

    Layer.__module__ = "craft_fast.qlora.some_layer"
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    assert is_pristine(model.unet)
    model.unet.time_embedding.linear_1 = Layer(32, 128).requires_grad_(False)
    assert not is_pristine(model.unet)


def test_weights_are_checked_on_their_first_load_and_again_when_the_file_changed(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    checked = 0
    isfinite = torch.isfinite

    def counting(value: torch.Tensor) -> torch.Tensor:
        nonlocal checked
        checked += 1
        return isfinite(value)

    monkeypatch.setattr(weights.torch, "isfinite", counting)
    model = load_sdxl(folder, device="cpu", dtype="float32", engine=EngineSettings(resident="never"))
    for _ in range(3):
        model.use("vae")
        model.use("unet")
    assert checked == len(model.unet.state_dict()) + len(model.source.of("vae").shapes("vae"))
    [file] = (folder / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = float("inf")
    file.write_bytes(save(tensors, metadata={"format": "pt"}))
    with pytest.raises(IntegrityError, match=r"quant_conv\.bias"):
        model.use("vae")
    # A weight that only overflows in the new dtype is found too.
    tensors["quant_conv.bias"][0] = 1e6
    file.write_bytes(save(tensors, metadata={"format": "pt"}))
    model.use("vae")
    model.rest()
    model.vae_dtype = torch.float16
    with pytest.raises(IntegrityError, match=r"quant_conv\.bias"):
        model.use("vae")
