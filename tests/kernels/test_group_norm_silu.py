"""Group norm and SiLU, every form of it: against formulas written out, diffusers, float64, and itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.group_norm_silu import group_norm_silu

# numpy's word, of the interpreter, where sigmoid goes to 0: 1 / (1 + inf).
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
ACTIVATIONS = ["silu", "none"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# B, C, H, W and G: C / G of 1, 2, 3, 10, 20, 24, 41 and 80; one pixel, one line, several tiles, full or not.
SHAPES = [
    (1, 1, 1, 63, 1), (3, 6, 9, 7, 3), (1, 63, 7, 11, 21), (2, 40, 5, 2, 4), (1, 123, 3, 41, 3), (2, 8, 1, 2000, 4),
    (2, 160, 1, 1, 2), (1, 160, 4, 4, 8), (2, 96, 16, 16, 4), (1, 20, 77, 63, 1),
]  # fmt: skip


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.group_norm_silu import kernel

    def both(x: Tensor, weight: Tensor, affine: bool) -> None:
        y, mean, rstd = kernel.forward(x, weight, weight, 32, 1e-5, True)
        kernel.backward(y, x, weight, weight, mean, rstd, True, True, affine)

    for layout, affine in (("channels_last", True), ("contiguous", False)):
        x = torch.zeros(1, 320, 128, 128, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
        yield f"{layout} sdxl", lambda x=x, affine=affine: both(x, torch.zeros(320), affine=affine)


def arguments(
    shape: tuple[int, ...] = (3, 6, 5, 7, 2),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    *,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.5,
    size: float = 1.0,
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(sum(shape))
    x = mean + size * torch.randn(shape[:4], generator=draw, dtype=torch.float64)
    weight, bias = (torch.randn(shape[1], generator=draw, dtype=torch.float64) for _ in range(2))
    given = {"x": x.contiguous(memory_format=layout), "weight": 1 + weight / 4, "bias": bias / 2}
    tensors: dict[str, Any] = {k: v.to(device, dtype).requires_grad_() for k, v in given.items()}
    return {**tensors, "num_groups": shape[4]}


def gradient_like(y: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(y.numel())
    return torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y)


def run(given: dict[str, Any], form: str, grad_y: Tensor | None = None) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    y = group_norm_silu(**given, impl=form)  # type: ignore[arg-type]
    grads = torch.autograd.grad(
        y, (given["x"], given["weight"], given["bias"]), gradient_like(y) if grad_y is None else grad_y
    )
    return [y.detach(), *grads]


def held_against_float64(given: dict[str, Any], as_good_as_eager: Any, subtests: Any) -> None:
    """The tolerance rule for y and the gradient of x.

    Those of weight and bias are sums of both signs: what counts is the rounding of their terms, not of what is left.
    """
    grad_y = gradient_like(given["x"].detach())
    exactly = {k: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for k, v in given.items()}
    found, eager = run(given, "triton", grad_y), run(given, "torch", grad_y)
    exact = run(exactly, "torch", grad_y.double())
    for name, one, other, want in zip(("y", "x"), found, eager, exact, strict=False):
        with subtests.test(name=name):
            as_good_as_eager(one, other, want)
    x, groups = exactly["x"].detach(), given["num_groups"]
    normed = torch.group_norm(x, groups, eps=1e-5)
    z = (normed * exactly["weight"].detach().view(-1, 1, 1) + exactly["bias"].detach().view(-1, 1, 1)).requires_grad_()
    y = torch.nn.functional.silu(z) if given.get("activation", "silu") == "silu" else z * 1.0
    (grad_z,) = torch.autograd.grad(y, z, grad_y.double())
    for name, i, terms in (("weight", 2, grad_z * normed), ("bias", 3, grad_z)):
        with subtests.test(name=name):
            eps = torch.finfo(given[name].dtype).eps
            allowed = 2 * (eager[i].double() - exact[i]).norm() + eps * exact[i].norm()
            allowed += 1e-6 * terms.abs().sum((0, 2, 3)).norm()
            assert found[i].dtype == given[name].dtype
            assert float((found[i].double() - exact[i]).norm()) <= float(allowed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_by_the_formula(form: str, activation: str) -> None:
    given = arguments(dtype=torch.float64)
    x = given["x"].detach().reshape(3, 2, -1)
    variance, mean = torch.var_mean(x, dim=2, correction=0, keepdim=True)
    normed = ((x - mean) / (variance + 0.3).sqrt()).reshape(3, 6, 5, 7)
    z = normed * given["weight"].view(-1, 1, 1) + given["bias"].view(-1, 1, 1)
    expected = z / (1 + (-z).exp()) if activation == "silu" else z
    found = group_norm_silu(**given, eps=0.3, activation=activation, impl=form)  # type: ignore[arg-type]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_what_a_resnet_block_of_diffusers_does(dtype: torch.dtype) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=64, out_channels=64, temb_channels=None).to(dtype)
    torch.nn.init.normal_(block.norm1.weight)
    x = torch.randn(2, 64, 8, 8).to(dtype)
    given = {"x": x, "weight": block.norm1.weight, "bias": block.norm1.bias, "num_groups": 32, "eps": block.norm1.eps}
    expected = block.nonlinearity(block.norm1(x))
    assert torch.equal(group_norm_silu(**given), expected)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(group_norm_silu(**given, impl="triton"), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_agrees_with_float64(
    where: Where, shape: tuple[int, ...], layout: str, as_good_as_eager: Any, subtests: Any
) -> None:
    device, dtype = where
    for activation in ACTIVATIONS:
        given = {**arguments(shape, dtype, device, layout=LAYOUTS[layout]), "activation": activation}
        held_against_float64(given, as_good_as_eager, subtests)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_values_and_a_mean_far_from_zero(where: Where, layout: str, as_good_as_eager: Any, subtests: Any) -> None:
    """Where E[x^2] - E[x]^2 has nothing left, and values near 1e4, whose squares float16 does not hold."""
    device, dtype = where
    for mean, size in ((1000.0, 8.0), (-8000.0, 2e3)):
        given = arguments((2, 40, 9, 31, 4), dtype, device, layout=LAYOUTS[layout], mean=mean, size=size)
        held_against_float64(given, as_good_as_eager, subtests)


def test_one_value_a_group_and_equal_values_give_the_bias(device: torch.device) -> None:
    for shape in ((2, 5, 1, 1, 5), (2, 6, 9, 9, 2)):
        given = arguments(shape, torch.float32, device)
        given["x"] = torch.full_like(given["x"], 1000.0).detach().requires_grad_()
        y, grad_x, grad_weight, _ = run(given, "triton")
        bias = given["bias"].view(1, -1, 1, 1).expand_as(y)
        assert torch.allclose(y, torch.nn.functional.silu(bias), atol=1e-6)
        assert torch.allclose(grad_weight, torch.zeros_like(grad_weight), atol=1e-4)
        assert bool(grad_x.isfinite().all())


def test_far_tails_of_silu_are_finite(device: torch.device) -> None:
    given = arguments((2, 4, 3, 5, 2), torch.float32, device)
    given["bias"] = torch.tensor([-1000.0, -95.0, 95.0, 1000.0], device=device, requires_grad=True)
    for one, other in zip(run(given, "triton"), run(given, "torch"), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form: str, layout: str, device: torch.device) -> None:
    for activation in ACTIVATIONS:
        given = arguments((2, 4, 2, 3, 2), device=device, layout=LAYOUTS[layout])

        def call(x: Tensor, weight: Tensor, bias: Tensor, activation: str = activation) -> Tensor:
            return group_norm_silu(x, weight, bias, num_groups=2, activation=activation, impl=form)  # type: ignore[arg-type]

        # Along random directions: one by one takes the interpreter 15 s.
        inputs = (given["x"], given["weight"], given["bias"])
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_layout_of_the_input_is_kept(form: str, layout: str, device: torch.device) -> None:
    given = arguments((2, 6, 6, 5, 3), torch.float32, device, layout=LAYOUTS[layout])
    y = group_norm_silu(**given, impl=form)  # type: ignore[arg-type]
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    (grad_x,) = torch.autograd.grad(y, given["x"], gradient_like(y).contiguous())
    assert grad_x.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("form", FORMS)
def test_other_layouts(form: str, device: torch.device) -> None:
    given = arguments(device=device)
    expected = run(given, form)
    x = given["x"].detach()
    wide = torch.zeros(3, 6, 5, 14, dtype=torch.float64, device=device)
    wide[..., ::2] = x
    weight = torch.stack([given["weight"].detach(), torch.zeros(6, device=device)], dim=1)[:, 0].requires_grad_()
    for layout in (wide[..., ::2], x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        other = {**given, "x": layout.detach().requires_grad_(), "weight": weight}
        grad_y = gradient_like(x).contiguous(memory_format=torch.channels_last)
        for found, want in zip(run(other, form, grad_y), expected, strict=True):
            assert torch.allclose(found, want, rtol=1e-10, atol=1e-12)
    one = torch.ones((), dtype=torch.float64, device=device).expand(3, 6, 5, 7)
    for found, want in zip(run(given, form, one), run(given, "torch", one.contiguous()), strict=True):
        assert torch.allclose(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_empty_batch_and_the_empty_image(form: str, device: torch.device) -> None:
    given = arguments((0, 6, 4, 4, 2), torch.float32, device)
    y, grad_x, grad_weight, grad_bias = run(given, form)
    assert y.shape == grad_x.shape == (0, 6, 4, 4)
    assert grad_weight.tolist() == grad_bias.tolist() == [0.0] * 6
    assert group_norm_silu(**arguments((2, 6, 0, 4, 2)), impl=form).shape == (2, 6, 0, 4)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter: inf - inf
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_value_spoils_its_own_group_alone(layout: str, bad: float, device: torch.device) -> None:
    given = arguments((3, 6, 9, 9, 2), torch.float32, device, layout=LAYOUTS[layout])
    clean = run(given, "triton")
    x = given["x"].detach().clone()
    x[1, 4, 8, 8] = bad
    y, grad_x, grad_weight, grad_bias = run({**given, "x": x.requires_grad_()}, "triton")
    for found, want in ((y, clean[0]), (grad_x, clean[1])):
        assert torch.equal(found[[0, 2]], want[[0, 2]])
        assert torch.equal(found[1, :3], want[1, :3])
        assert not bool(found[1, 3:].isfinite().any())
    assert grad_weight.isfinite().tolist() == grad_bias.isfinite().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_equal_to_the_bit_and_do_not_depend_on_the_batch(where: Where, layout: str) -> None:
    device, dtype = where
    given = arguments((3, 20, 21, 33, 2), dtype, device, layout=LAYOUTS[layout])
    grad_y = gradient_like(given["x"].detach())
    first = run(given, "triton", grad_y)
    for _ in range(100 if device.type == "cuda" else 2):
        for one, other in zip(run(given, "triton", grad_y), first, strict=True):
            assert torch.equal(one, other)
    alone = {**given, "x": given["x"].detach()[2:3].requires_grad_()}
    for one, other in zip(run(alone, "triton", grad_y[2:3])[:2], first[:2], strict=True):
        assert torch.equal(one, other[2:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_and_bias_may_have_another_dtype(
    dtype: torch.dtype, device: torch.device, as_good_as_eager: Any, subtests: Any
) -> None:
    given = arguments((2, 20, 9, 9, 2), torch.float16, device)
    given.update({k: given[k].detach().to(dtype).requires_grad_() for k in ("weight", "bias")})
    held_against_float64(given, as_good_as_eager, subtests)


def test_a_frozen_norm_costs_nothing_and_gets_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_kernels.group_norm_silu import kernel

    given = arguments(dtype=torch.float32, device=device)
    expected = run(given, "triton")
    frozen = {k: v.detach() if k in ("weight", "bias") else v for k, v in given.items()}
    with monkeypatch.context() as no:
        no.setattr(kernel, "_affine_kernel", None)  # cannot be launched
        y = group_norm_silu(**frozen, impl="triton")
        (grad_x,) = torch.autograd.grad(y, given["x"], gradient_like(y))
    assert torch.equal(grad_x, expected[1])
    alone = {**given, "x": given["x"].detach()}
    with monkeypatch.context() as no:
        no.setattr(kernel, "_grad_x_kernel", None)
        y = group_norm_silu(**alone, impl="triton")
        grads = torch.autograd.grad(y, (given["weight"], given["bias"]), gradient_like(y))
    for found, want in zip(grads, expected[2:], strict=True):
        assert torch.equal(found, want)
    only_bias = {**frozen, "bias": given["bias"]}
    y = group_norm_silu(**only_bias, impl="triton")
    y.backward(gradient_like(y))
    assert torch.equal(given["bias"].grad, expected[3])
    assert torch.equal(given["x"].grad, expected[1])
    assert given["weight"].grad is None


def test_what_is_kept_for_backward(device: torch.device) -> None:
    given = arguments(dtype=torch.float32, device=device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        group_norm_silu(**given, impl="triton")
    assert [tensor.shape for tensor in kept] == [(3, 6, 5, 7), (6,), (6,), (3, 2), (3, 2)]
    assert [tensor.data_ptr() for tensor in kept[:3]] == [given[k].data_ptr() for k in ("x", "weight", "bias")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize(("form", "layout"), [("triton", "channels_last"), ("compile", "contiguous")])
def test_torch_compile_sees_one_graph(form: str, layout: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given = arguments(dtype=torch.float32, device=device, layout=LAYOUTS[layout])

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x * 2.0, weight, bias, num_groups=2, impl=form) * 3.0  # type: ignore[arg-type]

    inputs = (given["x"], given["weight"], given["bias"])
    expected = step(*inputs)
    found = torch.compile(step, fullgraph=True)(*inputs)
    assert found.is_contiguous(memory_format=LAYOUTS[layout])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y, inputs, gradient_like(expected)) for y in (found, expected)]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [True, False])
def test_the_registration_is_sound(trained: bool, layout: str, device: torch.device) -> None:
    given = arguments((2, 6, 4, 5, 2), torch.float32, device, layout=LAYOUTS[layout])
    x, weight, bias = (given[k].detach() for k in ("x", "weight", "bias"))
    inputs = (x.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained))
    torch.library.opcheck(torch.ops.craft_kernels.group_norm_silu.default, (*inputs, 2, 1e-5, True))
    plain = [tensor.detach() for tensor in inputs]
    y, mean, rstd = torch.ops.craft_kernels.group_norm_silu(*plain, 2, 1e-5, True)
    backward = torch.ops.craft_kernels.group_norm_silu_backward.default
    torch.library.opcheck(backward, (y, *plain, mean, rstd, True, trained, True))
    torch.library.opcheck(backward, (y, *plain, mean, rstd, False, True, trained))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_two_to_the_31(layout: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 40e9:
        pytest.skip("four tensors of 4 GiB of float16: for a large GPU")
    x = torch.empty(2, 8, 11600, 11600, dtype=torch.float16, device=device)  # 2.15e9 elements
    x = x.contiguous(memory_format=LAYOUTS[layout]).normal_().requires_grad_()
    weight, bias = (torch.rand(8, device=device, dtype=torch.float16) for _ in range(2))
    y = group_norm_silu(x, weight, bias, num_groups=4, impl="triton")
    grad_y = torch.empty_like(y).normal_()
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    alone = x.detach()[1:].requires_grad_()  # 1.08e9 elements: offsets below 2^31
    small = group_norm_silu(alone, weight, bias, num_groups=4, impl="triton")
    assert torch.equal(small, y[1:])
    assert torch.equal(torch.autograd.grad(small, alone, grad_y[1:])[0], grad_x[1:])
    assert bool(small[0, -1, -1, -64:].isfinite().all())


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    given = arguments((2, 320, 64, 64, 32), torch.bfloat16, device, layout=torch.channels_last)
    grad_y = gradient_like(given["x"].detach())
    run(given, "triton", grad_y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, "triton", grad_y)
    with torch.no_grad():
        given["x"].copy_(torch.randn_like(given["x"]))
    graph.replay()
    for found, expected in zip(captured, run(given, "triton", grad_y), strict=True):
        assert torch.equal(found, expected)


def test_compiled_for_gpus_it_reads_and_writes_16_bytes_at_a_time(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    tiles = {"_statistics_kernel": 1, "_apply_kernel": 1, "_sums_kernel": 2, "_grad_x_kernel": 2}
    finishes = {"_statistics_finish_kernel", "_sums_finish_kernel", "_affine_kernel"}
    assert {row["kernel"] for row in rows} == tiles.keys() | finishes
    assert not [row for row in rows if row["spilled_bytes"]]
    for row in rows:
        if row["kernel"] in tiles:
            pieces = 8192 * 2 // 128 // 16  # a tile over 128 threads, in 16 bytes, of each tensor of the input's shape
            assert row["ops"]["LDG.E.128"] >= pieces * tiles[row["kernel"]], row
            if row["kernel"] in ("_apply_kernel", "_grad_x_kernel"):
                assert row["ops"]["STG.E.128"] == pieces, row
    frozen = {row["kernel"] for row in rows if row["name"].startswith("contiguous")}
    assert "_affine_kernel" not in frozen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 6)}, r"x must be floating point \[B, C, H, W\], got float32 \(3, 6\)"),
        ({"x": torch.zeros(3, 6, 5, 7, dtype=torch.int64)}, r"x must be floating point .*int64"),
        ({"weight": torch.zeros(5)}, r"weight must be floating point \[6\], got float32 \(5,\)"),
        ({"bias": torch.zeros(6, 1)}, r"bias must be .*\[6\].*\(6, 1\)"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, r"bias must be floating point .*int64"),
        ({"weight": torch.zeros(6, device="meta")}, "weight must be on cpu like x, got meta"),
        ({"num_groups": 4}, "num_groups must be a divisor of the 6 channels of x, got 4"),
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"eps": -1e-5}, "eps must be at least 0.0, got -1e-05"),
        ({"activation": "relu"}, "activation must be one of silu, none, got 'relu'"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**arguments(), **change})
