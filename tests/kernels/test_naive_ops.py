"""The plain-torch ops against formulas written out, and their gradients against numerical ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from craft_kernels.noise_and_target import noise_and_target


def arguments(shape: tuple[int, ...] = (3, 4, 5, 7), dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(shape[0], generator=draw, dtype=torch.float64).to(torch.float32)
    return [pred, target, weight]


def test_noise_and_target_by_hand() -> None:
    schedule = torch.tensor([0.64, 0.36], dtype=torch.float64)
    x_0, noise = torch.full((2, 1, 1, 1), 2.0).double(), torch.full((2, 1, 1, 1), -1.0).double()
    x_t, target = noise_and_target(x_0, noise, schedule, torch.tensor([0, 1]))
    assert x_t.flatten().tolist() == pytest.approx([0.8 * 2 - 0.6, 0.6 * 2 - 0.8])
    assert torch.equal(target, noise)
    _, v = noise_and_target(x_0, noise, schedule, torch.tensor([0, 1]), prediction_type="v_prediction")
    assert v.flatten().tolist() == pytest.approx([-0.8 - 0.6 * 2, -0.6 - 0.8 * 2])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_agree_with_diffusers(prediction_type: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    draw = torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(5, 4, 3, 7, generator=draw) for _ in range(2))
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t, target = noise_and_target(x_0, noise, scheduler.alphas_cumprod, t, prediction_type=prediction_type)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, t)
    assert torch.allclose(x_t, scheduler.add_noise(x_0, noise, t), atol=1e-6)
    assert torch.allclose(target, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4)}, "latents"),
        ({"noise": torch.zeros(2, 1, 1, 1).double()}, "noise must be torch.float32"),
        ({"alphas_cumprod": torch.zeros(2, 2)}, "alphas_cumprod"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, r"timesteps must be int64 \[2\]"),
        ({"prediction_type": "sample"}, "got 'sample'"),
    ],
)
def test_noise_and_target_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {
        "latents": torch.zeros(2, 1, 1, 1),
        "noise": torch.zeros(2, 1, 1, 1),
        "alphas_cumprod": torch.ones(4),
        "timesteps": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        noise_and_target(**{**good, **change})


def test_ops_import_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules);"
        "import craft_kernels.noise_and_target, craft_kernels.weighted_noise_loss;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['craft_kernels']"
