"""The doctor on a machine with a GPU: everything that computes there is made to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craft_fast.doctor import examine
from craft_fast.settings_io import load_settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_gpu_is_found_and_computes(tmp_path: Path) -> None:
    found = {one.check: one for one in examine(load_settings("tiny", None, ["model.device=cuda"]), tmp_path)}
    assert {name: one.found for name, one in found.items() if one.result == "fail"} == {}
    major, minor = torch.cuda.get_device_capability()
    assert f"compute capability {major}.{minor}" in found["gpu"].found
    assert torch.cuda.get_device_name() in found["gpu"].found
    assert "GiB free" in found["gpu memory"].found
    assert "threads" not in found
    dtype = "bfloat16" if major >= 8 else "float32"
    assert f"{dtype} on cuda:0: right" in found["arithmetic"].found
    assert "NF4 works on cuda:0" in found["bitsandbytes"].found
    if major >= 7:
        assert "a kernel was compiled and ran" in found["triton"].found, found["triton"]


@pytest.mark.parametrize(("cap", "result", "said"), [(4096.0, "fail", "larger than"), (0.01, "ok", "GiB free")])
def test_the_cap_is_compared_with_the_card(cap: float, result: str, said: str, tmp_path: Path) -> None:
    found = {one.check: one for one in examine(load_settings("tiny", None, [f"engine.vram_gib={cap}"]), tmp_path)}
    assert found["gpu memory"].result == result
    assert said in found["gpu memory"].found
