"""Random weights as the file that hpsv2 reads, and its vocabulary: so that it can score without the published files.

open_clip's names (https://github.com/mlfoundations/open_clip, model.py and transformer.py): q, k and v are one matrix,
projections are the other way round. Read back by ``rewards.networks.read_network``, which checks every name.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.errors import EnvironmentProblem

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
# Of CLIP's 49,408 tokens 512 are bytes, with and without the end of a word, and two are special.
_MERGES = 49152 - 256 - 2
_SAME = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def write_hpsv2(clip: Any, path: Path) -> None:
    """Write a CLIPModel's weights, rounded to float16, under open_clip's names.

    Args:
        clip: of transformers, on the CPU.
        path: of the file, in a temporary folder.
    """
    state = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    found: dict[str, Tensor] = {"logit_scale": clip.logit_scale.detach().float()}
    for ours, theirs in (("vision_model", "visual."), ("text_model", "")):
        for index in range(len(getattr(clip, ours).encoder.layers)):
            layer, block = f"{ours}.encoder.layers.{index}.", f"{theirs}transformer.resblocks.{index}."
            for kind in ("weight", "bias"):
                parts = [state[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
                for mine, other in _SAME.items():
                    found[f"{block}{other}.{kind}"] = state[f"{layer}{mine}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    found["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    found["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    found["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    found["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    torch.save({"state_dict": found}, path)


def write_words(environment: Path, folder: Path) -> list[Path]:
    """CLIP's vocabulary from the package's environment, as ``vocab.json`` and ``merges.txt``.

    Args:
        environment: the package's virtual environment.
        folder: where they go.

    Raises:
        EnvironmentProblem: it is not in that environment.
    """
    found = sorted(environment.glob(f"lib/python*/site-packages/hpsv2/**/{VOCABULARY}"))
    if not found:
        raise EnvironmentProblem(
            "The package has no vocabulary", where=str(environment), hint="craft-fast rewards install hpsv2"
        )
    with gzip.open(found[0], "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : _MERGES + 1]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    files = [folder / "vocab.json", folder / "merges.txt"]
    files[0].write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
    files[1].write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return files


def _letters() -> list[str]:
    """A printable character for each byte, in GPT-2's order, which CLIP's vocabulary begins with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*(chr(byte) for byte in printable), *(chr(256 + index) for index in range(len(others)))]


def small_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """A CLIP configuration in open_clip's words."""
    vision, text = config["vision_config"], config["text_config"]
    return {
        "embed_dim": config["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"], "layers": vision["num_hidden_layers"], "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"], "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
            "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
        },
    }  # fmt: skip
