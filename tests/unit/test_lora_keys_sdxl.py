"""Every linear layer and convolution of an SDXL by every program's name for it: whole tables, the models themselves.

``facts/lora_blocks.json`` says which block is which, by hand from the readers' sources that it names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from craft_fast.lora.check import check_file
from craft_fast.lora.keys import layers, to_diffusers, to_kohya
from craft_fast.sdxl import published
from craft_fast.store import atomic

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "facts" / "lora_blocks.json").read_text())


def unet_names() -> Iterator[tuple[str, str]]:
    """diffusers' name and the original one of every layer of the UNet."""
    yield from FACTS["single"].items()
    for block, sgm in FACTS["resnets"].items():
        inner = FACTS["in_resnet"] | (FACTS["in_shortcut"] if block in FACTS["shortcuts"] else {})
        yield from ((f"{block}.{name}", f"{sgm}.{theirs}") for name, theirs in inner.items())
    for block, (sgm, depth) in FACTS["attentions"].items():
        for name in FACTS["in_attention"]:
            yield f"{block}.{name}", f"{sgm}.{name}"
        for n in range(depth):
            for name in FACTS["in_transformer_block"]:
                yield f"{block}.transformer_blocks.{n}.{name}", f"{sgm}.transformer_blocks.{n}.{name}"


def text_names() -> Iterator[tuple[str, str]]:
    for part, (prefix, depth) in FACTS["text"].items():
        for n in range(depth):
            for name in FACTS["in_text_layer"]:
                inner = f"text_model.encoder.layers.{n}.{name}"
                yield f"{part}.{inner}", prefix + inner.replace(".", "_")
    yield "text_encoder_2.text_projection", "lora_te2_text_projection"


def test_all_names_are_the_tables() -> None:
    known, unet, text = layers(), dict(unet_names()), dict(text_names())
    sgm = {f"unet.{name}": "lora_unet_" + theirs.replace(".", "_") for name, theirs in unet.items()}
    assert known.kohya == sgm | text
    assert known.by_dotted == {theirs: f"unet.{name}" for name, theirs in unet.items()}
    by_blocks = {"lora_unet_" + name.replace(".", "_"): f"unet.{name}" for name in unet}
    assert known.by_kohya == by_blocks | {key: name for name, key in (sgm | text).items()}
    for name, key in (sgm | text).items():
        assert to_kohya(name) == key
        assert to_diffusers(key) == name


def test_all_layers_are_those_of_the_models() -> None:
    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**plain(published.UNET)),
            "text_encoder": transformers.CLIPTextModel(config(published.TEXT_ENCODER)),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(config(published.TEXT_ENCODER_2)),
        }
    found = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                # transformers 5.6 took "text_model." off CLIPTextModel.
                inner = f"text_model.{name}" if name.startswith("encoder.") else name
                found[f"{part}.{inner}"] = tuple(module.weight.shape)
    assert layers().shapes == found


def plain(settings: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def config(settings: Any) -> Any:
    return transformers.CLIPTextConfig(**plain(settings))


@pytest.mark.parametrize("blocks", ["sgm", "diffusers"])
def test_a_file_of_every_layer_is_read_by_all_but_for_what_is_known(tmp_path: Path, blocks: str) -> None:
    known = layers()
    keys = {name: key for key, name in known.by_kohya.items()} if blocks == "diffusers" else dict(known.kohya)
    if blocks == "diffusers":
        keys |= {f"unet.{name}": "lora_unet_" + name.replace(".", "_") for name, _ in unet_names()}
    tensors = {}
    for name, key in keys.items():
        out, inner, *kernel = known.shapes[name]
        tensors[f"{key}.lora_down.weight"] = torch.zeros(1, inner, *kernel, dtype=torch.float16)
        tensors[f"{key}.lora_up.weight"] = torch.zeros(out, 1, *[1] * len(kernel), dtype=torch.float16)
        tensors[f"{key}.alpha"] = torch.tensor(1.0, dtype=torch.float16)
    path = tmp_path / "all.safetensors"
    atomic.write_safetensors(path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    missed = {
        "A1111": {key for key in FACTS["a1111_misses"] if key in keys.values()},
        "diffusers": {key for key in FACTS["diffusers_misses"] if key in keys.values()},
    }
    for found in check_file(path):
        names = missed.get(found.program, set())
        assert found.total == len(keys) == 1059
        assert (found.loaded, found.ok) == (1059 - len(names), not names)
        assert all(any(key in problem for key in names) for problem in found.problems)
