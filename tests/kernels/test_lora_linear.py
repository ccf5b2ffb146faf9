"""A frozen linear layer with a low-rank update: against float64, ``torch.nn.functional.linear``, and itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.lora_linear import lora_linear
from craft_kernels.lora_linear.naive import lora_linear as naive
from craft_kernels.nf4_dequantize import NF4Weight

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
LEARNT = ("x", "lora_a", "lora_b")
# Leading sizes of x, in, out, rank: one of everything, odd ones, SDXL's context, more rows than programs.
SHAPES = [
    ((1,), 1, 1, 1), ((), 63, 77, 3), ((3, 5), 77, 123, 17), ((2, 77), 128, 64, 16), ((123,), 63, 200, 64),
    ((2000,), 24, 20, 4),
]  # fmt: skip


def arguments(
    lead: tuple[int, ...] = (3, 5), inner: int = 12, out: int = 7, rank: int = 4,
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", adapter: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Random; the adapter in the dtype of x unless another is named, B not zero."""
    draw = torch.Generator().manual_seed(inner + out + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return {
        "x": normal(*lead, inner).to(device, dtype).requires_grad_(),
        "weight": (normal(out, inner) / inner**0.5).to(device, dtype),
        "lora_a": (normal(rank, inner) / inner**0.5).to(device, adapter or dtype).requires_grad_(),
        "lora_b": normal(out, rank).to(device, adapter or dtype).requires_grad_(),
        "bias": normal(out).to(device, dtype),
        "scaling": 0.75,
    }


def with_gradients(run: Callable[..., Tensor], given: dict[str, Any], grad: Tensor | None = None) -> list[Tensor]:
    """The output, and what its product with ``grad`` (cosines) sends back to x, A and B."""
    out = run(**given)
    if grad is None:
        grad = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape)
    learnt = [given[name] for name in LEARNT]
    return [out.detach(), *torch.autograd.grad(out, learnt, grad.to(out.device, out.dtype))]


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    wide = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in given.items()}
    for name in LEARNT:
        wide[name].requires_grad_()
    return wide


