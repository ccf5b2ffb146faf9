"""The weighted noise-prediction loss, every form of it: against formulas written out, float64, and itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.weighted_noise_loss import weighted_noise_loss
from craft_kernels.weighted_noise_loss.naive import weighted_noise_loss as naive

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
SHAPES = [(1, 1, 1, 1), (3, 4, 9, 7), (2, 1, 1, 63), (1, 7, 11, 1), (3, 1, 41, 3), (2, 5, 20, 20), (5, 4, 32, 32)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.weighted_noise_loss import kernel

    weight, timesteps, table = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.ones(1000)

    def both(pred: Tensor, target: Tensor) -> None:
        loss, _, error, scale = kernel.forward(pred, target, weight, timesteps, table, 2, True)
        kernel.backward(error, scale, loss)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        sdxl = torch.zeros(2, 4, 128, 128, dtype=dtype)
        yield f"{dtype} sdxl", lambda sdxl=sdxl: both(sdxl, sdxl)
    odd = torch.zeros(2, 3, 7, 11, dtype=torch.bfloat16)
    yield "odd", lambda: both(odd, odd.float())
    yield "no grad", lambda: kernel.forward(odd, odd, weight, None, None, 1, False)


def arguments(
    shape: tuple[int, ...] = (3, 4, 5, 7), dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Random, weights of both signs with a zero among them, min-SNR-like weights by timestep."""
    draw = torch.Generator().manual_seed(sum(shape))
    pred, target = (torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype) for _ in range(2))
    weight = torch.randn(shape[0], generator=draw).to(device)
    weight[1::3] = 0
    return {
        "noise_pred": pred.requires_grad_(),
        "target": target,
        "weight": weight,
        "timesteps": torch.randint(10, (shape[0],), generator=draw).to(device),
        "timestep_weight": torch.rand(10, generator=draw).to(device),
    }


def gradient(loss: Tensor, pred: Tensor, scale: float = 1.0) -> Tensor:
    (found,) = torch.autograd.grad(loss * scale, pred)
    return found


def test_by_hand() -> None:
    pred = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    target = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 2.0]]]])
    for form in FORMS:
        loss, per_sample = weighted_noise_loss(pred, target, torch.tensor([2.0, -1.0]), impl=form)
        assert per_sample.tolist() == [2.5, 0.5]
        assert float(loss) == (2 * 2.5 - 0.5) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_agrees_with_float64(where: Where, shape: tuple[int, ...], as_good_as_eager: Any) -> None:
    device, dtype = where
    given = arguments(shape, dtype, device)
    exact_given = {k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}
    exact_given["noise_pred"].requires_grad_()
    exact_loss, exact_errors = naive(**exact_given)
    exact_grad = gradient(exact_loss, exact_given["noise_pred"], 3.0)
    eager_loss, eager_errors = naive(**given)
    loss, errors = weighted_noise_loss(**given, impl="triton")
    assert loss.shape == ()
    assert not errors.requires_grad
    as_good_as_eager(errors, eager_errors, exact_errors)
    # A sum of both signs: what counts is the rounding of its terms, not of what is left of them.
    terms = float((exact_given["weight"].abs() * exact_errors).sum())
    assert abs(float(loss.detach().double() - exact_loss.detach())) <= 1e-6 * terms
    grad = gradient(loss, given["noise_pred"], 3.0)
    as_good_as_eager(grad, gradient(eager_loss, given["noise_pred"], 3.0), exact_grad)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form: str, device: torch.device) -> None:
    given = arguments((2, 2, 3, 5), device=device)
    others = {name: value for name, value in given.items() if name != "noise_pred"}
    assert torch.autograd.gradcheck(
        lambda pred: weighted_noise_loss(pred, **others, impl=form)[0], (given["noise_pred"],)
    )


@pytest.mark.parametrize("form", FORMS)
def test_timestep_weight_scales_the_loss_and_not_the_errors(form: str, device: torch.device) -> None:
    given = arguments(device=device)
    loss, errors = weighted_noise_loss(**given, impl=form)
    factor = given["weight"].double() * given["timestep_weight"].double()[given["timesteps"]]
    assert torch.allclose(loss, (factor * errors).sum() / 3)
    plain = weighted_noise_loss(given["noise_pred"], given["target"], given["weight"], impl=form)
    assert torch.equal(errors, plain[1])


