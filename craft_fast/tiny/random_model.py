"""A random-weight SDXL folder: the real classes at the smallest useful size, for tests and dry runs.

Untrained, so its pictures are noise, but every code path that a real SDXL takes is taken: two text encoders,
text_time conditioning, a KL autoencoder, a diffusers scheduler. Built in about a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from craft_fast.quiet import import_bitsandbytes, quiet_progress_bars, quiet_third_party

quiet_third_party()

_WORD_TEXT = (
    "a an and the of on in to with at left right above below under over beside next between behind one two three "
    "red green blue yellow purple orange black white grey pink cyan brown circle square triangle star heart diamond "
    "shape shapes background plain sharp vivid clean bright clear crisp centered picture image photo drawing "
    "small large big tiny simple detailed blurry noisy faded"
)
WORDS = tuple(_WORD_TEXT.split())


def build_clip_tokenizer(
    folder: Path, words: Iterable[str] = WORDS, *, max_length: int = 32, pad_id: int | None = None
) -> int:
    """Save a byte-level CLIP BPE tokenizer whose merges make each of ``words`` one token.

    Args:
        folder: where ``tokenizer.json`` and its config are written.
        words: lower-case words; any other text still encodes, byte by byte.
        max_length: tokens of one prompt, start and end included.
        pad_id: None pads with the end token as SDXL's first tokenizer does; 0 pads with ``!`` as its second.

    Returns:
        The size of the vocabulary. The last two ids are ``<|startoftext|>`` and ``<|endoftext|>``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(symbols + [f"{s}</w>" for s in symbols])}
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _apply_merges([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            vocab.setdefault(parts[0] + parts[1], len(vocab))
            parts = _apply_merges(parts, merges[-1:])
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    pad = "<|endoftext|>" if pad_id is None else symbols[pad_id]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return len(vocab)


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """BPE as the tokenizer will run it: earlier merges first, so later words never break earlier ones."""
    for left, right in merges:
        index = 0
        while index + 1 < len(parts):
            if (parts[index], parts[index + 1]) == (left, right):
                parts = [*parts[:index], left + right, *parts[index + 2 :]]
            index += 1
    return parts


def build_random_sdxl(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Save a complete SDXL folder with random weights; equal seeds give equal bytes.

    UNet channels (32, 64) at latent 16x16, text width 32 + 32, autoencoder factor 4 (64x64 images), prompts of
    32 tokens. ``StableDiffusionXLPipeline.from_pretrained`` opens it.

    Args:
        folder: created; files of an earlier build are overwritten.
        seed: of all weights.
        prediction_type: ``epsilon`` or ``v_prediction``, written to the scheduler's config.

    Returns:
        ``folder``.
    """
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocab_size = build_clip_tokenizer(folder / "tokenizer")
        build_clip_tokenizer(folder / "tokenizer_2", pad_id=0)
        text = transformers.CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
        modules: dict[str, Any] = {
            "text_encoder": transformers.CLIPTextModel(text),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(text),
            "unet": _unet(),
            "vae": _vae(),
        }
    quiet_progress_bars()
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=2, sort_keys=True), encoding="utf-8")
    return folder


_MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return unet


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.5,
    )
    return vae
