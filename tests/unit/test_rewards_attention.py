"""Which attention the towers use, and that every one of them computes the same."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_fast.errors import EnvironmentProblem, ExitCode
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.networks import MpsReward
from craft_fast.rewards.networks.attention import attend, head_sizes, set_tower_attention
from craft_fast.rewards.networks.build import read_network
from tests.unit.official_rewards import write_official

FAMILIES = {"pickscore": "clip", "aesthetic-v2": "aesthetic", "image-reward": "image_reward", "mps": "mps"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("official")
    return {name: write_official(folder / name, name) for name in FAMILIES}


def network_of(name: str, files: dict[str, dict[str, Path]]) -> Any:
    network = read_network(Preprocessing(family=FAMILIES[name], threshold=0.9), files[name])  # type: ignore[arg-type]
    if isinstance(network, MpsReward):
        network.set_condition(inputs("mps")[1][0])
    return network


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 18, (2, 35 if name == "image-reward" else 77), generator=made)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return torch.randn(2, 3, 224, 224, generator=made), ids, mask


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attend_is_softmax_attention(causal: bool, masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 16) for _ in range(3))
    mask = torch.rand(2, 1, 1, 7) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    found = attend(query, key, value, mask=mask, causal=causal)
    assert torch.allclose(found, plain(query, key, value, mask, causal), atol=1e-6)


@pytest.mark.parametrize("name", ["pickscore", "aesthetic-v2", "mps"])  # BLIP's: test_blip_with_fused_attention_is_blip
def test_sdpa_is_what_is_used_and_equals_multiplied_out(name: str, files: dict[str, dict[str, Path]]) -> None:
    network = network_of(name, files)
    assert set_tower_attention(network, "auto") == set_tower_attention(network, "sdpa") == "sdpa"
    with torch.inference_mode():
        found = network(*inputs(name))
        for module in network.modules():
            if hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation("eager")
        expected = network(*inputs(name))
    assert float((found - expected).abs().max()) < 1e-6


def test_head_sizes_of_the_published_networks() -> None:
    from craft_fast.rewards import published
    from craft_fast.rewards.networks.random_weights import empty_network

    expected = {"hpsv2.1": [64, 80], "image-reward": [64], "mps": [64, 80], "aesthetic-v2": [64]}
    for name, sizes in expected.items():
        family = FAMILIES.get(name, "clip")
        assert head_sizes(empty_network(family, published.OFFICIAL[name])) == sizes


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
@pytest.mark.parametrize("name", FAMILIES)
def test_xformers_that_is_not_there_is_an_environment_problem(name: str, files: dict[str, dict[str, Path]]) -> None:
    network = network_of(name, files)
    before = network(*inputs(name))
    with pytest.raises(EnvironmentProblem, match="does not load") as caught:
        set_tower_attention(network, "xformers")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "pip install" in caught.value.hint
    assert torch.equal(network(*inputs(name)), before)
    with pytest.raises(EnvironmentProblem):
        read_network(Preprocessing(family=FAMILIES[name]), files[name], attention="xformers")  # type: ignore[arg-type]


# ---- xformers runs on GPUs alone; what is passed to it is held against its documented contract here.


class LowerTriangularMask:
    """Causal."""


def stand_in(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> list[tuple[int, ...]]:
    """A module in xformers' place: [B, T, H, d] in and out, as its documentation says; shapes of all calls."""
    calls: list[tuple[int, ...]] = []

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
        if "raises" in behaviour:
            raise behaviour["raises"]
        assert query.shape[-2:] == key.shape[-2:] == value.shape[-2:]
        calls.append(tuple(query.shape))
        turned = (part.transpose(1, 2) for part in (query, key, value))
        causal = isinstance(attn_bias, LowerTriangularMask)
        found = F.scaled_dot_product_attention(*turned, is_causal=causal).transpose(1, 2)
        return found * behaviour.get("times", 1.0)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    ops.LowerTriangularMask = LowerTriangularMask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_xformers_gets_its_own_layout_and_gives_the_same_scores(
    name: str, files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(name, files)
    calls = stand_in(monkeypatch)
    with torch.inference_mode():
        expected = network(*inputs(name))
        assert calls == []
        assert set_tower_attention(network, "xformers") == "xformers"
        probes = len(calls)
        assert probes == 2 * len(head_sizes(network))
        if isinstance(network, MpsReward):
            network.set_condition(inputs("mps")[1][0])  # its states were kept
        assert float((network(*inputs(name)) - expected).abs().max()) < 2e-6
        assert len(calls) > probes + 1
        assert {shape[2:] for shape in calls[probes:]} == {(2, 16)}  # heads, head size: of every tower
        assert set_tower_attention(network, "auto") == "sdpa"
        used = len(calls)
        network(*inputs(name))
        assert len(calls) == used


@pytest.mark.parametrize("behaviour", [{"raises": NotImplementedError("no operator")}, {"times": float("nan")}])
def test_xformers_that_fails_its_probe_changes_nothing(
    behaviour: dict[str, Any], files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of("pickscore", files)
    before = network(*inputs("pickscore"))
    stand_in(monkeypatch, **behaviour)
    with pytest.raises(EnvironmentProblem, match=r"does not run on cpu in torch.float32, head size 16") as caught:
        set_tower_attention(network, "xformers")
    assert caught.value.why in ("no operator", "its result is not finite")
    assert torch.equal(network(*inputs("pickscore")), before)


def test_the_probe_runs_in_the_dtype_of_the_towers_not_of_the_head(
    files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Preprocessing(family="aesthetic")
    network = read_network(spec, files["aesthetic-v2"], dtype=torch.bfloat16)
    stand_in(monkeypatch, raises=NotImplementedError("no operator"))
    with pytest.raises(EnvironmentProblem, match="bfloat16"):
        set_tower_attention(network, "xformers")
    assert isinstance(network, nn.Module)
