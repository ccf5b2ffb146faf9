"""The choice of the attention kernel: PyTorch's own, or xformers where it was tried."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from craft_fast.errors import EnvironmentProblem, ExitCode
from craft_fast.sdxl.attention import attention_ms, head_sizes, set_attention
from tests.unit.small_unets import forward, prepared, shipped_unet, small_unet

without_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")


def kinds(unet: Any) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


@pytest.mark.parametrize("kind", ["auto", "sdpa"])
def test_sdpa_is_what_auto_means(kind: Any) -> None:
    unet = small_unet()
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        expected = forward(unet)
        assert set_attention(unet, kind) == "sdpa"
        assert kinds(unet) == {AttnProcessor2_0}
        assert torch.allclose(forward(unet), expected, atol=1e-5)


def test_it_works_on_a_unet_with_adapters() -> None:
    for fused in (False, True):
        unet, _ = prepared(small_unet, fused_lora=fused)
        with torch.no_grad():
            expected = forward(unet)
            assert set_attention(unet, "auto") == "sdpa"
            assert torch.equal(forward(unet), expected)


def test_time_of_an_attention_grows_with_its_tokens() -> None:
    few, many = (
        attention_ms("sdpa", device=torch.device("cpu"), dtype=torch.float32, tokens=tokens, heads=2, repeats=3)
        for tokens in (64, 1024)
    )
    assert 0 < few < many


def test_head_sizes_are_those_of_the_unet() -> None:
    assert head_sizes(small_unet()) == [16]
    assert head_sizes(shipped_unet()) == [32]


@without_xformers
def test_absent_xformers_is_refused_with_its_command() -> None:
    unet = small_unet()
    before = kinds(unet)
    with pytest.raises(EnvironmentProblem) as caught:
        set_attention(unet, "xformers")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert caught.value.where == "engine.attention: xformers"
    assert "No module named 'xformers'" in caught.value.why
    assert "pip install" in caught.value.hint
    assert "engine.attention: sdpa" in caught.value.hint
    assert kinds(unet) == before


@pytest.mark.parametrize(
    "body", ["raise OSError('undefined symbol: x')", "def memory_efficient_attention(q, k, v): 1/0"]
)
def test_a_broken_xformers_is_refused_with_its_reason(body: str, tmp_path: Any, monkeypatch: Any) -> None:
    """A package of that name which does not load, or does not run: what a build for another torch looks like."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").write_text("")
    (tmp_path / "xformers/ops.py").write_text(body)
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(EnvironmentProblem) as caught:
            set_attention(small_unet(), "xformers")
    finally:
        for name in ("xformers", "xformers.ops"):
            sys.modules.pop(name, None)
    assert caught.value.why in ("undefined symbol: x", "division by zero")
    assert kinds(small_unet()) == {AttnProcessor2_0}


@without_xformers
def test_no_other_setting_asks_for_it() -> None:
    for kind in ("auto", "sdpa"):
        set_attention(small_unet(), kind)  # type: ignore[arg-type]
    assert "xformers" not in sys.modules
