"""GEGLU, every form of it: against numbers worked out by hand, diffusers, float64, and itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.geglu import geglu
from craft_kernels.geglu.naive import geglu as naive

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
SHAPES = [(2,), (1, 2), (5, 6), (63, 126), (2, 3, 77, 20), (7, 246), (2, 4000), (2050, 2), (3, 1, 2560)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.geglu import kernel

    def both(x: Tensor) -> None:
        kernel.backward(kernel.forward(x), x)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        # 1,280 wide, 1,024 tokens, D = 5,120 compiles to the same code: its numbers are multiples of 16 as well.
        x = torch.zeros(1, 4096, 2 * 2560, dtype=dtype)
        yield f"{dtype} sdxl", lambda x=x: both(x)
    yield "odd", lambda: both(torch.zeros(3, 154, dtype=torch.bfloat16))


def arguments(
    shape: tuple[int, ...] = (3, 5, 14), dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient, reaching into both tails of gelu, and the gradient of the result."""
    draw = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(shape, generator=draw, dtype=torch.float64)
    grad_y = torch.randn((*shape[:-1], shape[-1] // 2), generator=draw, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(), grad_y.to(device, dtype)


def run(x: Tensor, grad_y: Tensor, form: str) -> tuple[Tensor, Tensor]:
    y = geglu(x, impl=form)  # type: ignore[arg-type]
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    return y.detach(), grad_x


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form: str) -> None:
    x = torch.tensor([[2.0, 3.0, 5.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y, grad_x = run(x, torch.ones(1, 3, dtype=torch.float64), form)
    one = (1 + math.erf(math.sqrt(0.5))) / 2  # the normal distribution function at 1
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert y[0].tolist() == pytest.approx([2 * one, 0, -5 * (1 - one)], rel=1e-14)
    grad_gate = [2 * (one + density), 3 * 0.5, 5 * (1 - one - density)]
    assert grad_x[0].tolist() == pytest.approx([one, 0, one - 1, *grad_gate], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_what_diffusers_does(dtype: torch.dtype) -> None:
    from diffusers.models.activations import GEGLU

    torch.manual_seed(0)
    layer = GEGLU(12, 20).to(dtype)
    hidden = torch.randn(3, 7, 12).to(dtype)
    expected = layer(hidden)
    assert torch.equal(geglu(layer.proj(hidden)), expected)
    assert torch.equal(geglu(layer.proj(hidden), impl="torch"), expected)
    if dtype != torch.bfloat16:  # not in the interpreter
        found = geglu(layer.proj(hidden), impl="triton")
        eps = torch.finfo(dtype).eps
        assert torch.allclose(found, expected, rtol=4 * eps, atol=eps / 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_agrees_with_float64(where: Where, shape: tuple[int, ...], as_good_as_eager: Any) -> None:
    device, dtype = where
    x, grad_y = arguments(shape, dtype, device)
    exact_x = x.detach().double().requires_grad_()
    exact_y = naive(exact_x)
    (exact_grad,) = torch.autograd.grad(exact_y, exact_x, grad_y.double())
    eager_y, eager_grad = run(x, grad_y, "torch")
    y, grad_x = run(x, grad_y, "triton")
    as_good_as_eager(y, eager_y, exact_y.detach())
    half = shape[-1] // 2
    for part in (slice(None, half), slice(half, None)):  # hidden, gate
        as_good_as_eager(grad_x[..., part], eager_grad[..., part], exact_grad[..., part])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form: str, device: torch.device) -> None:
    x, _ = arguments((2, 3, 10), device=device)
    assert torch.autograd.gradcheck(lambda x: geglu(x, impl=form), (x,))  # type: ignore[arg-type]


def test_the_tails_of_gelu(device: torch.device) -> None:
    gates = [-1e4, -300.0, -40.0, -12.0, -5.0, -0.0, 0.0, 5.0, 12.0, 300.0, 1e4]
    x = torch.tensor([[-1.5] * len(gates) + gates], device=device, requires_grad=True)
    expected = run(x, torch.ones(1, len(gates), device=device), "torch")
    for found, want in zip(run(x, torch.ones(1, len(gates), device=device), "triton"), expected, strict=True):
        assert torch.allclose(found, want, rtol=1e-5, atol=2e-6)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, device: torch.device) -> None:
    x, grad_y = arguments(device=device)
    expected, expected_grad = run(x, grad_y, form)
    wide, sparse = (torch.zeros(3, 5, size, dtype=torch.float64, device=device) for size in (20, 28))
    wide[..., 3:17] = x.detach()
    sparse[..., ::2] = x.detach()
    spread = torch.zeros(3, 5, 14, device=device, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    spread.copy_(x.detach())
    expanded = torch.ones((), dtype=torch.float64, device=device).expand(3, 5, 7)
    _, expanded_grad = run(x, expanded, "torch")
    for layout in (wide[..., 3:17], sparse[..., ::2], spread):
        other = layout.detach().requires_grad_()
        found, grad = run(other, grad_y.transpose(0, 1).contiguous().transpose(0, 1), form)
        assert torch.allclose(found, expected, rtol=1e-12)
        assert torch.allclose(grad, expected_grad, rtol=1e-12)
        assert torch.allclose(run(other, expanded, form)[1], expanded_grad, rtol=1e-12)


def test_the_result_is_contiguous(device: torch.device) -> None:
    x, grad_y = arguments((4, 5, 14), torch.float32, device)
    turned = x.detach().transpose(0, 1).requires_grad_()
    y, grad_x = run(turned, grad_y.transpose(0, 1), "triton")
    assert y.is_contiguous()
    assert grad_x.is_contiguous()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_the_empty_batch(form: str, shape: tuple[int, ...], device: torch.device) -> None:
    x, grad_y = arguments(shape, torch.float32, device)
    y, grad_x = run(x, grad_y, form)
    assert y.shape == (*shape[:-1], 3)
    assert grad_x.shape == shape


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter: inf * 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_sample_leaves_its_neighbours_alone(form: str, bad: float, device: torch.device) -> None:
    x, grad_y = arguments((3, 7, 10), torch.float32, device)
    clean = run(x, grad_y, form)
    spoilt = x.detach().clone()
    spoilt[1, 2, 7] = bad
    found = run(spoilt.requires_grad_(), grad_y, form)
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not bool(found[0][1, 2, 2].isfinite())


def test_repeats_are_equal_to_the_bit_and_do_not_depend_on_the_batch(where: Where) -> None:
    device, dtype = where
    x, grad_y = arguments((5, 9, 1030), dtype, device)
    first = run(x, grad_y, "triton")
    for _ in range(100 if device.type == "cuda" else 3):
        for one, other in zip(run(x, grad_y, "triton"), first, strict=True):
            assert torch.equal(one, other)
    alone = run(x.detach()[3:4].requires_grad_(), grad_y[3:4], "triton")
    for one, other in zip(alone, first, strict=True):
        assert torch.equal(one, other[3:4])


def test_only_the_input_is_kept_for_backward(device: torch.device) -> None:
    x, _ = arguments((4, 64), torch.float32, device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        geglu(x, impl="triton")
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = arguments((2, 8), torch.float16)
    expected = {form: geglu(x, impl=form) for form in FORMS}  # type: ignore[arg-type]
    calls: list[str] = []
    from craft_kernels.geglu import kernel

    launch = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda x: calls.append("triton") or launch(x))
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "triton")
    assert torch.equal(geglu(x, impl="torch"), expected["triton"])
    assert calls == ["triton"]
    monkeypatch.setenv("CRAFT_KERNELS_IMPL", "torch")
    assert torch.equal(geglu(x, impl="triton"), expected["torch"])
    assert calls == ["triton"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize("form", ["triton", "compile"])
def test_torch_compile_sees_one_graph(form: str, device: torch.device) -> None:
    torch._dynamo.reset()
    x, grad_y = arguments(dtype=torch.float32, device=device)

    def step(x: Tensor) -> Tensor:
        return geglu(x * 2.0, impl=form) * 3.0  # type: ignore[arg-type]

    expected = step(x)
    found = torch.compile(step, fullgraph=True)(x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y, x, grad_y)[0] for y in (found, expected)]
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_the_registration_is_sound(grad: bool, device: torch.device) -> None:
    x, grad_y = arguments((2, 3, 10), torch.float32, device)
    geglu(x)
    torch.library.opcheck(torch.ops.craft_kernels.geglu.default, (x.detach().requires_grad_(grad),))
    torch.library.opcheck(torch.ops.craft_kernels.geglu_backward.default, (grad_y, x.detach()))
    turned = x.detach().transpose(0, 1).requires_grad_(grad)
    torch.library.opcheck(torch.ops.craft_kernels.geglu.default, (turned,))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("4 GiB of float16 and more: for a GPU")
    x = torch.zeros(420_000, 5120, dtype=torch.float16, device=device)  # 2.15e9 elements
    x[-1, -1], x[-1, 2559] = 1.0, 2.0
    x.requires_grad_()
    y = geglu(x, impl="triton")
    one = (1 + math.erf(math.sqrt(0.5))) / 2
    assert float(y[-1, -1]) == pytest.approx(2 * one, rel=1e-3)
    assert int(y.count_nonzero()) == 1
    grad_y = torch.zeros_like(y)
    grad_y[-1, -1] = 1.0
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert float(grad_x[-1, 2559]) == pytest.approx(one, rel=1e-3)
    assert float(grad_x[-1, -1]) == pytest.approx(2 * (one + density), rel=1e-3)
    assert int(grad_x.count_nonzero()) == 2


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    x, grad_y = arguments((2, 77, 1280), torch.bfloat16, device)
    run(x, grad_y, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, grad_y, "triton")
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, run(x, grad_y, "triton"), strict=True):
        assert torch.equal(found, expected)


def test_compiled_for_gpus_it_reads_and_writes_16_bytes_at_a_time(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel"}
    assert not [row for row in rows if row["spilled_bytes"]]
    for row in rows:
        if "sdxl" in row["name"]:
            moves = {op for op in row["ops"] if op.startswith(("LDG", "STG"))}
            assert moves == {"LDG.E.128", "STG.E.128"}, row
            # Two blocks of 128 threads on each of an SM's four schedulers, at least, to hide the memory's latency.
            assert row["registers"] <= 128, row


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (torch.zeros(3, 5), {}, r"x must be floating point \[\.\.\., 2D\] with D >= 1, got float32 \(3, 5\)"),
        (torch.zeros(3, 0), {}, r"x must be .*got float32 \(3, 0\)"),
        (torch.zeros(()), {}, r"x must be .*got float32 \(\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, r"x must be floating point .*got int64 \(3, 4\)"),
        (torch.zeros(3, 4), {"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
        (torch.zeros(3, 4, device="meta"), {"impl": "triton"}, "impl='triton' needs triton and a CUDA tensor"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geglu(x, **change)
