"""Training on a GPU: near the CPU's losses in every dtype, bit-identical on resume, and a real shortage of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.cache import CachedSet
from craft_fast.config import TrainSettings
from craft_fast.sdxl.load import free_memory, load_sdxl
from craft_fast.store.run import open_run
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.train import TrainResult, train

pytestmark = pytest.mark.gpu

Train = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def training_set(side: int = 16) -> CachedSet:
    draw = torch.Generator().manual_seed(3)
    return CachedSet(
        latents=torch.randn(6, 4, side, side, generator=draw),
        prompt_embeds=torch.randn(4, 32, 64, generator=draw),
        pooled_prompt_embeds=torch.randn(4, 32, generator=draw),
        prompt_index=torch.tensor([0, 1, 2, 0, 1, 2]),
        empty_index=3,
        weights=torch.rand(6, generator=draw) + 0.5,
        sample_ids=tuple(f"sample-{i}" for i in range(6)),
    )


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Train:
    def run_training(
        name: str,
        *,
        device: str = "cuda",
        dtype: str = "bfloat16",
        stop_at: int = 10**6,
        side: int = 16,
        **options: Any,
    ) -> TrainResult:
        model = load_sdxl(folder, device=device, dtype=dtype)
        settings = {
            "rank": 16,
            "target_modules": ["to_q", "ff.net.0.proj"],
            "steps": 6,
            "micro_batch_size": 4,
            **options,
        }
        asked = iter(range(10**6))
        with open_run(tmp_path / name, create=True) as run:
            return train(
                run, model, training_set(side), settings=TrainSettings(**settings), seed=11, key="5" * 64,
                should_stop=lambda: next(asked) >= stop_at,
            )  # fmt: skip

    return run_training


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_losses_are_near_those_of_the_cpu(trained: Train, method: str, dtype: str, tolerance: float) -> None:
    if method == "full" and dtype == "float16":
        pytest.skip("whole float16 weights underflow in AdamW; bfloat16 is for that")
    expected = trained("cpu", device="cpu", dtype="float32", method=method)
    found = trained("gpu", dtype=dtype, method=method)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert all(bool(value.isfinite().all()) for value in found.adapter.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernels_train_like_plain_torch(trained: Train, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    results = []
    for form in ("torch", "triton"):
        monkeypatch.setenv("CRAFT_KERNELS_IMPL", form)
        results.append(trained(form, dtype=dtype))
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5 if dtype == "float32" else 5e-3)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_stopped_run_ends_like_an_unbroken_one(trained: Train, method: str) -> None:
    expected = trained("whole", method=method)
    assert not trained("stopped", method=method, stop_at=4).finished
    result = trained("stopped", method=method)
    assert result.losses == expected.losses
    assert all(torch.equal(result.adapter[name], expected.adapter[name]) for name in expected.adapter)


def test_gradient_checkpointing_needs_less_memory(trained: Train) -> None:
    peaks = []
    for on in (False, True):
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        trained(f"checkpointing-{on}", steps=2, side=64, micro_batch_size=16, gradient_checkpointing=on)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]


def test_a_real_shortage_of_memory_halves_the_micro_batch(trained: Train) -> None:
    """Half of what the whole batch needs: the same losses come out in smaller pieces."""
    settings: dict[str, Any] = {"steps": 2, "side": 64, "micro_batch_size": 32, "dtype": "float32"}
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    expected = trained("roomy", **settings)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    free_memory()
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
        found = trained("narrow", **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()
    assert found.micro_batch_size < 32
    assert found.finished
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
