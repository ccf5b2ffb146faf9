"""What the tests of every op share: devices, poisoned memory, the tolerance rule, and code compiled for absent GPUs."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# On a CPU the kernels run in Triton's interpreter, where bfloat16 arithmetic is not to be trusted (triton #11584).
CPU = [(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float16)]
CUDA = [(torch.device("cuda"), dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``device`` is CPU and GPU; ``where`` is (device, dtype), with the dtypes that can be trusted there."""
    gpu = [pytest.mark.gpu]
    if "device" in metafunc.fixturenames:
        values = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=gpu)]
        metafunc.parametrize("device", values)
    if "where" in metafunc.fixturenames:
        named = [(pair, f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}") for pair in CPU + CUDA]
        values = [pytest.param(p, id=name, marks=gpu if p[0].type == "cuda" else []) for p, name in named]
        metafunc.parametrize("where", values)


@pytest.fixture(scope="session")
def _torch_knows_its_functions() -> None:
    """Fill the tables in which torch keeps its own functions for good, before one of them is replaced for a test.

    ``with torch.device(...)`` would not know the true ``torch.empty`` in any later test (a model that loads on the meta
    device draws its weights then), nor would Dynamo.
    """
    with torch.device("cpu"):
        torch.empty(0)
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def _poisoned_memory(_torch_knows_its_functions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, and fresh integers 127: what a kernel forgets to write shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            if fresh.device.type != "meta" and type(fresh) is Tensor:
                fresh.detach().fill_(float("nan") if fresh.is_floating_point() else 127)
            return fresh

        return poison

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def norm_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|`` in float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.fixture
def as_good_as_eager() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The tolerance rule: a kernel may be at most twice as far from float64 as eager PyTorch at the same dtype.

    What is added lets a handful of elements off, for which eager may round luckily.
    """

    def check(found: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert found.shape == exact.shape
        assert found.dtype == eager.dtype
        assert bool(found.isfinite().all())
        allowed = 2 * norm_error(eager, exact) + max(torch.finfo(torch.float32).eps, torch.finfo(found.dtype).eps / 4)
        assert norm_error(found, exact) <= allowed, (norm_error(found, exact), allowed)

    return check


@pytest.fixture(scope="session")
def gpu_code() -> Callable[[str], list[dict[str, Any]]]:
    """``gpu_code(__file__)``: what the module's ``launches()`` compile to, for GPUs that need not be here."""
    pytest.importorskip("triton")

    @functools.cache
    def compile_for_gpus(module: str) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("gpu_code.py")
        done = subprocess.run([sys.executable, script, module], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_for_gpus
