"""Reward folders with random weights: the real families at the smallest useful size, for tests and dry runs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from craft_fast.rewards.networks import AestheticReward, ClipReward, ImageReward, MpsReward, ScoreHead
from craft_fast.rng import derive_seed
from craft_fast.store.atomic import write_json
from craft_fast.tiny.random_model import build_clip_tokenizer

MAX_TOKENS = 32
IMAGE_PX = 64


def build_random_rewards(folder: Path, *, seed: int = 0) -> Path:
    """Save h and p (clip), a (aesthetic), image_reward and mps, each in a folder of its name; equal seeds, equal bytes.

    Args:
        folder: created; files of an earlier build are overwritten.
        seed: of all weights.

    Returns:
        ``folder``.
    """
    for name in ("h", "p", "a", "image_reward", "mps"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "random_rewards", name))
            _build(folder / name, name)
    return folder


def _build(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = {"image_size": IMAGE_PX, "resize": "none", "mean": [0.5] * 3, "std": [0.5] * 3, "max_tokens": MAX_TOKENS}
    if name == "a":
        AestheticReward(CLIPVisionModelWithProjection(_vision()), ScoreHead(16, (16, 8, 8, 4))).save_folder(folder)
        write_json(folder / "reward.json", {"family": "aesthetic", **info})
        return
    vocab_size = build_clip_tokenizer(folder, max_length=MAX_TOKENS)
    if name == "image_reward":
        _image_reward(vocab_size).save_folder(folder)
        write_json(folder / "reward.json", {"family": name, **info, "score_mean": 0.1, "score_std": 2.0})
        return
    config = CLIPConfig(text_config=_text(vocab_size), vision_config=_vision().to_dict(), projection_dim=16)
    if name == "mps":
        cross = {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "ff_mult": 2}
        MpsReward({"clip": config.to_dict(), "cross": cross}).save_folder(folder)
        told = {"score_scale": "logit_scale", "condition": "light, color, things.", "threshold": 0.01}
        write_json(folder / "reward.json", {"family": name, **info, **told})
        return
    ClipReward(CLIPModel(config)).save_folder(folder)
    write_json(folder / "reward.json", {"family": "clip", **info, "score_scale": 1.0 if name == "h" else 100.0})


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PX,
        patch_size=16,
        projection_dim=16,
    )


def _text(vocab_size: int) -> dict[str, object]:
    config: dict[str, object] = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    ).to_dict()
    return config


def _image_reward(vocab_size: int) -> ImageReward:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # transformers' own default of 1e-10 makes an untrained tower that is blind.
    vision = {**common, "image_size": IMAGE_PX, "patch_size": 16, "layer_norm_eps": 1e-6, "initializer_range": 0.1}
    text = {
        **common,
        "initializer_range": 0.1,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": vocab_size - 2,
        "sep_token_id": vocab_size - 1,
    }
    return ImageReward({"vision": vision, "text": text, "mlp": [16, 8, 8, 4]})
