"""Which form of an op runs where, and what is said when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from craft_kernels import dispatch, probe
from craft_kernels.dispatch import choose

HERE = torch.zeros(1)
ON_A_GPU: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
ON_META = torch.zeros(1, device="meta")


@pytest.fixture(autouse=True)
def _nothing_tried_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_works", {})


def test_auto_is_plain_torch_off_a_gpu() -> None:
    assert choose("auto", HERE) == choose("auto", ON_META) == "torch"


def test_auto_tries_triton_on_a_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(probe, "add_one", tried.append)
    assert [choose("auto", ON_A_GPU) for _ in range(3)] == ["triton"] * 3
    assert tried == [torch.device("cuda", 0)]
    assert choose("auto", ON_A_GPU, auto="torch") == "torch"


def test_where_triton_fails_auto_is_plain_torch_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(probe, "add_one", fail)
    with pytest.warns(RuntimeWarning, match="does not work on cuda:0.*: Failed to find C compiler.$"):
        assert choose("auto", ON_A_GPU) == "torch"
    assert choose("auto", ON_A_GPU) == "torch"


def test_without_triton_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert choose("auto", ON_A_GPU) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        choose("triton", HERE)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", HERE) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"impl='triton' needs triton and a CUDA tensor .* got a tensor on cpu"):
        choose("triton", HERE)


def test_the_environment_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "compile")
    assert choose("auto", HERE) == choose("torch", HERE) == "compile"
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "fast")
    with pytest.raises(ValueError, match="CRAFT_KERNELS_IMPL must be one of auto, triton, compile, torch, got 'fast'"):
        choose("auto", HERE)
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "triton")
    with pytest.raises(ValueError, match="CRAFT_KERNELS_IMPL='triton' needs"):
        choose("auto", ON_META)


def test_a_form_is_compiled_once() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert dispatch.compiled(double) is dispatch.compiled(double)


def test_the_probe_runs_a_kernel(device: torch.device) -> None:
    probe.add_one(device)
    assert dispatch.triton_works(device)


def test_a_wrong_result_does_not_pass_for_working(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.raises(RuntimeError, match="wrong result"):
        probe.add_one(device)


def test_poisoned_memory_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.empty(3).isnan().all()
    monkeypatch.undo()
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
