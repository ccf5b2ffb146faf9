"""SDXL as published: its exact sizes, and networks of them that run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from craft_fast.sdxl import published
from craft_fast.sdxl.published import random_text_encoders, random_unet, random_vae
from craft_fast.tiny.architecture import parameter_count

SMALL_UNET = {
    **published.UNET,
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 48,
    "transformer_layers_per_block": [1, 1, 2],
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "sample_size": 16,
}
SMALL_VAE = {**published.VAE, "block_out_channels": [32, 32, 32, 32]}
SMALL_TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
    "projection_dim": 24,
}  # fmt: skip


def test_the_sizes_are_those_published() -> None:
    unet = random_unet(device="meta", dtype=torch.bfloat16)
    vae = random_vae(device="meta", dtype=torch.float32)
    text, text_2 = random_text_encoders(device="meta", dtype=torch.bfloat16)
    assert parameter_count(unet) == published.UNET_PARAMETERS == 2_567_463_684
    assert parameter_count(vae) == published.VAE_PARAMETERS == 83_653_863
    assert parameter_count(text) == published.TEXT_ENCODER_PARAMETERS == 123_060_480
    assert parameter_count(text_2) == published.TEXT_ENCODER_2_PARAMETERS == 694_659_840
    assert {p.device.type for m in (unet, vae, text, text_2) for p in m.parameters()} == {"meta"}
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert tuple(unet.add_embedding.linear_1.weight.shape) == (1280, 1280 + 6 * 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_random_networks_run_and_stay_finite(dtype: torch.dtype) -> None:
    unet = random_unet(device="cpu", dtype=dtype, config=SMALL_UNET)
    vae = random_vae(device="cpu", dtype=dtype, config=SMALL_VAE)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    text = torch.randn(2, 5, 48, generator=generator).to(dtype)
    conditions = {"text_embeds": text[:, 0, :32], "time_ids": torch.full((2, 6), 64.0, dtype=dtype)}
    noise = unet(latents, torch.tensor([3, 900]), text, added_cond_kwargs=conditions).sample
    image = vae.decode(latents).sample
    for result in (noise, image):
        assert result.dtype == dtype
        assert bool(torch.isfinite(result).all())
        assert 0.01 < float(result.float().std()) < 100
    assert not any(p.requires_grad for p in unet.parameters())
    assert not unet.training


@torch.no_grad()
def test_random_text_encoders_know_their_positions() -> None:
    first, second = random_text_encoders(device="cpu", dtype=torch.float32, config=SMALL_TEXT, config_2=SMALL_TEXT)
    for name, buffer in [*first.named_buffers(), *second.named_buffers()]:
        assert name.endswith("position_ids")
        assert buffer.dtype == torch.int64
        assert buffer.flatten().tolist() == list(range(77))
    ids = torch.tensor([[1, 2, 3, 99], [3, 2, 1, 99]])
    hidden = first(ids, output_hidden_states=True).hidden_states[-2]
    pooled = second(ids)[0]
    assert hidden.shape == (2, 4, 32)
    assert pooled.shape == (2, 24)
    assert bool(torch.isfinite(hidden).all())
    assert not torch.equal(pooled[0], pooled[1])


def test_equal_seeds_give_equal_weights_and_no_global_state() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (random_unet(device="cpu", dtype=torch.float32, seed=s, config=SMALL_UNET) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    states = [m.state_dict() for m in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])
    for layer in one.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            assert bool((layer.weight == 1).all())


def test_a_buffer_nobody_knows_is_not_left_to_chance() -> None:
    module = nn.BatchNorm1d(3, device="meta")
    with pytest.raises(TypeError, match="running_mean"):
        published.materialize(module, "cpu", torch.float32)


def test_the_small_worlds_networks_can_be_built_too(sdxl_folder: Path) -> None:
    import json

    config = json.loads((sdxl_folder / "unet" / "config.json").read_text())
    unet = random_unet(device="meta", dtype=torch.float32, config=config)
    assert tuple(unet.conv_in.weight.shape) == (32, 4, 3, 3)
