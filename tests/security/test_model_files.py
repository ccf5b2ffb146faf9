"""Hostile, broken and mistaken model files: each is told by name, from its header alone, with what to do."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.sdxl.identify import kind_of, read_header
from craft_fast.sdxl.load import load_sdxl, model_digest, open_source

UNET = "model.diffusion_model."
TEXT = "conditioner.embedders.0.transformer.text_model."
TEXT_2 = "conditioner.embedders.1.model."
CONTEXT = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
Shapes = dict[str, tuple[int, ...]]


def unet(*, channels: int = 4, context: int = 2048, label: int | None = 2816) -> Shapes:
    shapes: Shapes = {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3), CONTEXT: (640, context)}
    return shapes if label is None else {**shapes, f"{UNET}label_emb.0.0.weight": (1280, label)}


VAE: Shapes = {
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
TEXTS: Shapes = {f"{TEXT}final_layer_norm.weight": (768,), f"{TEXT_2}ln_final.weight": (1280,)}
SD1_TEXT: Shapes = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}
SD2_TEXT: Shapes = {"cond_stage_model.model.ln_final.weight": (1024,)}
REFINER_TEXT: Shapes = {"conditioner.embedders.0.model.ln_final.weight": (1280,)}

MISTAKEN: dict[str, tuple[Shapes, str, str]] = {
    "sd1": ({**unet(context=768, label=None), **VAE, **SD1_TEXT}, "Stable Diffusion 1", "only SDXL"),
    "sd2": ({**unet(context=1024, label=None), **VAE, **SD2_TEXT}, "Stable Diffusion 2", "only SDXL"),
    "sd1 unet": (unet(context=768, label=None), "Stable Diffusion 1", "only SDXL"),
    "sd2 unet": (unet(context=1024, label=None), "Stable Diffusion 2", "only SDXL"),
    "refiner": ({**unet(context=1280, label=2560), **VAE, **REFINER_TEXT}, "refiner", "SDXL base"),
    "refiner unet": (unet(context=1280, label=2560), "refiner", "SDXL base"),
    "inpainting": ({**unet(channels=9), **VAE, **TEXTS}, "inpainting", "made from"),
    "sd1 inpainting": ({**unet(channels=9, context=768, label=None), **SD1_TEXT}, "inpainting", "made from"),
    "edit": ({**unet(channels=8), **VAE, **TEXTS}, "image-editing", "made from"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536), **VAE}, "Stable Diffusion 3", "only SDXL"),
    "flux": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "FLUX", "only SDXL"),
    "bare flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "FLUX", "only SDXL"),
    "pixart": ({"adaln_single.emb.timestep_embedder.linear_1.weight": (1152, 256)}, "PixArt", "only SDXL"),
    "unknown": ({"layers.0.weight": (2, 2), "head.bias": (2,)}, "not known", "whole SDXL"),
    "unet alone": (unet(), "without its text encoders", "whole model"),
    "unet with vae": ({**unet(), **VAE}, "without its text encoders", "whole model"),
    "one text encoder": (
        {**unet(), **VAE, f"{TEXT}final_layer_norm.weight": (768,)}, "without its text encoders", "whole model",
    ),
    "diffusers unet": (
        {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3), "up_blocks.0.resnets.0.conv1.weight": (9, 9, 3, 3)},
        "UNet in diffusers' naming", "folder",
    ),
    "vae": ({name.removeprefix("first_stage_model."): value for name, value in VAE.items()}, "VAE alone", "model.vae"),
    "prefixed vae": (VAE, "a VAE alone", "model.vae"),
    "lora": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (8, 320)}, "LoRA", "merged"),
    "peft lora": ({"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": (8, 320)}, "LoRA", "merged"),
    "lokr": ({"lora_unet_x.lokr_w1": (8, 8)}, "LoRA", "merged"),
    "embedding": ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "textual inversion", "whole SDXL"),
    "old embedding": ({"emb_params": (4, 768)}, "textual inversion", "whole SDXL"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "ControlNet", "whole SDXL"),
    "text encoder": ({"text_model.final_layer_norm.weight": (768,)}, "text encoder alone", "whole SDXL"),
    "playground": ({**unet(), **VAE, **TEXTS, "edm_mean": (4,), "edm_std": (4,)}, "EDM", "epsilon or v"),
    "fp8": ({**unet(), **VAE, **TEXTS, f"{UNET}out.2.scale_weight": ()}, "already quantised", "float16"),
    "nf4": ({**unet(), **VAE, **TEXTS, f"{UNET}out.2.weight.absmax": (2,)}, "already quantised", "float16"),
}  # fmt: skip


def hollow(shapes: Shapes, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file of the given shapes whose data are a hole: nothing could be loaded from it, and nothing may be."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize("name", MISTAKEN)
def test_another_kind_of_file_is_told_by_name(name: str, tmp_path: Path) -> None:
    shapes, kind, advice = MISTAKEN[name]
    path = hollow(shapes, tmp_path / "model.safetensors")
    for use in (model_digest, lambda path: load_sdxl(path, device="cpu")):
        with pytest.raises(EnvironmentProblem) as refused:
            use(path)
        assert kind in refused.value.why
        assert advice in refused.value.hint
        assert str(path) in refused.value.where
        assert refused.value.exit_code == 4


def test_an_sdxl_is_told_as_one(tmp_path: Path) -> None:
    header = read_header(hollow({**unet(), **VAE, **TEXTS}, tmp_path / "m.safetensors", {"a": "b"}))
    assert kind_of(header) == ("SDXL", "")
    assert header.metadata == {"a": "b"}


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def whole(path: Path) -> None:
    hollow({**unet(), **VAE, **TEXTS}, path)


def cut(path: Path) -> None:
    whole(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)


def overlapping(path: Path) -> None:
    table = {name: {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]} for name in (CONTEXT, "b")}
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def bomb(path: Path) -> None:
    header = b'{"a":' * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("m.safetensors", lambda path: torch.save({"a": Canary(path.with_name("canary"))}, path), "pickle"),
        ("m.safetensors", lambda path: path.write_bytes(pickle.dumps(Canary(path.with_name("canary")))), "pickle"),
        ("m.ckpt", lambda path: torch.save({"a": Canary(path.with_name("canary"))}, path), "pickle"),
        ("m.pt", lambda path: path.write_bytes(pickle.dumps(Canary(path.with_name("canary")))), "pickle"),
        ("m.safetensors", lambda path: path.write_bytes(b""), "empty file"),
        ("m.safetensors", lambda path: path.write_bytes(b"<!doctype html><html>log in</html>"), "HTML"),
        ("m.safetensors", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "LFS"),
        ("m.safetensors", lambda path: path.write_bytes(b"GGUF" + b"\0" * 60), "GGUF"),
        ("m.safetensors", cut, "cut off"),
        ("m.safetensors", overlapping, "damaged"),
        ("m.safetensors", bomb, "damaged"),
    ],
)
def test_what_is_no_model_file_is_refused_unopened(
    name: str, make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(IntegrityError, match=said) as refused:
        load_sdxl(path, device="cpu")
    assert refused.value.exit_code == 6
    assert refused.value.hint
    assert not (tmp_path / "canary").exists()
    if said == "pickle":
        assert "weights_only=True" in refused.value.hint


def test_a_cut_off_file_is_told_with_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cut(path)
    size = path.stat().st_size
    with pytest.raises(IntegrityError, match=rf"promises {size + 100:,} bytes, the file has {size:,}"):
        open_source(path)


def test_a_missing_file_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no such file"):
        open_source(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("index", "config", "said"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, {}, "Stable Diffusion 1 or 2"),
        ({"_class_name": "StableDiffusion3Pipeline"}, {}, "Stable Diffusion 3"),
        ({"_class_name": "FluxPipeline"}, {}, "FLUX"),
        ({"_class_name": "SomethingElse"}, {}, "another model"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}, {}, "refiner"),
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None]}, {}, "refiner"),
        ({}, {"in_channels": 4, "cross_attention_dim": 1280}, "refiner"),
        ({}, {"in_channels": 9}, "inpainting"),
        ({}, {"in_channels": 4, "cross_attention_dim": 768}, "Stable Diffusion 1 or 2"),
    ],
)
def test_a_folder_of_another_pipeline_is_told_by_name(
    index: dict[str, object], config: dict[str, object], said: str, tmp_path: Path
) -> None:
    for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler"):
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EnvironmentProblem, match=said) as refused:
        load_sdxl(tmp_path, device="cpu")
    assert refused.value.exit_code == 4


def test_a_folder_around_a_file_says_so(tmp_path: Path) -> None:
    whole(tmp_path / "pony.safetensors")
    with pytest.raises(EnvironmentProblem, match=r"set model\.path to that file") as refused:
        open_source(tmp_path)
    assert "pony.safetensors" in refused.value.hint


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "\0"])
def test_hostile_json_is_an_integrity_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(IntegrityError):
        open_source(tmp_path)


def test_no_code_in_a_folder_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler"):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
        text = {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, "in_channels": 4,
                "addition_embed_type": "text_time", "_class_name": "Evil", "tokenizer_class": "Evil"}  # fmt: skip
        for name in ("config.json", "tokenizer_config.json", "scheduler_config.json"):
            (folder / name).write_text(json.dumps(text))
        for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
            save_file({"a": torch.zeros(1)}, folder / name)
    with pytest.raises(CraftError):
        load_sdxl(tmp_path, device="cpu")
    assert not canary.exists()