@pytest.mark.parametrize("form", FORMS)
def test_parts_with_the_whole_as_divisor_add_up(form: str, device: torch.device) -> None:
    given = arguments((8, 4, 3, 3), device=device)
    whole, _ = weighted_noise_loss(**given, impl=form)
    parts = []
    for i in (0, 3, 6):
        part = {k: v if k == "timestep_weight" else v[i : i + 3] for k, v in given.items()}
        parts.append(weighted_noise_loss(**part, divisor=8, impl=form)[0])
    assert torch.allclose(sum(parts), whole, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_layouts_and_the_empty_batch(form: str, device: torch.device) -> None:
    given = arguments(device=device)
    expected, errors = weighted_noise_loss(**given, impl=form)
    expected_grad = gradient(expected, given["noise_pred"])
    pred, target = given["noise_pred"].detach(), given["target"]
    wide = torch.zeros(3, 4, 5, 14, dtype=torch.float64, device=device)
    wide[..., ::2] = pred
    for layout in (pred.contiguous(memory_format=torch.channels_last), wide[..., ::2], pred.mT.contiguous().mT):
        for aim in (target, target.contiguous(memory_format=torch.channels_last)):
            other = layout.detach().requires_grad_()
            loss, found = weighted_noise_loss(**{**given, "noise_pred": other, "target": aim}, impl=form)
            assert torch.allclose(loss, expected, rtol=1e-12)
            assert torch.allclose(found, errors, rtol=1e-12)
            assert torch.allclose(gradient(loss, other), expected_grad, rtol=1e-12)
    empty = {k: v if k == "timestep_weight" else v[:0] for k, v in given.items()}
    loss, found = weighted_noise_loss(**empty, impl=form)
    assert loss.item() == 0.0
    assert found.shape == (0,)


def test_channels_last_keeps_its_layout_in_backward(device: torch.device) -> None:
    given = arguments((2, 4, 6, 6), torch.float32, device)
    pred = given["noise_pred"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss, _ = weighted_noise_loss(pred, given["target"], given["weight"], impl="triton")
    assert gradient(loss, pred).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_sample_leaves_its_neighbours_alone(form: str, device: torch.device) -> None:
    given = arguments((3, 4, 40, 40), torch.float32, device)
    clean = weighted_noise_loss(**given, impl=form)[1]
    pred = given["noise_pred"].detach().clone()
    pred[1, 0, 0, 0] = float("nan")
    loss, errors = weighted_noise_loss(**{**given, "noise_pred": pred.requires_grad_()}, impl=form)
    assert errors.isnan().tolist() == [False, True, False]
    assert torch.equal(errors[[0, 2]], clean[[0, 2]])
    assert loss.isnan()
    grad = gradient(loss, pred)
    assert bool(grad[[0, 2]].isfinite().all())
    assert bool(grad[1, 0, 0, 0].isnan())


def test_a_timestep_outside_of_the_table_gives_nan(device: torch.device) -> None:
    given = arguments(dtype=torch.float32, device=device)
    for bad in (-1, 10):
        given["timesteps"][1] = bad
        given["weight"][1] = 1.0
        assert weighted_noise_loss(**given, impl="triton")[0].isnan()


def test_repeats_are_equal_to_the_bit_and_do_not_depend_on_the_batch(where: Where) -> None:
    device, dtype = where
    given = arguments((5, 4, 33, 35), dtype, device)
    loss, errors = weighted_noise_loss(**given, impl="triton")
    grad = gradient(loss, given["noise_pred"])
    for _ in range(100 if device.type == "cuda" else 5):
        again, same = weighted_noise_loss(**given, impl="triton")
        assert torch.equal(again, loss)
        assert torch.equal(same, errors)
        assert torch.equal(gradient(again, given["noise_pred"]), grad)
    alone = {k: v if k == "timestep_weight" else v[3:4] for k, v in given.items()}
    assert torch.equal(weighted_noise_loss(**alone, impl="triton")[1], errors[3:4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    given = arguments((2, 4, 64, 64), dtype)
    loss, errors = weighted_noise_loss(**given, impl="torch")
    assert loss.dtype == errors.dtype == torch.float32
    exact = (given["noise_pred"].double() - given["target"].double()).square().flatten(1).mean(1)
    assert torch.allclose(errors.double(), exact, rtol=1e-6)


def test_small_gradients_survive_float16(device: torch.device) -> None:
    """At SDXL's size a gradient is near 1e-6, below float16's range until the loss scale lifts it."""
    given = arguments((4, 4, 128, 128), torch.float16, device)
    given["target"] = (given["noise_pred"] * 0.999).detach()
    scale = 1024.0
    grads = [gradient(weighted_noise_loss(**given, impl=form)[0], given["noise_pred"], scale) for form in FORMS]
    exact_given = {k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}
    exact_given["noise_pred"].requires_grad_()
    exact = gradient(naive(**exact_given)[0], exact_given["noise_pred"], scale)
    wrong = [float((grad.double() - exact).norm() / exact.norm()) for grad in grads]
    assert wrong[1] <= 2 * wrong[0] + 2**-12


def test_without_gradients_no_error_is_kept(device: torch.device) -> None:
    given = arguments(dtype=torch.float32, device=device)
    expected, errors = weighted_noise_loss(**given, impl="torch")
    with torch.no_grad():
        loss, found = weighted_noise_loss(**given, impl="triton")
    assert not loss.requires_grad
    assert torch.allclose(loss, expected)
    assert torch.allclose(found, errors)


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    given = arguments(dtype=torch.float32, device=device)
    loss, _ = weighted_noise_loss(**given, impl="triton")
    (grad,) = torch.autograd.grad(loss * loss, given["noise_pred"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize("form", ["triton", "compile", "auto"])
def test_torch_compile_sees_one_graph(form: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given = arguments(dtype=torch.float32, device=device)
    others = {name: value for name, value in given.items() if name != "noise_pred"}

    def step(pred: Tensor) -> Tensor:
        loss, errors = weighted_noise_loss(pred * 2.0, **others, impl=form)
        return loss * 3.0 + errors.sum()

    expected = step(given["noise_pred"])
    found = torch.compile(step, fullgraph=True)(given["noise_pred"])
    assert torch.allclose(found, expected, rtol=1e-5)
    grads = [gradient(value, given["noise_pred"]) for value in (found, expected)]
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("grad", [True, False])
def test_the_registration_is_sound(grad: bool, device: torch.device) -> None:
    from craft_kernels.weighted_noise_loss import op

    assert op.weighted_noise_loss is weighted_noise_loss
    given = arguments((2, 3, 4, 5), torch.float32, device)
    pred = given["noise_pred"].detach().requires_grad_(grad)
    rest = [given[name] for name in ("target", "weight", "timesteps", "timestep_weight")]
    torch.library.opcheck(torch.ops.craft_kernels.weighted_noise_loss.default, (pred, *rest, 2, grad))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("4 GiB of float16 and more: for a GPU")
    pred = torch.zeros(2, 4, 16384, 16640, dtype=torch.float16, device=device)  # 2.18e9 elements
    target = torch.zeros_like(pred)
    pred[1, 3, -1, -1] = 2.0
    pred.requires_grad_()
    loss, errors = weighted_noise_loss(pred, target, torch.ones(2, device=device), impl="triton")
    assert errors.tolist() == [0.0, pytest.approx(4.0 / pred[0].numel())]
    grad = gradient(loss, pred, float(pred[0].numel()))
    assert float(grad[1, 3, -1, -1]) == pytest.approx(2.0, rel=1e-3)
    assert int(grad.count_nonzero()) == 1


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    given = arguments((4, 4, 64, 64), torch.bfloat16, device)
    pred = given["noise_pred"]

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss, errors = weighted_noise_loss(**given, impl="triton")
        return loss, errors, gradient(loss, pred)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        pred.copy_(torch.randn_like(pred))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_compiled_for_gpus_it_reads_and_writes_16_bytes_at_a_time(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert {row["kernel"] for row in rows} == {"_error_kernel", "_finish_kernel", "_scale_kernel"}
    assert not [row for row in rows if row["spilled_bytes"]]
    for row in rows:
        if row["kernel"] != "_finish_kernel" and "sdxl" in row["name"]:
            loads = {op: n for op, n in row["ops"].items() if op.startswith("LDG")}
            scalars = 2 if row["kernel"] == "_scale_kernel" else 0
            assert loads["LDG.E.128"] + scalars >= sum(loads.values()), row
            assert "STG.E.128" in row["ops"], row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_pred": torch.zeros(3, 4)}, r"noise_pred must be floating point \[B, C, H, W\], got float32 \(3, 4\)"),
        ({"noise_pred": torch.zeros(3, 4, 5, 7, dtype=torch.int64)}, r"noise_pred must be floating point .* int64"),
        ({"target": torch.zeros(3, 4, 5, 6)}, r"target .*\[3, 4, 5, 7\].*\(3, 4, 5, 6\)"),
        ({"weight": torch.zeros(2)}, r"weight .*\[3\].*\(2,\)"),
        ({"weight": torch.zeros(3, dtype=torch.int64)}, r"weight .*int64"),
        ({"timesteps": None}, "go together"),
        ({"timesteps": torch.zeros(3)}, r"timesteps must be int64 \[3\], got float32"),
        ({"timestep_weight": torch.ones(9, 1)}, r"timestep_weight .*\[T\].*\(9, 1\)"),
        ({"divisor": 0}, "divisor must be at least 1, got 0"),
        ({"target": torch.zeros(3, 4, 5, 7, device="meta")}, "target must be on cpu like noise_pred, got meta"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_noise_loss(**{**arguments(), **change})
