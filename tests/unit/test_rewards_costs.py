"""Costs of reward networks: weights exact, bytes alive and operations as on the meta device, at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from craft_fast.rewards import published
from craft_fast.rewards.base import read_preprocessing
from craft_fast.rewards.catalog import OFFICIALS
from craft_fast.rewards.costs import network_cost
from craft_fast.rewards.networks.build import read_network
from craft_fast.rewards.networks.head import ScoreHead
from craft_fast.rewards.networks.random_weights import RewardNetwork, empty_network, random_network
from craft_fast.store.run import resolve_uri
from tests.unit.live_bytes import LiveBytes, flash_attention

# One of each size: hpsv2.0 and pickscore are hpsv2.1 to the byte.
NAMES = ("hpsv2.1", "aesthetic-v2", "image-reward", "mps", "clipscore-b32")
BATCH = 4


def half(name: str) -> RewardNetwork:
    """A published network in float16 without memory, its head in float32 as ``read_network`` leaves it."""
    network = empty_network(OFFICIALS[name].spec.family, published.OFFICIAL[name]).half()
    for module in network.modules():
        if isinstance(module, ScoreHead):
            module.float()
    return network


def look(network: Any, name: str) -> None:
    """The image side of one forward of ``BATCH`` pictures, on the meta device."""
    pixels = torch.empty(BATCH, 3, 224, 224, device="meta", dtype=torch.half)
    if name == "image-reward":  # its text encoder asks for a value of the mask, which there is none of here
        network.image_states(pixels)
        return
    given: tuple[Tensor, ...] = ()
    if name == "mps":
        tokens = torch.empty(BATCH, 77, 1024, device="meta", dtype=torch.half)
        given = (torch.empty(BATCH, 1024, device="meta"), tokens, torch.ones(BATCH, 77, device="meta").bool())
    elif name != "aesthetic-v2":
        width = published.OFFICIAL[name]["projection_dim"]
        given = (torch.empty(BATCH, width, device="meta"),)
    network.score_encoded(pixels, *given)


@pytest.mark.parametrize("name", NAMES)
def test_weights_bytes_and_operations_are_those_of_the_network(name: str) -> None:
    network, described = half(name), OFFICIALS[name].spec
    found = network_cost(
        described.family, published.OFFICIAL[name], element=2, max_tokens=described.max_tokens
    )  # fmt: skip
    kept = {torch.float16: 0, torch.float32: 0}
    for value in network.parameters():
        kept[value.dtype] += value.numel()
    # A single number is stored in float32 by ``read_network``; ``half`` above casts it.
    assert found.parameters + found.float32_parameters == sum(kept.values())
    assert found.weight_bytes(2) == pytest.approx(2 * kept[torch.float16] + 4 * kept[torch.float32], abs=8)
    with LiveBytes() as live, flash_attention(), torch.inference_mode():
        look(network, name)
    shaped = 3 * 224**2 * 4  # lie beside the normalised pixels
    assert found.image_bytes - shaped == pytest.approx(live.peak / BATCH, rel=0.02)


@pytest.mark.parametrize("name", ["hpsv2.1", "aesthetic-v2", "mps"])
def test_operations_of_a_picture(name: str) -> None:
    network, described = half(name), OFFICIALS[name].spec
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        look(network, name)
    found = network_cost(described.family, published.OFFICIAL[name], element=2)
    assert found.image_flops == pytest.approx(counter.get_total_flops() / BATCH, rel=0.02)


def test_image_rewards_text_looks_at_every_picture() -> None:
    """Counted on a small one with real values, text encoder and all."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "vision": {**layers, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6},
        "text": {**layers, "vocab_size": 99, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 97,
                 "sep_token_id": 98},
        "mlp": [32, 16, 8, 4],
    }  # fmt: skip
    network = random_network("image_reward", config, device="cpu", dtype=torch.float32)
    ids = torch.ones(BATCH, 35, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        network(torch.zeros(BATCH, 3, 32, 32), ids, torch.ones_like(ids))
    found = network_cost("image_reward", config, element=4, max_tokens=35)
    # PyTorch counts no attention of its CPU kernel: two layers over 17 image tokens, 35 of text, and both.
    attention = 2 * 4.0 * 64 * (17 * 17 + 35 * 35 + 35 * 17)
    assert found.image_flops == pytest.approx(counter.get_total_flops() / BATCH + attention, rel=0.01)
    assert found.weight_bytes(4) == 4 * sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize(("name", "kind"), [("h", "clip"), ("a", "aesthetic"), ("image_reward", "image_reward")])
def test_a_familys_own_sizes(name: str, kind: str) -> None:
    from craft_fast.config import RewardSettings
    from craft_fast.plan.judges import judges

    path = f"package:craft_fast.tiny/assets/rewards/{name}"
    folder = resolve_uri(path)
    assert isinstance(folder, Path)
    files = {"weights": folder / "model.safetensors", "config": folder / "config.json"}
    if kind == "aesthetic":
        files["head"] = folder / "head.safetensors"
    network = read_network(read_preprocessing(folder, kind), files)
    settings = {name: RewardSettings(kind=kind, path=path)}
    found = judges(settings, held_out=True, element=4)[0][name]
    assert found is not None
    assert found.need.weight_bytes == 4 * sum(value.numel() for value in network.parameters())


def test_random_weights_are_a_function_of_the_seed_and_tell_pictures_apart() -> None:
    config = {"tower": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "image_size": 32, "patch_size": 8, "projection_dim": 32}, "head": [32, 16, 8, 4]}  # fmt: skip

    def made(seed: int) -> Any:
        return random_network("aesthetic", config, device="cpu", dtype=torch.float32, seed=seed)

    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, again, other = (made(seed)(pixels) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert len(set(first.tolist())) == 3
