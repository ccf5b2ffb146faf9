"""Reward towers on a GPU: precision beside the CPU's float32, xformers beside SDPA, full-size weights on the card."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast.errors import EnvironmentProblem
from craft_fast.rewards import published
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.costs import network_cost
from craft_fast.rewards.networks import ImageReward, MpsReward
from craft_fast.rewards.networks.attention import set_tower_attention
from craft_fast.rewards.networks.build import read_network
from craft_fast.rewards.networks.random_weights import random_network
from tests.unit.official_rewards import NAMES, write_official

pytestmark = pytest.mark.gpu
FAMILY = {"aesthetic-v2": "aesthetic", "image-reward": "image_reward", "mps": "mps"}
# Of a cosine or of a small head's output; half precision keeps 11 bits, bfloat16 8.
NEAR = {torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.06}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("official")
    return {name: write_official(folder / name, name) for name in NAMES}


def inputs(network: Any, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 18, (count, 35 if isinstance(network, ImageReward) else 77), generator=made)
    mask = torch.ones_like(ids)
    if isinstance(network, ImageReward):
        mask[0, 9:] = 0
    return torch.randn(count, 3, 224, 224, generator=made), ids, mask


def scores(network: Any, device: str, count: int = 4) -> Tensor:
    pixels, ids, mask = (part.to(device) for part in inputs(network, count))
    if isinstance(network, MpsReward):
        network.set_condition(ids[0])
    with torch.inference_mode():
        found: Tensor = network.to(device)(pixels, ids, mask)
    assert found.dtype == torch.float32
    return found.cpu()


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", NAMES)
def test_small_networks_score_as_on_the_cpu(name: str, dtype: torch.dtype, files: dict[str, dict[str, Path]]) -> None:
    spec = Preprocessing(family=FAMILY.get(name, "clip"), threshold=0.01)  # type: ignore[arg-type]
    expected = scores(read_network(spec, files[name]), "cpu")
    found = scores(read_network(spec, files[name], dtype=dtype), "cuda")
    assert float((found - expected).abs().max()) < NEAR[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["hpsv2.1", "aesthetic-v2", "image-reward", "mps"])
def test_xformers_scores_as_sdpa_or_says_why_it_cannot(name: str, dtype: torch.dtype) -> None:
    """At full size: its kernels are chosen by head size, 80 in ViT-H and 64 elsewhere."""
    pytest.importorskip("xformers")
    family = FAMILY.get(name, "clip")
    network = random_network(family, published.OFFICIAL[name], device="cuda", dtype=dtype)
    try:
        used = set_tower_attention(network, "xformers")
    except EnvironmentProblem as error:
        pytest.skip(f"refused, as it must be where it does not run: {error}")
    assert used == "xformers"
    found = scores(network, "cuda")
    assert set_tower_attention(network, "sdpa") == "sdpa"
    expected = scores(network, "cuda")
    assert float((found - expected).abs().max()) < NEAR[dtype]


def test_a_refused_probe_leaves_a_working_network(files: dict[str, dict[str, Path]]) -> None:
    """xformers has no kernel for float64: its probe must fail, and nothing else."""
    pytest.importorskip("xformers")
    network = read_network(Preprocessing(family="clip"), files["pickscore"], dtype=torch.float64).to("cuda")
    before = scores(network, "cuda")
    with pytest.raises(EnvironmentProblem, match="xformers"):
        set_tower_attention(network, "xformers")
    assert torch.equal(scores(network, "cuda"), before)


@pytest.mark.parametrize("name", ["hpsv2.1", "aesthetic-v2", "image-reward", "mps"])
def test_full_size_weights_take_what_the_formula_says(name: str) -> None:
    family = FAMILY.get(name, "clip")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    network = random_network(family, published.OFFICIAL[name], device="cuda", dtype=torch.float16)
    taken = torch.cuda.memory_allocated() - before
    planned = network_cost(family, published.OFFICIAL[name], element=2).weight_bytes(2)
    assert planned <= taken < 1.01 * planned  # the allocator rounds each tensor up to 512 bytes
    found = scores(network, "cuda", 16)
    assert bool(found.isfinite().all())
    assert float(found.std()) > 0


def test_texts_encoded_before_give_the_scores_of_both_at_once(files: dict[str, dict[str, Path]]) -> None:
    for name in NAMES:
        spec = Preprocessing(family=FAMILY.get(name, "clip"), threshold=0.9)  # type: ignore[arg-type]
        network = read_network(spec, files[name], dtype=torch.float16).to("cuda")
        both = scores(network, "cuda")
        pixels, ids, mask = (part.cuda() for part in inputs(network))
        with torch.inference_mode():
            kept = [part.cpu() for part in network.encode_text(ids, mask)]
            apart = network.score_encoded(pixels, *(part.cuda() for part in kept)).cpu()
        assert torch.equal(both, apart)