def nf4(out: int, inner: int, device: torch.device | str = "cpu", nested: bool = True) -> tuple[NF4Weight, Any]:
    """The weight of a bitsandbytes layer, and the layer."""
    import bitsandbytes as bnb

    torch.manual_seed(out + inner)
    layer = bnb.nn.Linear4bit(
        inner, out, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested, bias=True
    ).to(device)
    return NF4Weight.from_bitsandbytes(layer.weight, layer.weight.quant_state), layer.requires_grad_(False)


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[1.0, 2.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [0.0, 2.0], [3.0, 0.0]], device=device)
    lora_a = torch.tensor([[1.0, -1.0]], device=device, requires_grad=True)
    lora_b = torch.tensor([[1.0], [2.0], [0.0]], device=device, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 10.0], device=device)
    for form in FORMS:
        out = lora_linear(x, weight, lora_a, lora_b, scaling=2.0, bias=bias, impl=form)
        assert out.tolist() == [[1.0, 0.0, 13.0]]
        grads = torch.autograd.grad(out.sum(), (x, lora_a, lora_b))
        assert [grad.tolist() for grad in grads] == [[[10.0, -3.0]], [[6.0, 12.0]], [[-2.0], [-2.0], [-2.0]]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_float64(where: Where, shape: tuple[Any, ...], form: str, as_good_as_eager: Any) -> None:
    device, dtype = where
    given = arguments(*shape, dtype=dtype, device=device)
    found = with_gradients(lambda **known: lora_linear(**known, impl=form), given)
    eager = with_gradients(naive, given)
    exact = with_gradients(naive, in_float64(given))
    for one, like, truth in zip(found, eager, exact, strict=True):
        as_good_as_eager(one, like, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize(
    "shape", [((4096,), 640, 640), ((1024,), 1280, 1280), ((77,), 2048, 1280), ((16384,), 640, 640)]
)
def test_sdxl_shapes_agree_with_float64(
    where: Where, shape: tuple[Any, ...], rank: int, form: str, as_good_as_eager: Any
) -> None:
    if where[0].type != "cuda":
        pytest.skip("billions of operations: for a GPU")
    test_it_agrees_with_float64(where, (*shape, rank), form, as_good_as_eager)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form: str, device: torch.device) -> None:
    given = arguments((2, 3), 5, 4, 2, device=device)
    inputs = tuple(given.pop(name) for name in LEARNT)
    weight, _ = nf4(8, 5, device)
    for base in (given["weight"], weight):
        lead = [inputs[0], inputs[1], inputs[2] if base is given["weight"] else arguments(out=8, rank=2)["lora_b"]]
        lead[2] = lead[2].detach().to(device).requires_grad_()
        bias = None if base is weight else given["bias"]
        assert torch.autograd.gradcheck(
            lambda x, a, b, base=base, bias=bias: lora_linear(x, base, a, b, scaling=0.5, bias=bias, impl=form), lead
        )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_nf4_weight_is_its_dense_self(where: Where, form: str, nested: bool) -> None:
    device, dtype = where
    weight, _ = nf4(40, 96, device, nested)
    given = {**arguments((33,), 96, 40, 8, dtype, device), "weight": weight}
    dense = {**given, "weight": weight.dequantize(dtype)}
    found, expected = (
        with_gradients(lambda **known: lora_linear(**known, impl=form), known) for known in (given, dense)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_float32_adapters_get_float32_gradients(where: Where, form: str, as_good_as_eager: Any) -> None:
    device, dtype = where
    given = arguments((50,), 40, 30, 6, dtype, device, adapter=torch.float32)
    found = with_gradients(lambda **known: lora_linear(**known, impl=form), given)
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32, torch.float32]
    cast = {**given, **{name: given[name].detach().to(dtype).requires_grad_() for name in ("lora_a", "lora_b")}}
    exact = with_gradients(naive, in_float64(cast))
    for one, like, truth in zip(found, with_gradients(naive, cast), exact, strict=True):
        as_good_as_eager(one.to(dtype), like, truth)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_and_an_expanded_gradient(form: str, device: torch.device) -> None:
    given = arguments((6, 4), 12, 8, 3, torch.float32, device)
    run = lambda **known: lora_linear(**known, impl=form)  # noqa: E731
    expected = with_gradients(run, given)
    strided = dict(given)
    strided["x"] = given["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for name in ("lora_a", "lora_b"):
        strided[name] = given[name].detach().t().contiguous().t().requires_grad_()
    strided["weight"] = given["weight"].t().contiguous().t()
    for one, other in zip(with_gradients(run, strided), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    one = torch.ones((), device=device)
    whole = with_gradients(run, given, torch.ones(6, 4, 8))
    for found, other in zip(with_gradients(run, given, one.expand(6, 4, 8)), whole, strict=True):
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_the_empty_batch(form: str, lead: tuple[int, ...], device: torch.device) -> None:
    given = arguments(lead, device=device, dtype=torch.float32)
    out, grad_x, grad_a, grad_b = with_gradients(lambda **known: lora_linear(**known, impl=form), given)
    assert out.shape == (*lead, 7)
    assert grad_x.shape == (*lead, 12)
    assert not grad_a.any()
    assert not grad_b.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_row_leaves_its_neighbours_alone(form: str, device: torch.device) -> None:
    given = arguments((40,), 20, 30, 5, torch.float32, device)
    run = lambda **known: lora_linear(**known, impl=form)  # noqa: E731
    clean = with_gradients(run, given)
    x = given["x"].detach().clone()
    x[17, 3] = float("nan")
    spoilt = run(**{**given, "x": x})
    others = torch.arange(40, device=device) != 17
    assert spoilt[17].isnan().all()
    assert torch.equal(spoilt[others], clean[0][others])
    grad = torch.arange(1200, dtype=torch.float64, device=device).cos().view(40, 30)
    grad[17, 3] = float("nan")
    found = with_gradients(run, given, grad)[1]
    assert found[17].isnan().all()
    assert torch.equal(found[others], clean[1][others])


@pytest.mark.parametrize("form", FORMS)
def test_repeats_are_equal_to_the_bit(where: Where, form: str) -> None:
    device, dtype = where
    given = arguments((300,), 64, 96, 16, dtype, device)
    run = lambda **known: lora_linear(**known, impl=form)  # noqa: E731
    first = with_gradients(run, given)
    for _ in range(100 if device.type == "cuda" else 3):
        for one, other in zip(with_gradients(run, given), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b"), ("lora_a", "lora_b")])
def test_only_the_gradients_asked_for(form: str, wanted: tuple[str, ...], device: torch.device) -> None:
    given = arguments(device=device, dtype=torch.float32)
    expected = dict(zip(LEARNT, with_gradients(naive, given)[1:], strict=True))
    known = {**given, **{name: given[name].detach().requires_grad_(name in wanted) for name in LEARNT}}
    out = lora_linear(**known, impl=form)
    grad = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(out)
    for name, found in zip(wanted, torch.autograd.grad(out, [known[name] for name in wanted], grad), strict=True):
        assert torch.allclose(found, expected[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(lora_linear(**known, impl=form), out)


def test_no_input_is_written_to(device: torch.device) -> None:
    for form in FORMS:
        given = arguments(device=device, dtype=torch.float32)
        before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
        with_gradients(lambda **known: lora_linear(**known, impl=form), given)  # noqa: B023
        assert all(torch.equal(given[name], value) for name, value in before.items())


def test_a_large_rank_and_float64_take_the_other_way(device: torch.device) -> None:
    for rank, dtype in ((129, torch.float16), (65, torch.float32), (4, torch.float64)):
        given = arguments((9,), 16, 16, rank, dtype, device)
        one, other = (lora_linear(**given, impl=form) for form in FORMS)
        assert torch.equal(one, other)


def test_it_is_differentiable_once(device: torch.device) -> None:
    given = arguments(device=device)
    (grad,) = torch.autograd.grad(lora_linear(**given).square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_under_autocast_it_computes_as_linear_does(kind: str, device: torch.device, as_good_as_eager: Any) -> None:
    """Backward too, and whether or not that runs under autocast; a float32 x keeps its float32 gradient."""
    given = arguments((40,), 32, 24, 4, torch.float32, device)
    if kind == "nf4":
        given["weight"] = nf4(24, 32, device)[0]
    linear = torch.nn.functional.linear

    def plain(x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, bias: Tensor, scaling: float) -> Tensor:
        dense = weight.dequantize(torch.bfloat16) if isinstance(weight, NF4Weight) else weight
        return linear(x, dense, bias) + scaling * linear(linear(x, lora_a), lora_b)

    with torch.autocast(device.type, torch.bfloat16):
        found, eager = with_gradients(lora_linear, given), with_gradients(plain, given)
        out = lora_linear(**given)
    outside = torch.autograd.grad(out, given["x"], torch.arange(960.0).cos().view(40, 24).to(out))[0]
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert torch.equal(outside, found[1])
    rounded = {
        name: value.detach().bfloat16().float().requires_grad_(name in LEARNT) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    if kind == "nf4":
        rounded["weight"] = given["weight"].dequantize(torch.bfloat16)
    grad = torch.arange(960.0).cos().view(40, 24).bfloat16()
    exact = with_gradients(naive, in_float64(rounded), grad)
    for one, like, truth in zip(found, eager, exact, strict=True):
        as_good_as_eager(one.bfloat16(), like.bfloat16(), truth)


def test_a_backward_under_autocast_of_a_forward_without(device: torch.device) -> None:
    given = arguments(dtype=torch.float32, device=device)
    expected = with_gradients(lora_linear, given)
    out = lora_linear(**given)
    grad = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(out)
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.autograd.grad(out, [given[name] for name in LEARNT], grad)
    for one, other in zip(found, expected[1:], strict=True):
        assert torch.equal(one, other)
    wide = arguments(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert lora_linear(**wide).dtype == torch.float64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize("kind", ["dense", "nf4", "autocast"])
@pytest.mark.parametrize("form", ["torch", "triton", "compile"])
def test_torch_compile_sees_one_graph(form: str, kind: str, device: torch.device) -> None:
    if (form, kind) in (("triton", "autocast"), ("compile", "autocast"), ("compile", "nf4")):
        pytest.skip("the same code as its neighbours, at several seconds each")
    torch._dynamo.reset()
    given = arguments((6,), 32, 24, 4, torch.float32, device)
    if kind == "nf4":
        given["weight"] = nf4(24, 32, device)[0]

    def step(**known: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
            return lora_linear(**{**known, "x": known["x"] * 2.0}, impl=form) * 3.0

    expected = with_gradients(step, given)
    found = with_gradients(torch.compile(step, fullgraph=True), given)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_the_registration_is_sound(fused: bool, device: torch.device) -> None:
    from craft_kernels.lora_linear import op

    assert op.lora_linear is lora_linear
    given = arguments((2, 3), 16, 8, 4, torch.float32, device)
    weight, _ = nf4(8, 16, device)
    learnt = [given[name] for name in LEARNT]
    for base in ((given["weight"], None, None, None, None), op._tensors(weight)):
        for x in (learnt[0], learnt[0].detach()):
            args = (x, *learnt[1:], given["bias"], *base, 0.5, fused)
            torch.library.opcheck(torch.ops.craft_kernels.lora_linear.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_two_to_the_31(form: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("13 GiB: for a GPU")
    rows, width = 2**25 + 3, 64
    x = torch.zeros(rows, width, dtype=torch.float16, device=device)
    x[-1] = 1.0
    lora_a, lora_b = (torch.ones(*size, dtype=torch.float16, device=device) for size in ((2, width), (width, 2)))
    weight = torch.eye(width, dtype=torch.float16, device=device)
    out = lora_linear(x, weight, lora_a, lora_b, scaling=0.5, impl=form)
    assert out[-1].tolist() == [65.0] * width
    assert not out[:-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_cuda_graph_replays_it(form: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    given = arguments((256,), 64, 64, 16, torch.bfloat16, device, adapter=torch.float32)
    given["weight"] = nf4(64, 64, device)[0]
    grad = torch.ones(256, 64, device=device, dtype=torch.bfloat16)
    run = lambda **known: lora_linear(**known, impl=form)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with_gradients(run, given, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(run, given, grad)
    with torch.no_grad():
        given["x"].copy_(torch.randn_like(given["x"]))
    graph.replay()
    for one, other in zip(captured, with_gradients(run, given, grad), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 11)}, r"x must be floating point \[..., 12\], got float32 \(3, 11\)"),
        ({"x": torch.zeros(3, 12, dtype=torch.int64)}, r"x must be floating point \[..., 12\], got int64 \(3, 12\)"),
        ({"x": torch.zeros(())}, r"x must be floating point \[..., 12\], got float32 \(\)"),
        ({"weight": torch.zeros(12, 7, dtype=torch.float64)}, r"weight must be float64 \[7, 12\].*\(12, 7\)"),
        ({"weight": torch.zeros(7, 12)}, r"weight must be float64 \[7, 12\], got float32 \(7, 12\)"),
        ({"weight": torch.zeros(7, 12, dtype=torch.float64, requires_grad=True)}, r"weight must be frozen"),
        ({"weight": torch.zeros(7, 12, dtype=torch.float64, device="meta")}, "weight must be on cpu like x, got meta"),
        ({"bias": torch.zeros(12, dtype=torch.float64)}, r"bias must be float64 \[7\], got float64 \(12,\)"),
        ({"bias": torch.zeros(7, dtype=torch.float64, requires_grad=True)}, r"bias must be frozen"),
        ({"lora_a": torch.zeros(12)}, r"lora_a must be floating point \[r, in\], got float32 \(12,\)"),
        ({"lora_a": torch.zeros(0, 12)}, r"lora_a.shape\[0\] must be at least 1, got 0"),
        ({"lora_a": torch.zeros(4, 0)}, r"lora_a.shape\[1\] must be at least 1, got 0"),
        ({"lora_b": torch.zeros(7, 5)}, r"lora_b must be floating point \[out, 4\], got float32 \(7, 5\)"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**arguments(), **change})


def test_an_nf4_weight_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight must be NF4 \[7, 12\], got \(12, 7\)"):
        lora_linear(**{**arguments(), "weight": nf4(12, 7)[0]})
