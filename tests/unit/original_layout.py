"""SDXL's tensors under the names of its original training code: the way back from diffusers' names.

Written for the tests from the layouts themselves, not from diffusers' converters, so that one checks the other.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """``down_blocks.I.resnets.J`` is ``input_blocks.(1 + I * (L + 1) + J).0``, and so on."""
    per_block = int(config["layers_per_block"]) + 1
    attends = {name.split(".attentions.")[0] for name in state if ".attentions." in name}
    result = {}
    for name, value in state.items():
        layer, end = name.rsplit(".", 1)
        parts = name.split(".")
        if layer in _UNET_ENDS:
            new = f"{_UNET_ENDS[layer]}.{end}"
        elif parts[0] == "mid_block":
            new = f"middle_block.{ {'resnets.0': 0, 'attentions.0': 1, 'resnets.1': 2}['.'.join(parts[1:3])] }."
            new += _inner(parts[3:])
        elif parts[0] == "down_blocks" and parts[2] == "downsamplers":
            new = f"input_blocks.{(int(parts[1]) + 1) * per_block}.0.op.{end}"
        elif parts[0] == "up_blocks" and parts[2] == "upsamplers":
            place = 2 if f"up_blocks.{parts[1]}" in attends else 1
            new = f"output_blocks.{(int(parts[1]) + 1) * per_block - 1}.{place}.conv.{end}"
        else:
            index = int(parts[1]) * per_block + int(parts[3])
            side = f"input_blocks.{index + 1}" if parts[0] == "down_blocks" else f"output_blocks.{index}"
            new = f"{side}.{int(parts[2] == 'attentions')}.{_inner(parts[4:])}"
        result[f"model.diffusion_model.{new}"] = value
    return result


def _inner(parts: list[str]) -> str:
    return ".".join([_RESNET.get(parts[0], parts[0]), *parts[1:]])


def vae_names(state: Mapping[str, Tensor], prefix: str = "first_stage_model.") -> State:
    """The decoder's blocks are numbered from the other end, and attention's matrices are 1x1 convolutions."""
    last = max(int(match[1]) for name in state if (match := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    result = {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0." in new:
            head, layer = new.split("mid_block.attentions.0.")
            layer, end = layer.rsplit(".", 1)
            new = f"{head}mid.attn_1.{_VAE_ATTENTION[layer]}.{end}"
            value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        result[prefix + new] = value
    return result


def clip_names(state: Mapping[str, Tensor]) -> State:
    """The first text encoder keeps transformers' names of its day, with the wrapper and the buffer of then."""
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    return {prefix + name: value for name, value in plain.items()}


def open_clip_names(state: Mapping[str, Tensor]) -> State:
    """The second text encoder is open_clip's: queries, keys and values in one matrix, the projection transposed."""
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    result = {}
    for name, value in plain.items():
        if name == "text_projection.weight":
            result["text_projection"] = value.T.contiguous()
            continue
        new = name.replace("encoder.layers.", "transformer.resblocks.")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = new.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        new = new.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
        new = new.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        if match := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", new):
            kinds = [name.replace("q_proj", f"{kind}_proj") for kind in "qkv"]
            result[f"{match[1]}.attn.in_proj_{match[2]}"] = torch.cat([plain[kind] for kind in kinds])
        elif not re.search(r"self_attn\.[kv]_proj", new):
            result[new.replace("self_attn.out_proj", "attn.out_proj")] = value
    return {f"conditioner.embedders.1.model.{name}": value for name, value in result.items()}


def from_folder(folder: Path) -> State:
    """All weights of a diffusers folder as one original file holds them."""
    part = {
        name: load_file(next((folder / name).glob("*.safetensors")))
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    config = json.loads((folder / "unet" / "config.json").read_text())
    return {
        **unet_names(part["unet"], config),
        **vae_names(part["vae"]),
        **clip_names(part["text_encoder"]),
        **open_clip_names(part["text_encoder_2"]),
    }


def write(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """One safetensors file."""
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=dict(metadata or {}) or None)
    return path


def write_hollow(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """A float16 file of the given shapes whose data are a hole: as long as a real one, and free on the disk."""
    table, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path
