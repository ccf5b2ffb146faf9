"""Configurations of the published reward models, as values; no torch is imported.

Sources: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, openai/clip-vit-large-patch14, openai/clip-vit-base-patch32,
THUDM/ImageReward (med_config.json), RE-N-Y/mpsv1; the config.json of each, and the packages that make the models.
"""

from __future__ import annotations

from typing import Any

# Of CLIP's vocabulary, 49406 starts and 49407 ends a text. transformers takes the text's state at the first end token,
# open_clip at the first of the highest ids, which is the same token: padding, 0 or 49407, comes behind it.
_CLIP_IDS: dict[str, Any] = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def _clip(hidden_act: str, projection: int, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    common = {"hidden_act": hidden_act, "layer_norm_eps": 1e-5, "projection_dim": projection}
    return {
        "projection_dim": projection,
        "logit_scale_init_value": 2.6592,
        "vision_config": {"image_size": 224, **common, **vision},
        "text_config": {"vocab_size": 49408, "max_position_embeddings": 77, **_CLIP_IDS, **common, **text},
    }


def _layers(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


CLIP_VIT_H = _clip("gelu", 1024, {"patch_size": 14, **_layers(1280, 32, 16)}, _layers(1024, 24, 16))
CLIP_VIT_L = _clip("quick_gelu", 768, {"patch_size": 14, **_layers(1024, 24, 16)}, _layers(768, 12, 12))
CLIP_VIT_B32 = _clip("quick_gelu", 512, {"patch_size": 32, **_layers(768, 12, 12)}, _layers(512, 12, 8))
HEAD = (1024, 128, 64, 16)
AESTHETIC: dict[str, Any] = {"tower": CLIP_VIT_L["vision_config"], "head": list(HEAD)}
BLIP: dict[str, Any] = {
    "vision": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        # timm's; transformers' own default for BLIP is 1e-5.
        "layer_norm_eps": 1e-6,
        **_layers(1024, 24, 16),
    },
    "text": {
        # bert-base-uncased and two more tokens, [DEC] and [ENC].
        "vocab_size": 30524,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
        **_layers(768, 12, 12),
    },
    "mlp": list(HEAD),
}
MPS: dict[str, Any] = {
    "clip": CLIP_VIT_H,
    "cross": {"dim": 1024, "layers": 4, "heads": 16, "head_dim": 64, "ff_mult": 4},
}

# By name, as in config.OFFICIAL_REWARDS.
OFFICIAL: dict[str, dict[str, Any]] = {
    "hpsv2.1": CLIP_VIT_H,
    "hpsv2.0": CLIP_VIT_H,
    "pickscore": CLIP_VIT_H,
    "aesthetic-v2": AESTHETIC,
    "image-reward": BLIP,
    "mps": MPS,
    "clipscore-l14": CLIP_VIT_L,
    "clipscore-b32": CLIP_VIT_B32,
}


def clip_of(vision_width: int) -> dict[str, Any] | None:
    """The published CLIP whose image tower is so wide; None: there is none."""
    known: dict[int, dict[str, Any]] = {
        config["vision_config"]["hidden_size"]: config for config in (CLIP_VIT_H, CLIP_VIT_L, CLIP_VIT_B32)
    }
    return known.get(vision_width)
