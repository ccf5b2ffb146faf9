"""Small random hpsv2 and image-reward networks as files that both the toolkit and the authors' packages read."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from craft_bench.rewards.official_file import small_architecture, write_words
from craft_fast.rewards import catalog
from craft_fast.rewards.loaders import RewardSource
from craft_fast.rewards.networks import ImageReward
from craft_fast.store.atomic import write_json
from tests.unit.official_rewards import clip_config, lively, to_image_reward, to_open_clip

Small = tuple[RewardSource, dict[str, Any]]
_SPECIAL = ["[PAD]", *(f"[unused{i}]" for i in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x180)) if not chr(code).isupper()]
WORDS = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), "red", "circle", "on", "the", "##ing", "cat"]


def small_hpsv2(folder: Path, environment: Path, *, patch_px: int = 14) -> Small:
    """HPSv2's architecture with patches as published, 2 layers 32 wide, weights in half precision as published.

    Args:
        folder: for the files.
        environment: of hpsv2, which has the true vocabulary.
        patch_px: 14 as published.

    Returns:
        The source, and the sizes in the package's words.
    """
    folder.mkdir(parents=True)
    config = clip_config(49408, "gelu")
    config["vision_config"]["patch_size"] = patch_px
    torch.manual_seed(7)
    clip = lively(CLIPModel(CLIPConfig(**config)))
    weights = folder / "HPS_v2.1_compressed.pt"
    state = OrderedDict((name, value.half()) for name, value in to_open_clip(clip.state_dict()).items())
    torch.save({"state_dict": state}, weights)
    write_json(folder / "config.json", clip.config.to_dict())
    words = tuple(write_words(environment, folder))
    files = {"weights": weights, "config": folder / "config.json"}
    return RewardSource(catalog.get("hpsv2.1").spec, files, folder, "small", words), small_architecture(config)


def small_image_reward(folder: Path) -> Small:
    """ImageReward's architecture with patches of 16 px as published, 2 layers 32 wide; as ``small_hpsv2``."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    count = len(WORDS) + 2
    text = {
        **sizes, "vocab_size": count, "max_position_embeddings": 64, "pad_token_id": 0, "layer_norm_eps": 1e-12,
        "bos_token_id": len(WORDS), "sep_token_id": WORDS.index("[SEP]"), "hidden_act": "gelu",
    }  # fmt: skip
    config = {
        "vision": {**sizes, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
        "text": text, "mlp": [16, 8, 8, 4],
    }  # fmt: skip
    torch.manual_seed(8)
    network = lively(ImageReward(config))
    state = to_image_reward(network.state_dict(), 64)
    for side in ("vision", "text"):  # of BLIP's training alone; the package makes them 256 wide whatever the rest is
        state[f"blip.{side}_proj.weight"], state[f"blip.{side}_proj.bias"] = torch.ones(256, 32), torch.ones(256)
    torch.save(state, folder / "ImageReward.pt")
    # The package reads BERT's words from the top level, the toolkit its own from "text".
    bert = {**text, "add_cross_attention": True, "encoder_width": 32, "type_vocab_size": 2}
    bert |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "model_type": "bert"}
    write_json(folder / "med_config.json", {**bert, **config})
    architecture = {
        "vision": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 4},
        "width": 32, "head": [16, 8, 8, 4],
    }  # fmt: skip
    files = {"weights": folder / "ImageReward.pt", "config": folder / "med_config.json"}
    spec = catalog.get("image-reward").spec
    return RewardSource(spec, files, folder, "small", (folder / "vocab.txt",)), architecture
