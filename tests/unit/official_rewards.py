"""Small published rewards in their OFFICIAL layouts, with random weights, as ``craft-fast rewards fetch`` gets them.

Their pictures are 224 px and their prompts 77 tokens (ImageReward: 35), so the specs of the catalog fit them unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from craft_fast.rewards.networks import ImageReward, MpsReward, ScoreHead
from craft_fast.rng import derive_seed
from craft_fast.store.atomic import write_json, write_safetensors
from craft_fast.tiny.random_model import build_clip_tokenizer

NAMES = ("hpsv2.1", "pickscore", "aesthetic-v2", "image-reward", "mps", "clipscore-l14")
_SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = [*_SPECIAL, "a", "red", "blue", "cat", "dog", "on", "the", "mat", "photo", "of", "!", "?", ".", ","]


def write_official(folder: Path, name: str, seed: int = 0, *, vocab_size: int | None = None) -> dict[str, Path]:
    """Write a small random reward as its authors publish theirs.

    Args:
        folder: for all files; created.
        name: one of ``NAMES``.
        seed: of the weights.
        vocab_size: of a CLIP text tower; None: of the small tokenizer that is written. 49408 for the real one.

    Returns:
        By role: ``weights``, ``config`` (small networks are of no published size), ``head`` for the aesthetic one,
        and ``tokenizer`` (the folder) where it reads text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "official", name))
        if name == "image-reward":
            return _image_reward(folder)
        words = build_clip_tokenizer(folder, max_length=77)
        config = clip_config(vocab_size or words, "gelu" if name in ("hpsv2.1", "pickscore", "mps") else "quick_gelu")
        if name == "mps":
            return _mps(folder, config)
        clip = lively(CLIPModel(CLIPConfig(**config)))
        files = {"weights": folder / "model.safetensors", "config": folder / "config.json", "tokenizer": folder}
        write_json(files["config"], clip.config.to_dict())
        if name == "hpsv2.1":
            files["weights"] = folder / "HPS_v2.1_compressed.pt"
            state = OrderedDict((key, value.half()) for key, value in to_open_clip(clip.state_dict()).items())
            torch.save({"state_dict": state}, files["weights"])
            return files
        write_safetensors(files["weights"], clip.state_dict(), metadata={"format": "pt"})
        if name == "aesthetic-v2":
            files["head"] = folder / "sac+logos+ava1-l14-linearMSE.pth"
            torch.save(lively(ScoreHead(32, (16, 8, 8, 4))).state_dict(), files["head"])
            del files["tokenizer"]
        return files


def clip_config(vocab_size: int, hidden_act: str) -> dict[str, Any]:
    """A small CLIP for 224 px pictures and 77 tokens."""
    return {
        "projection_dim": 32,
        "vision_config": {
            **_SIZES, "image_size": 224, "patch_size": 56, "hidden_act": hidden_act, "projection_dim": 32,
        },
        "text_config": {
            **_SIZES, "vocab_size": vocab_size, "max_position_embeddings": 77, "hidden_act": hidden_act,
            "projection_dim": 32, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
    }  # fmt: skip


@torch.no_grad()
def lively(module: Any) -> Any:
    """Weights of standard deviation fan_in ** -0.5 and small biases: no tensor is a constant that hides an error."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            parameter.fill_(4.6052)
        elif parameter.ndim == 1:
            parameter.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.1)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return module.eval()


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's tensors under open_clip's names."""
    found: dict[str, Tensor] = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
    }
    for part in ("weight", "bias"):
        found[f"visual.ln_pre.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        found[f"visual.ln_post.{part}"] = state[f"vision_model.post_layernorm.{part}"]
        found[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
    for tower, theirs in (("vision_model", "visual."), ("text_model", "")):
        count = len({key.split(".")[3] for key in state if key.startswith(f"{tower}.encoder.layers.")})
        for index in range(count):
            ours, block = f"{tower}.encoder.layers.{index}.", f"{theirs}transformer.resblocks.{index}."
            for part in ("weight", "bias"):
                rows = [state[f"{ours}self_attn.{which}_proj.{part}"] for which in "qkv"]
                found[f"{block}attn.in_proj_{part}"] = torch.cat(rows)
                found[f"{block}attn.out_proj.{part}"] = state[f"{ours}self_attn.out_proj.{part}"]
                found[f"{block}ln_1.{part}"] = state[f"{ours}layer_norm1.{part}"]
                found[f"{block}ln_2.{part}"] = state[f"{ours}layer_norm2.{part}"]
                found[f"{block}mlp.c_fc.{part}"] = state[f"{ours}mlp.fc1.{part}"]
                found[f"{block}mlp.c_proj.{part}"] = state[f"{ours}mlp.fc2.{part}"]
    return found


def to_image_reward(state: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Our ImageReward's tensors under the names of ImageReward.pt, with what only BLIP's training used."""
    parts = (
        ("visual_encoder.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("visual_encoder.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
        ("visual_encoder.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
        ("visual_encoder.post_layernorm", "blip.visual_encoder.norm"),
        ("visual_encoder.encoder.layers", "blip.visual_encoder.blocks"),
        ("text_encoder", "blip.text_encoder"),
        (".self_attn.projection", ".attn.proj"),
        (".self_attn.qkv", ".attn.qkv"),
        (".layer_norm", ".norm"),
    )
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in parts:
            name = name.replace(ours, theirs)
        found[name] = value
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(tokens)[None]
    for side, width in (("vision", 32), ("text", 32)):
        found[f"blip.{side}_proj.weight"], found[f"blip.{side}_proj.bias"] = torch.ones(8, width), torch.ones(8)
    return found


def to_mps(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our MPS's tensors under the names of RE-N-Y/mpsv1."""
    parts = (
        ("clip.", "mps.model."), ("cross.layers", "mps.cross_model.layers"), (".attend.ff_in", ".0.fn.ff.0"),
        (".attend.ff_out", ".0.fn.ff.2"), (".attend.", ".0.fn."), (".block.fused", ".1.fn.fused_attn_ff_proj"),
        (".block.ff_out", ".1.fn.ff_out.1"), (".block.", ".1.fn."),
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in parts:
            name = name.replace(ours, theirs)
        found[name] = value
        if name.endswith("1.fn.norm.weight"):
            found[name.replace("norm.weight", "rotary_emb.inv_freq")] = torch.ones(8)
    return found


def _image_reward(folder: Path) -> dict[str, Path]:
    vocabulary = [*_WORDS, "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    config = {
        "vision": {**_SIZES, "image_size": 224, "patch_size": 56, "layer_norm_eps": 1e-6},
        "text": {
            **_SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": len(_WORDS), "sep_token_id": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        },
        "mlp": [16, 8, 8, 4],
    }  # fmt: skip
    network = lively(ImageReward(config))
    files = {"weights": folder / "ImageReward.pt", "config": folder / "config.json", "tokenizer": folder}
    torch.save(to_image_reward(network.state_dict(), 64), files["weights"])
    write_json(files["config"], config)
    return files


def _mps(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    whole = {"clip": config, "cross": {"dim": 32, "layers": 2, "heads": 2, "head_dim": 16, "ff_mult": 2}}
    files = {"weights": folder / "model.safetensors", "config": folder / "config.json", "tokenizer": folder}
    write_safetensors(files["weights"], to_mps(lively(MpsReward(whole)).state_dict()))
    write_json(files["config"], whole)
    return files
