"""What is said of a file is what diffusers really does with it; what is written and would not load is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.errors import ExitCode, IntegrityError
from craft_fast.lora import writing
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.check import OFF_STRENGTH, check_file, require_loads
from craft_fast.lora.layouts import adapted_shapes
from craft_fast.lora.metadata import header
from craft_fast.lora.reading import read_adapter
from craft_fast.lora.writing import Format, write_adapter
from craft_fast.sdxl.source import open_source
from craft_fast.store import atomic
from craft_fast.store.safe_load import load_safetensors
from tests.unit.small_adapters import everywhere

META = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.fixture(scope="module")
def config(sdxl_folder: Path) -> dict[str, Any]:
    return dict(open_source(sdxl_folder).main.config("unet"))


@pytest.fixture(scope="module")
def whole(sdxl_folder: Path) -> Adapter:
    """Every linear layer and convolution of the UNet and both text encoders, but for one that A1111 does not know."""
    made = everywhere(adapted_shapes(open_source(sdxl_folder)), rank=3, alpha=1.5)
    return Adapter({name: layer for name, layer in made.layers.items() if "text_projection" not in name})


def with_alphas(adapter: Adapter, of: Callable[[int], float]) -> Adapter:
    return Adapter({n: LoraLayer(x.down, x.up, of(i)) for i, (n, x) in enumerate(sorted(adapter.layers.items()))})


def loaded(folder: Path, file: Path) -> dict[str, Tensor]:
    """What diffusers adds to each layer, by layer."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file)
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipe, part).named_modules():
            if hasattr(module, "lora_A"):
                inner = f"text_model.{name}" if name.startswith("encoder.") else name
                (adapter,) = module.lora_A
                found[f"{part}.{inner}"] = module.get_delta_weight(adapter).detach()
    return found


def wrong(found: dict[str, Tensor], adapter: Adapter) -> set[str]:
    return {
        name for name, layer in adapter.layers.items()
        if not torch.allclose(found[name].reshape(layer.delta().shape), layer.delta(), atol=1e-7)
    }  # fmt: skip


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_every_layer_at_its_strength(
    tmp_path: Path, sdxl_folder: Path, whole: Adapter, config: dict[str, Any], format: Format
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, whole, format=format, unet_config=config, metadata=META)
    found = loaded(sdxl_folder, path)
    assert found.keys() == whole.layers.keys()
    assert wrong(found, whole) == set()


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # this is what is looked for
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_alphas_that_differ_are_lost_where_it_is_said(
    tmp_path: Path, sdxl_folder: Path, whole: Adapter, config: dict[str, Any], format: Format
) -> None:
    """Of kohya's keys diffusers 0.42 finds no alpha of an attention layer's but the commonest."""
    mixed = with_alphas(whole, lambda i: 2.0 if i % 3 else 0.75)
    path = tmp_path / "a.safetensors"
    write_adapter(path, mixed, format=format, unet_config=config, metadata=META)
    off = wrong(loaded(sdxl_folder, path), mixed)
    said = check_file(path, config)[0]
    assert said.program == "diffusers"
    if format == "diffusers":
        assert off == set()
        assert said.ok
    else:
        assert off
        assert said.problems[0].startswith(f"{len(off)} {OFF_STRENGTH}: ")
        assert set(said.problems[0].partition(": ")[2].split(", ")) <= off
    others = check_file(path, config)[1:]
    assert all(one.ok for one in others) or format == "diffusers"


def test_ranks_that_differ_load(tmp_path: Path, sdxl_folder: Path, whole: Adapter, config: dict[str, Any]) -> None:
    cut = {
        name: LoraLayer(x.down[:rank], x.up[:, :rank], 1.5)
        for i, (name, x) in enumerate(sorted(whole.layers.items()))
        if (rank := 1 + i % 3)
    }
    for format in ("kohya", "diffusers"):
        path = tmp_path / f"{format}.safetensors"
        write_adapter(path, Adapter(cut), format=format, unet_config=config, metadata=META)  # type: ignore[arg-type]
        assert wrong(loaded(sdxl_folder, path), Adapter(cut)) == set()


# ---- files that programs would not load


