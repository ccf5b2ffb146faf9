"""Sizes of the small networks: the published classes, a thousandth of the published sizes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from craft_fast.rewards.networks import AestheticReward, ClipReward, ImageReward, ScoreHead

MAX_TOKENS = 32
TEXT_WIDTH = 64
TIME_WIDTH = 16


def build_vae() -> AutoencoderKL:
    """Autoencoder of factor 4: 64 px pictures to latents [4, 16, 16]; 0.8 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """UNet with SDXL's text_time conditioning; attention at the two lower levels as in SDXL; 3.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 2, 3),
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def _text_config(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 3 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": TEXT_WIDTH,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def build_text_encoders(vocab_size: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair of CLIP text encoders, 64 wide."""
    config = _text_config(vocab_size)
    return CLIPTextModel(CLIPTextConfig(**config)), CLIPTextModelWithProjection(CLIPTextConfig(**config))


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own noise schedule: scaled linear, 0.00085 to 0.012, epsilon."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip


def _vision_config(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width + 64,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": TEXT_WIDTH,
    }


def build_clip_reward(vocab_size: int) -> ClipReward:
    """HPS-like and PickScore-like dual encoder, 0.5 M parameters."""
    vision = CLIPVisionConfig(**_vision_config(96, 3))
    text = CLIPTextConfig(**_text_config(vocab_size))
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH)
    return ClipReward(CLIPModel(config))


def build_aesthetic_reward() -> AestheticReward:
    """Image tower with a head, 0.15 M parameters."""
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision_config(64, 3)))
    return AestheticReward(tower, ScoreHead(TEXT_WIDTH, (64, 32, 16, 8)))


def build_image_reward(vocab_size: int) -> ImageReward:
    """BLIP-like cross-encoder, 0.5 M parameters."""
    common = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3}
    # transformers' own default of 1e-10 makes an untrained tower that is blind and does not learn.
    vision = {
        **common, "num_hidden_layers": 2, "image_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6,
        "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        **common, "num_hidden_layers": 2, "vocab_size": vocab_size, "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0, "bos_token_id": vocab_size - 2, "sep_token_id": vocab_size - 1,
    }  # fmt: skip
    return ImageReward({"vision": vision, "text": text, "mlp": [64, 32, 16, 8]})


def parameter_count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
