"""Key maps of ComfyUI, A1111, Forge and diffusers as facts, at SDXL's full shape; conversions lose no bit.

The tables are written by hand from the readers themselves: ComfyUI comfy/utils.py (unet_to_diffusers) and
comfy/lora.py, A1111 extensions-builtin/Lora/networks.py, kohya-ss/sd-scripts library/sdxl_original_unet.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.check import PROGRAMS, check_file, differences, diffusers_state
from craft_fast.lora.keys import layers
from craft_fast.lora.reading import adapter_of, is_lora, read_adapter
from craft_fast.lora.writing import diffusers_tensors, kohya_tensors, write_adapter
from craft_fast.store import atomic
from craft_fast.store.safe_load import load_safetensors

T = "transformer_blocks"
# diffusers' name of a layer, what it is called in the original UNet, its weight's shape.
UNET_FACTS: list[tuple[str, str, tuple[int, ...]]] = [
    ("conv_in", "input_blocks.0.0", (320, 4, 3, 3)),
    ("time_embedding.linear_1", "time_embed.0", (1280, 320)),
    ("time_embedding.linear_2", "time_embed.2", (1280, 1280)),
    ("add_embedding.linear_1", "label_emb.0.0", (1280, 2816)),
    ("add_embedding.linear_2", "label_emb.0.2", (1280, 1280)),
    ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2", (320, 320, 3, 3)),
    ("down_blocks.0.resnets.1.conv2", "input_blocks.2.0.out_layers.3", (320, 320, 3, 3)),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", (320, 320, 3, 3)),
    ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection", (640, 320, 1, 1)),
    ("down_blocks.1.resnets.0.time_emb_proj", "input_blocks.4.0.emb_layers.1", (640, 1280)),
    ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", (640, 640)),
    (f"down_blocks.1.attentions.0.{T}.0.attn1.to_q", f"input_blocks.4.1.{T}.0.attn1.to_q", (640, 640)),
    (f"down_blocks.1.attentions.1.{T}.1.attn2.to_k", f"input_blocks.5.1.{T}.1.attn2.to_k", (640, 2048)),
    ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op", (640, 640, 3, 3)),
    (f"down_blocks.2.attentions.0.{T}.9.attn2.to_v", f"input_blocks.7.1.{T}.9.attn2.to_v", (1280, 2048)),
    (f"down_blocks.2.attentions.1.{T}.3.ff.net.0.proj", f"input_blocks.8.1.{T}.3.ff.net.0.proj", (10240, 1280)),
    (f"down_blocks.2.attentions.1.{T}.3.ff.net.2", f"input_blocks.8.1.{T}.3.ff.net.2", (1280, 5120)),
    ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out", (1280, 1280)),
    ("mid_block.resnets.0.conv1", "middle_block.0.in_layers.2", (1280, 1280, 3, 3)),
    (f"mid_block.attentions.0.{T}.5.attn1.to_out.0", f"middle_block.1.{T}.5.attn1.to_out.0", (1280, 1280)),
    ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1", (1280, 1280)),
    ("up_blocks.0.resnets.0.conv1", "output_blocks.0.0.in_layers.2", (1280, 2560, 3, 3)),
    (f"up_blocks.0.attentions.2.{T}.0.attn1.to_v", f"output_blocks.2.1.{T}.0.attn1.to_v", (1280, 1280)),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", (1280, 1280, 3, 3)),
    (f"up_blocks.1.attentions.1.{T}.1.ff.net.0.proj", f"output_blocks.4.1.{T}.1.ff.net.0.proj", (5120, 640)),
    ("up_blocks.1.resnets.2.conv_shortcut", "output_blocks.5.0.skip_connection", (640, 960, 1, 1)),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv", (640, 640, 3, 3)),
    ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3", (320, 320, 3, 3)),
    ("conv_out", "out.2", (4, 320, 3, 3)),
]  # fmt: skip
TEXT_FACTS: list[tuple[str, str, tuple[int, ...]]] = [
    (f"{part}.text_model.encoder.layers.{n}.{diffusers}", f"{te}text_model_encoder_layers_{n}_{kohya}", shape)
    for part, te, n, width in (("text_encoder", "lora_te1_", 11, 768), ("text_encoder_2", "lora_te2_", 31, 1280))
    for diffusers, kohya, shape in (
        ("self_attn.q_proj", "self_attn_q_proj", (width, width)),
        ("self_attn.k_proj", "self_attn_k_proj", (width, width)),
        ("self_attn.v_proj", "self_attn_v_proj", (width, width)),
        ("self_attn.out_proj", "self_attn_out_proj", (width, width)),
        ("mlp.fc1", "mlp_fc1", (4 * width, width)),
        ("mlp.fc2", "mlp_fc2", (width, 4 * width)),
    )
]
# What a reader makes of a key: (key without its ending, ending style, ComfyUI and Forge, A1111, diffusers).
Q = f"down_blocks.1.attentions.0.{T}.0.attn1.to_q"
SGM = f"input_blocks.4.1.{T}.0.attn1.to_q"
READERS = [
    ("lora_unet_" + SGM.replace(".", "_"), "kohya", True, True, True),
    ("lora_unet_" + Q.replace(".", "_"), "kohya", True, True, True),
    ("lycoris_" + Q.replace(".", "_"), "kohya", True, False, False),
    ("diffusion_model." + SGM, "peft", True, False, False),
    ("unet." + Q, "peft", False, False, True),
    ("unet." + Q.replace(".to_q", ".processor.to_q_lora"), "old", True, False, True),
    ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "kohya", True, True, True),
    ("lora_te2_text_model_encoder_layers_3_self_attn_out_proj", "kohya", True, True, True),
    ("text_encoder_2.text_model.encoder.layers.3.self_attn.k_proj", "peft", True, False, True),
    ("text_encoder.text_model.encoder.layers.3.self_attn.k_proj", "peft", True, False, True),
    ("text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.q_proj", "peft", True, False, False),
    # diffusers tells the naming of a text encoder's layers by out_proj or mlp among them.
    ("lora_te2_text_model_encoder_layers_3_self_attn_k_proj", "kohya", True, True, False),
    ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "peft", True, False, False),
    # A1111 counts the blocks of Stable Diffusion 1, where the first of them has no attention before its upsampler.
    ("lora_unet_up_blocks_0_upsamplers_0_conv", "kohya", True, False, True),
    ("lora_unet_output_blocks_2_2_conv", "kohya", True, True, True),
    ("lora_unet_add_embedding_linear_1", "kohya", True, False, False),
    ("lora_unet_label_emb_0_0", "kohya", True, True, True),
    ("lora_te2_text_projection", "kohya", True, False, False),
]
ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "old": (".down.weight", ".up.weight"),
}
META = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.mark.parametrize(("name", "sgm", "shape"), UNET_FACTS)
def test_the_unet_s_names(name: str, sgm: str, shape: tuple[int, ...]) -> None:
    known = layers()
    assert known.kohya[f"unet.{name}"] == "lora_unet_" + sgm.replace(".", "_")
    assert known.by_dotted[sgm] == f"unet.{name}"
    assert known.by_kohya["lora_unet_" + name.replace(".", "_")] == f"unet.{name}"
    assert known.shapes[f"unet.{name}"] == shape


@pytest.mark.parametrize(("name", "kohya", "shape"), TEXT_FACTS)
def test_the_text_encoders_names(name: str, kohya: str, shape: tuple[int, ...]) -> None:
    known = layers()
    assert known.kohya[name] == kohya
    assert known.by_kohya[kohya] == name
    assert known.shapes[name] == shape


def test_every_layer_has_one_name_and_diffusers_own_conversion_agrees() -> None:
    """All 1,059 linear layers and convolutions of an SDXL, on the meta device."""
    known = layers()
    assert len(known.shapes) == 794 + 12 * 6 + 32 * 6 + 1
    assert len(set(known.kohya.values())) == len(known.shapes)
    state = {}
    for name, key in known.kohya.items():
        out, inner, *kernel = known.shapes[name]
        state[f"{key}.lora_down.weight"] = torch.empty(1, inner, *kernel, device="meta")
        state[f"{key}.lora_up.weight"] = torch.empty(out, 1, *[1] * len(kernel), device="meta")
    found = adapter_of(diffusers_state(state, None), {}, known, where="diffusers")
    assert found.layers.keys() == known.shapes.keys()
    for name, layer in found.layers.items():
        assert (layer.up.shape[0], *layer.down.shape[1:]) == known.shapes[name]


@pytest.mark.parametrize(("stem", "style", "comfy", "a1111", "diffusers"), READERS)
def test_who_reads_which_key(tmp_path: Path, stem: str, style: str, comfy: bool, a1111: bool, diffusers: bool) -> None:
    down, up = ENDINGS[style]
    known = layers()
    plain = stem.replace("_lora", "") if style == "old" else stem
    name = adapter_name(plain, known)
    out, inner, *kernel = known.shapes[name]
    tensors = {stem + down: torch.zeros(2, inner, *kernel), stem + up: torch.zeros(out, 2, *[1] * len(kernel))}
    path = tmp_path / "one.safetensors"
    atomic.write_safetensors(path, tensors, META)
    found = {one.program: one for one in check_file(path)}
    assert tuple(found) == PROGRAMS
    wanted = {"diffusers": diffusers, "ComfyUI": comfy, "A1111": a1111, "Forge": comfy}
    assert {program: one.ok for program, one in found.items()} == wanted
    for program, one in found.items():
        assert one.loaded == (1 if wanted[program] else 0)
        assert one.ok or stem in " ".join(one.problems)
    assert list(read_adapter(path).layers) == [name]
    assert is_lora(path)


def adapter_name(stem: str, known: Any) -> str:
    tensors = {f"{stem}.lora_down.weight": torch.zeros(1, 1), f"{stem}.lora_up.weight": torch.zeros(1, 1)}
    return next(iter(adapter_of(tensors, {}, known, where="").layers))


@pytest.mark.parametrize(
    ("metadata", "a1111", "forge"),
    [
        ({}, True, True),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, True, True),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, False, True),
        ({"ss_base_model_version": "sd_v1"}, False, False),
        ({"ss_v2": "True"}, False, False),
        ({"title": "mine"}, False, False),
    ],
)
def test_metadata_decides_who_lists_a_file(tmp_path: Path, metadata: dict[str, str], a1111: bool, forge: bool) -> None:
    path = tmp_path / "one.safetensors"
    key = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    atomic.write_safetensors(
        path, {f"{key}.lora_down.weight": torch.zeros(1, 768), f"{key}.lora_up.weight": torch.zeros(3072, 1)}, metadata
    )
    found = {one.program: one for one in check_file(path)}
    assert (found["A1111"].ok, found["Forge"].ok) == (a1111, forge)
    assert found["ComfyUI"].ok
    if not a1111:
        assert "hidden" in found["A1111"].problems[0]


# ---- conversions


def small() -> dict[str, Any]:
    file = Path(__file__).parents[2] / "craft_fast/tiny/assets/sdxl/unet/config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def some_adapter(draw: random.Random, config: Any) -> Adapter:
    """Some layers of any kind, each of its own rank and alpha; dtype of all of it by chance."""
    known = layers(config)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    names = [name for name in known.shapes if name.startswith("unet.") or "layers.1." in name]
    found = {}
    drawn = draw.sample(names, 12)
    # Without attention diffusers does not see what a text encoder's layers are.
    tes = {name.partition(".")[0] for name in drawn if name.startswith("text_encoder")}
    for name in [*drawn, *(f"{te}.text_model.encoder.layers.1.self_attn.out_proj" for te in sorted(tes))]:
        out, inner, *kernel = known.shapes[name]
        rank, alpha = draw.choice([1, 2, 5]), draw.choice([1.0, 4.0, 0.3, 13.3, 1e-3, -2.0])
        seed = torch.Generator().manual_seed(draw.getrandbits(32))
        down = torch.randn(rank, inner, *kernel, generator=seed).to(dtype)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=seed).to(dtype)
        found[name] = LoraLayer(down, up, float(torch.tensor(alpha, dtype=torch.float32)))
    return Adapter(found, {"title": "mine"})


def test_a_hundred_adapters_there_and_back_to_the_bit(tmp_path: Path) -> None:
    config, draw = small(), random.Random(7)
    known = layers(config)
    for _ in range(100):
        first = kohya_tensors(some_adapter(draw, config), config)
        if draw.random() < 0.3:  # other trainers keep alphas in float32 whatever the matrices are in
            first = {k: v.float() if k.endswith(".alpha") else v for k, v in first.items()}
        middle = adapter_of(first, {}, known, where="kohya")
        tensors, metadata = diffusers_tensors(middle)
        back = adapter_of(tensors, {**middle.metadata, **metadata}, known, where="diffusers")
        again = kohya_tensors(back, config)
        assert again.keys() == first.keys()
        for key, value in first.items():
            assert (again[key].dtype, again[key].shape) == (value.dtype, value.shape), key
            assert torch.equal(again[key], value), key
        assert differences(back, middle) == []


def test_files_there_and_back_are_the_same_bytes(tmp_path: Path) -> None:
    config, paths = small(), [tmp_path / f"{n}.safetensors" for n in range(3)]
    adapter = some_adapter(random.Random(1), config)
    first = write_adapter(paths[0], adapter, unet_config=config, metadata=META)
    write_adapter(paths[1], read_adapter(paths[0], config), format="diffusers", unet_config=config)
    assert write_adapter(paths[2], read_adapter(paths[1], config), unet_config=config) == first
    assert paths[2].read_bytes() == paths[0].read_bytes()
    # Another order of layers, another process's order of metadata: the same file.
    turned = Adapter(dict(reversed(adapter.layers.items())), adapter.metadata)
    assert write_adapter(paths[1], turned, unet_config=config, metadata=META) == first


def test_the_model_hash_is_of_tensors_alone(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "a.safetensors"
    config = small()
    adapter = some_adapter(random.Random(2), config)
    for metadata in ({}, {"note": "another header"}):
        write_adapter(path, adapter, unet_config=config, metadata={**META, **metadata})
        data = path.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        said = read_adapter(path, config).metadata
        assert said["sshs_model_hash"] == digest
        assert said["modelspec.hash_sha256"] == f"0x{digest}"


def test_a_peft_file_s_alpha_without_metadata_is_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    atomic.write_safetensors(
        path, {f"unet.{Q}.lora_A.weight": torch.ones(4, 640), f"unet.{Q}.lora_B.weight": torch.ones(640, 4)}
    )
    (layer,) = read_adapter(path).layers.values()
    assert layer.alpha is None
    assert layer.scale == 1.0
    write_adapter(tmp_path / "b.safetensors", read_adapter(path), metadata=META)
    assert float(load_safetensors(tmp_path / "b.safetensors")[f"lora_unet_{SGM.replace('.', '_')}.alpha"]) == 4.0


# ---- what is no LoRA


KEY = "lora_unet_" + SGM.replace(".", "_")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({f"{KEY}.dora_scale": (640, 1), f"{KEY}.lora_down.weight": (1, 640)}, "DoRA"),
        ({f"{KEY}.lokr_w1": (4, 4)}, "LoKr"),
        ({f"{KEY}.hada_w1_a": (4, 4)}, "LoHa"),
        ({f"{KEY}.diff": (4, 4)}, "whole difference"),
        ({f"{KEY}.lora_down.weight": (1, 640)}, "lack one of their two matrices"),
        ({"lora_unet_nowhere.lora_down.weight": (1, 640), "lora_unet_nowhere.lora_up.weight": (640, 1)}, "nowhere"),
        ({f"{KEY}.lora_down.weight": (2, 640), f"{KEY}.lora_up.weight": (640, 3)}, "belong together"),
        ({"model.diffusion_model.x": (2,)}, "no layer"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_an_sdxl_is_named(tmp_path: Path, tensors: dict[str, Any], word: str) -> None:
    path = tmp_path / "a.safetensors"
    atomic.write_safetensors(path, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(IntegrityError, match=word) as refused:
        read_adapter(path)
    assert refused.value.exit_code == 6


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}']
)
def test_a_header_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(4, 640), f"unet.{Q}.lora_B.weight": torch.ones(640, 4)}
    atomic.write_safetensors(path, tensors, {"lora_adapter_metadata": text})
    with pytest.raises(IntegrityError, match="lora_adapter_metadata"):
        read_adapter(path)
