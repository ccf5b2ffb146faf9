"""Text encoders and VAE: counts that are exact, bytes alive on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from craft_fast.sdxl import published
from craft_fast.sdxl.costs_parts import clip_text_cost, vae_cost, vae_parameters
from craft_fast.tiny.architecture import build_vae, parameter_count
from tests.unit.live_bytes import LiveBytes, flash_attention

SIZE = {"height_px": 1024, "width_px": 1024}


@pytest.fixture(scope="module")
def vae() -> Any:
    return published.random_vae(device="meta", dtype=torch.float32)


def test_parameters_are_those_of_the_networks() -> None:
    assert vae_parameters(published.VAE) == published.VAE_PARAMETERS
    tiny = build_vae()
    assert vae_parameters(tiny.config) == parameter_count(tiny)
    first = clip_text_cost(published.TEXT_ENCODER, prompts=1, dtype_bytes=1)
    second = clip_text_cost(published.TEXT_ENCODER_2, prompts=1, dtype_bytes=1, projected=True)
    assert first.weight_bytes == published.TEXT_ENCODER_PARAMETERS
    assert second.weight_bytes == published.TEXT_ENCODER_2_PARAMETERS


@pytest.mark.parametrize("half", ["decode", "encode"])
def test_vae_on_whole_images(vae: Any, half: str) -> None:
    given = torch.empty(1, 4, 128, 128, device="meta") if half == "decode" else torch.empty(1, 3, 1024, 1024).to("meta")
    with LiveBytes() as live, flash_attention(), torch.inference_mode():
        getattr(vae, half)(given)
    # What the caller holds is a part of the cost.
    held = given.numel() * 4
    found = vae_cost(published.VAE, **SIZE, half=half, gpu=False)
    assert found.activation_bytes == pytest.approx(live.peak + held, rel=0.05)


def test_text_encoders() -> None:
    networks = published.random_text_encoders(device="meta", dtype=torch.bfloat16)
    for network, config in zip(networks, (published.TEXT_ENCODER, published.TEXT_ENCODER_2), strict=True):
        tokens = torch.zeros(8, 77, dtype=torch.long, device="meta")
        with LiveBytes() as live, flash_attention(), torch.no_grad():
            network(tokens, output_hidden_states=True)
        found = clip_text_cost(config, prompts=8)
        assert found.activation_bytes == pytest.approx(live.peak, rel=0.1)
