"""The plain-torch ops against formulas written out, and their gradients against numerical ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from craft_kernels.noise_and_target import noise_and_target
from craft_kernels.weighted_noise_loss import weighted_noise_loss


def arguments(shape: tuple[int, ...] = (3, 4, 5, 7), dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(shape[0], generator=draw, dtype=torch.float64).to(torch.float32)
    return [pred, target, weight]


def test_loss_by_hand() -> None:
    pred = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    target = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 2.0]]]])
    loss, per_sample = weighted_noise_loss(pred, target, torch.tensor([2.0, -1.0]))
    assert per_sample.tolist() == [2.5, 0.5]
    assert float(loss) == (2 * 2.5 - 0.5) / 2


def test_timestep_weight_scales_the_loss_and_not_the_errors() -> None:
    pred, target, weight = arguments()
    table, t = torch.tensor([1.0, 0.25, 3.0, 9.0]), torch.tensor([2, 0, 1])
    loss, errors = weighted_noise_loss(pred, target, weight, timesteps=t, timestep_weight=table)
    expected = (weight.double() * table.double()[t] * errors).sum() / 3
    assert torch.allclose(loss, expected)
    assert torch.equal(errors, weighted_noise_loss(pred, target, weight)[1])


def test_parts_with_the_whole_as_divisor_add_up() -> None:
    pred, target, weight = arguments((8, 4, 3, 3))
    whole, _ = weighted_noise_loss(pred, target, weight)
    parts = [
        weighted_noise_loss(pred[i : i + 3], target[i : i + 3], weight[i : i + 3], divisor=8)[0] for i in (0, 3, 6)
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-12)


def test_gradient() -> None:
    pred, target, weight = arguments((2, 2, 3, 3))
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: weighted_noise_loss(p, target, weight)[0], (pred,))
    loss, errors = weighted_noise_loss(pred, target, weight)
    loss.backward()
    by_hand = 2 * weight.double().view(-1, 1, 1, 1) * (pred - target) / (2 * 18)
    assert torch.allclose(pred.grad, by_hand.detach())
    assert not errors.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    pred, target, weight = arguments((2, 4, 64, 64), dtype)
    loss, errors = weighted_noise_loss(pred, target, weight)
    assert loss.dtype == errors.dtype == torch.float32
    exact = (pred.double() - target.double()).square().flatten(1).mean(1)
    assert torch.allclose(errors.double(), exact, rtol=1e-6)


def test_a_nan_sample_leaves_its_neighbours_alone() -> None:
    pred, target, weight = arguments()
    clean = weighted_noise_loss(pred, target, weight)[1]
    pred[1, 0, 0, 0] = float("nan")
    loss, errors = weighted_noise_loss(pred, target, weight)
    assert errors.isnan().tolist() == [False, True, False]
    assert torch.equal(errors[[0, 2]], clean[[0, 2]])
    assert loss.isnan()


def test_layouts_and_the_empty_batch() -> None:
    pred, target, weight = arguments()
    expected, _ = weighted_noise_loss(pred, target, weight)
    wide = torch.empty(3, 4, 5, 14, dtype=torch.float64)
    wide[..., ::2] = pred
    for other in (pred.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.allclose(weighted_noise_loss(other, target, weight)[0], expected, rtol=1e-12)
    loss, errors = weighted_noise_loss(pred[:0], target[:0], weight[:0])
    assert float(loss) == 0.0
    assert errors.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_pred": torch.zeros(3, 4)}, r"noise_pred .*\(3, 4\)"),
        ({"target": torch.zeros(3, 4, 5, 6)}, r"target .*\(3, 4, 5, 7\).*\(3, 4, 5, 6\)"),
        ({"weight": torch.zeros(2)}, r"weight .*\[3\].*\(2,\)"),
        ({"weight": torch.zeros(3, dtype=torch.int64)}, r"weight .*int64"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, "go together"),
        ({"timesteps": torch.zeros(3), "timestep_weight": torch.ones(9)}, r"timesteps must be int64"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64), "timestep_weight": torch.ones(9, 1)}, "timestep_weight"),
        ({"divisor": 0}, "divisor must be at least 1, got 0"),
        ({"target": torch.zeros(3, 4, 5, 7, device="meta")}, "target must be on cpu like noise_pred, got meta"),
    ],
)
def test_loss_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    pred, target, weight = arguments()
    with pytest.raises(ValueError, match=message):
        weighted_noise_loss(**{"noise_pred": pred, "target": target, "weight": weight, **change})


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