def broken(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], config: dict[str, Any]) -> str:
    """What is said against a file after a change of its tensors or metadata."""
    tensors, metadata = load_safetensors(path), dict(read_adapter(path, config).metadata)
    change(tensors, metadata)
    atomic.write_safetensors(path, tensors, metadata)
    with pytest.raises(IntegrityError) as refused:
        require_loads(path, unet_config=config)
    assert refused.value.exit_code == 6
    return refused.value.why


def key(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = key(tensors, "attn1_to_q.lora_up.weight")
    tensors[name.replace("attn1", "attn7")] = tensors.pop(name)


def lose_half(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors[key(tensors, "attn1_to_k.lora_up.weight")]


def lone_alpha(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["lora_unet_nothing.alpha"] = torch.tensor(1.0)


def narrow(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = key(tensors, "attn2_to_v.lora_down.weight")
    tensors[name] = tensors[name][:, :-1].contiguous()


def no_base(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["ss_base_model_version"]


def both_blocks(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"{name}.{part}"] = tensors.pop(f"lora_unet_middle_block_1_proj_in.{part}")


def both_alphas(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["lora_adapter_metadata"] = '{"unet.r": 3, "unet.lora_alpha": 1.5}'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, ["ComfyUI: ", "attn7_to_q", "diffusers: "]),
        (lose_half, ["A1111: ", "attn1_to_k", "diffusers: "]),
        (lone_alpha, ["lora_unet_nothing.alpha", "Forge: "]),
        (narrow, ["attn2_to_v.lora_down.weight is (3, ", "for a weight of ("]),
        (no_base, ["A1111: hidden: taken for Stable Diffusion 1"]),
        (both_blocks, ["diffusers: left out in silence: "]),
        (both_alphas, ["diffusers: ", "lora_adapter_metadata"]),
    ],
)
def test_what_would_not_load_is_named(
    tmp_path: Path, whole: Adapter, config: dict[str, Any], change: Any, words: list[str]
) -> None:
    path = tmp_path / "a.safetensors"
    unet = Adapter({name: layer for name, layer in whole.layers.items() if ".attn" in name or "mid_block" in name})
    unet = Adapter({name: layer for name, layer in unet.layers.items() if name.startswith("unet.")})
    write_adapter(path, unet, unet_config=config, metadata=META)
    require_loads(path, unet_config=config)
    why = broken(path, change, config)
    assert all(word in why for word in words), why


def test_a_file_in_diffusers_names_is_loaded_by_diffusers_alone(
    tmp_path: Path, whole: Adapter, config: dict[str, Any]
) -> None:
    path = tmp_path / "a.safetensors"
    unet = Adapter({name: layer for name, layer in whole.layers.items() if ".to_" in name})
    write_adapter(path, unet, format="diffusers", unet_config=config, metadata=META)
    found = {one.program: one for one in check_file(path, config)}
    assert found["diffusers"].ok
    for program in ("ComfyUI", "A1111", "Forge"):
        said = found[program]  # type: ignore[index]
        assert (said.loaded, said.total) == (0, len(unet.layers))
        assert said.problems[0].startswith(f"{2 * len(unet.layers)} keys are not loaded: unet.")


def test_a_failed_check_is_exit_6_names_the_key_and_leaves_no_file(
    tmp_path: Path, sdxl_folder: Path, whole: Adapter, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    attention = Adapter({name: layer for name, layer in whole.layers.items() if ".attn1." in name})
    write_adapter(path, attention, format="diffusers", unet_config=config, metadata=header(attention, name="a"))
    made = writing.kohya_tensors

    def misnamed(adapter: Adapter, unet_config: Any = None) -> dict[str, Tensor]:
        return {name.replace("middle_block_1_", "middle_block_7_"): v for name, v in made(adapter, unet_config).items()}

    monkeypatch.setattr(writing, "kohya_tensors", misnamed)
    argv = ["lora", "convert", str(path), "--to", "kohya", "--model", str(sdxl_folder)]
    done = CliRunner().invoke(app, argv, prog_name="craft-fast")
    assert done.exit_code == ExitCode.INTEGRITY, done.output
    assert "lora_unet_middle_block_7_" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
