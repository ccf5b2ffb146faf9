"""The 8-bit AdamW step over flat tensors, every form of it: against float64, the nearest code, and itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.adamw8bit import AdamW8bitState, adamw8bit_, dynamic_map, new_state

Where = tuple[torch.device, torch.dtype]
HERE: Where = (torch.device("cpu"), torch.float32)
FORMS = ["torch", "triton"]
BLOCK = 256
TINY = torch.finfo(torch.float32).tiny


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.adamw8bit import kernel

    lr = torch.zeros((), dtype=torch.float64)
    seed = torch.zeros((), dtype=torch.int64)
    for dtype, rounding in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, seed)):
        params = torch.zeros(73728, dtype=dtype)
        args = (params, params.clone(), *new_state(65536, 8192, "cpu"), lr, 0.9, 0.999, 1e-8, 1e-2, 1.0, rounding)
        name = str(dtype) if rounding is None else f"{dtype}, stochastic"
        yield name, lambda args=args: kernel.update(*args)


def arguments(sizes: tuple[int, int] = (8192, 4096), where: Where = HERE, *, steps: int = 2) -> dict[str, Any]:
    """Parameters near 0.02, gradients near 1 but for a block of zeros, and the state after some steps."""
    device, dtype = where
    draw = torch.Generator().manual_seed(sum(sizes))
    params = (torch.randn(sum(sizes), generator=draw) * 0.02).to(device, dtype)
    state = new_state(*sizes, device)
    lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
    for step in range(steps + 1):
        grads = torch.randn(sum(sizes), generator=draw).to(device, dtype)
        grads[:BLOCK] = 0
        if step < steps:
            adamw8bit_(params, grads, state, lr, impl="torch")
    return {"params": params, "grads": grads, "state": state, "lr": lr}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    state = AdamW8bitState(*(value.clone() for value in given["state"]))
    return {**given, "params": given["params"].clone(), "grads": given["grads"].clone(), "state": state}


def everything(given: dict[str, Any]) -> list[Tensor]:
    return [given["params"], *given["state"]]


def decoded(state: AdamW8bitState) -> tuple[Tensor, Tensor]:
    """Both moments of all elements, in float64."""
    pairs = ((state.code1, state.absmax1, state.moment1), (state.code2, state.absmax2, state.moment2))
    first, second = (
        torch.cat([(state.tables[i].double()[c.long()].view(-1, BLOCK) * a.double()[:, None]).flatten(), m.double()])
        for i, (c, a, m) in enumerate(pairs)
    )
    return first, second


def exact_step(
    given: dict[str, Any], max_norm: float = math.inf, weight_decay: float = 1e-2
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW in float64 from the given state, as torch.optim has it: parameters and unquantised moments."""
    m, v = decoded(given["state"])
    params = torch.nn.Parameter(given["params"].double())
    optimizer = torch.optim.AdamW([params], lr=float(given["lr"]), weight_decay=weight_decay)
    count = given["state"].step.double().cpu()
    optimizer.state[params] = {"step": count.float(), "exp_avg": m, "exp_avg_sq": v}
    params.grad = given["grads"].double()
    torch.nn.utils.clip_grad_norm_([params], max_norm)
    optimizer.step()
    return params.detach(), m, v


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_those_of_the_paper(signed: bool) -> None:
    values = dynamic_map(signed)
    assert values.dtype == torch.float32
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert 0.0 in values.tolist()
    assert values[-1] == 1.0
    positive = values[values > 0]
    for decade in range(7):
        inside = positive[(positive > 10.0 ** (decade - 7)) & (positive < 10.0 ** (decade - 6))]
        assert len(inside) == 2 ** (decade if signed else decade + 1)
        assert float(inside.mean()) == pytest.approx(0.55 * 10.0 ** (decade - 6))
    if signed:
        assert torch.equal(-values[values < 0].flip(0), positive[:-1])


@pytest.mark.parametrize("max_norm", [math.inf, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_adamw_in_float64(where: Where, form: str, max_norm: float) -> None:
    given = arguments((8192, 8192), where)
    dtype, before = given["params"].dtype, given["params"].double()
    exact, m, v = exact_step(given, max_norm)
    norm = adamw8bit_(**given, max_norm=max_norm, impl=form)
    assert norm is given["state"].grad_norm
    assert float(norm) == pytest.approx(float(given["grads"].double().norm()), rel=1e-6)
    assert int(given["state"].step) == 3
    # Half a unit in the last place of what is stored, float32 arithmetic, and a share of the update.
    allowed = exact.abs() * (torch.finfo(dtype).eps / 2 + 2e-7) + (exact - before).abs() * 1e-5 + 1e-9
    if dtype == torch.float16:
        allowed += 2.0**-25  # half a step among its subnormal numbers
    assert bool(((given["params"].double() - exact).abs() <= allowed).all())
    for i, (found, want) in enumerate(zip(decoded(given["state"]), (m, v), strict=True)):
        small = slice(8192, None)
        assert bool(((found - want)[small].abs() <= 1e-6 * want[small].abs().max()).all())
        scale = (given["state"].absmax1, given["state"].absmax2)[i]
        blocks = want[:8192].view(-1, BLOCK)
        assert torch.allclose(scale.double(), blocks.abs().amax(1), rtol=1e-6, atol=0)
        unit = scale.double()[:, None].clamp(min=1e-30)
        # Nothing in the map is nearer, but for what float32 cannot tell apart and the two rules around zero.
        nearest = ((blocks / unit)[..., None] - dynamic_map(i == 0).double().to(unit.device)).abs().amin(-1)
        assert bool((((found[:8192].view(-1, BLOCK) - blocks) / unit).abs() <= nearest + 1e-6).all())


@pytest.mark.parametrize("form", FORMS)
def test_every_number_gets_the_nearest_code(form: str, device: torch.device) -> None:
    """With betas of 0 the moments are g and g^2; a 1 in every block makes the scale 1."""
    signed = dynamic_map(True)
    edges = (signed[1:].double() + signed[:-1].double()) / 2
    around = [edges.float()]
    for target in (math.inf, -math.inf):
        step = edges.float()
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(target))
            around.append(step)
    roots = ((dynamic_map(False)[1:].double() + dynamic_map(False)[:-1].double()) / 2).sqrt().float()
    draw = torch.Generator().manual_seed(0)
    spread = 10 ** (-9 * torch.rand(20000, generator=draw)) * torch.randn(20000, generator=draw).sign()
    values = torch.cat([*around, roots, roots * (1 + 1e-7), roots * (1 - 1e-7), spread, torch.tensor([0.0, -0.0, -1])])
    blocks = torch.zeros(-(-len(values) // 255 // 16) * 16, BLOCK)
    blocks[:, 0] = 1.0
    filled = torch.zeros(len(blocks) * 255)
    filled[: len(values)] = values.clamp(-1, 1)
    blocks[:, 1:] = filled.view(-1, 255)
    grads = blocks.flatten().to(device)
    state = new_state(len(grads), 0, device)
    lr = torch.zeros((), dtype=torch.float64, device=device)
    adamw8bit_(torch.zeros_like(grads), grads, state, lr, betas=(0.0, 0.0), impl=form)
    assert bool((state.absmax1 == 1).all())
    for i, (code, moment) in enumerate(((state.code1, grads), (state.code2, grads * grads))):
        table, x = dynamic_map(i == 0).double().to(device), moment.double()
        distance = (table[None] - x[:, None]).abs()
        wrong = distance.argmin(1) != code
        # A value half-way between two codes, give or take a unit in the last place, may get either of them.
        chosen = distance.gather(1, code.long()[:, None])[:, 0]
        half_way = chosen - distance.amin(1) <= 4e-7 * x.abs()
        kept = (x < 0) & (code == 126) if i == 0 else (x > 0) & (code == 1)
        assert bool((~wrong | half_way | kept).all())
        assert not bool((code[x < 0] >= 127).any())
        zero = 127 if i == 0 else 0
        assert bool((code[x == 0] == zero).all())
        if i == 1:
            assert bool((code[x > 2 * TINY] > 0).all())


@pytest.mark.parametrize("sizes", [(4096, 0), (0, 4096), (4096, 4096), (24576, 12288)])
def test_triton_equals_torch_to_the_bit_without_a_clip(where: Where, sizes: tuple[int, int]) -> None:
    given = arguments(sizes, where)
    other = copied(given)
    for _ in range(3):
        adamw8bit_(**given, impl="torch")
        adamw8bit_(**other, impl="triton")
        given["grads"].mul_(-0.5)
        other["grads"].mul_(-0.5)
        for name, want, found in zip(AdamW8bitState._fields, given["state"], other["state"], strict=True):
            if name == "grad_norm":
                assert torch.allclose(found, want, rtol=1e-6)
            else:
                assert torch.equal(found, want), name
        # A root and a quotient of the GPU are off by a unit in the last place; the moments do not depend on them.
        eps = torch.finfo(given["params"].dtype).eps
        assert torch.allclose(other["params"], given["params"], rtol=eps, atol=1e-8)
        other["params"].copy_(given["params"])


@pytest.mark.parametrize("form", FORMS)
def test_zero_gradients_only_decay(form: str, device: torch.device) -> None:
    given = arguments(where=(device, torch.float32), steps=0)
    given["grads"].zero_()
    before = given["params"].clone()
    assert float(adamw8bit_(**given, weight_decay=0.1, max_norm=1.0, impl=form)) == 0.0
    assert torch.allclose(given["params"], before * (1 - 1e-3 * 0.1), rtol=1e-7)
    assert int(given["state"].step) == 1
    for name in ("code1", "code2", "absmax1", "absmax2", "moment1", "moment2"):
        assert not getattr(given["state"], name).any(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes_with_a_gradient_that_is_not_finite(form: str, bad: float, device: torch.device) -> None:
    given = arguments(where=(device, torch.float32))
    clean = given["grads"].clone()
    before = copied(given)
    for place in (0, 5000, -1):
        given["grads"].copy_(clean)
        given["grads"][place] = bad
        assert not math.isfinite(float(adamw8bit_(**given, max_norm=1.0, impl=form)))
        for found, want in zip(everything(given), everything(before), strict=True):
            assert found is given["state"].grad_norm or torch.equal(found, want)
    given["grads"].copy_(clean)
    adamw8bit_(**given, impl=form)
    adamw8bit_(**before, impl=form)
    for found, want in zip(everything(given), everything(before), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("form", FORMS)
def test_the_smallest_numbers_do_no_harm(form: str, device: torch.device) -> None:
    given = arguments(where=(device, torch.float32), steps=0)
    given["grads"].fill_(1e-38)
    given["grads"][:BLOCK] = 1e-45
    for _ in range(3):
        adamw8bit_(**given, impl=form)
    assert all(bool(value.isfinite().all()) for value in everything(given) if value is not given["state"].tables)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_step_count_enters_the_bias_correction_exactly(impl: str, device: torch.device) -> None:
    """1 - 0.999^t loses five digits in float32; here it is that of Python, at the start and after a long run."""
    for steps in (0, 1, 999, 123_456_789):
        given = arguments((0, 4096), (device, torch.float32), steps=1)
        given["state"].step.fill_(steps)
        exact, _, _ = exact_step(given, weight_decay=0.0)
        before = given["params"].double()
        adamw8bit_(**given, weight_decay=0.0, impl=impl)
        assert torch.allclose(given["params"].double() - before, exact - before, rtol=2e-5, atol=2e-9)


def test_repeats_are_equal_to_the_bit(where: Where) -> None:
    given = arguments((24576, 8192), where)
    first = copied(given)
    adamw8bit_(**first, max_norm=1.0, impl="triton")
    for _ in range(100 if where[0].type == "cuda" else 3):
        again = copied(given)
        adamw8bit_(**again, max_norm=1.0, impl="triton")
        for found, want in zip(everything(again), everything(first), strict=True):
            assert torch.equal(found, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize("form", ["triton", "compile"])
def test_torch_compile_sees_one_graph(form: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given, other = (arguments((4096, 4096), (device, torch.float32)) for _ in range(2))

    def step(params: Tensor, grads: Tensor, state: AdamW8bitState, lr: Tensor) -> Tensor:
        return adamw8bit_(params, grads * 2.0, state, lr, max_norm=1e6, impl=form) * 3.0

    want = step(**given)
    found = torch.compile(step, fullgraph=True)(**other)
    assert torch.allclose(found, want, rtol=1e-6)
    assert torch.allclose(other["params"], given["params"], rtol=1e-6, atol=1e-7)
    # A compiler may fuse a product and a sum, and so meet another code in a half-way case.
    for code, same in ((given["state"].code1, other["state"].code1), (given["state"].code2, other["state"].code2)):
        assert int((code.int() - same.int()).abs().max()) <= 1
        assert float((code != same).float().mean()) <= 2e-3
    assert int(other["state"].step) == 3


def test_the_registration_is_sound(device: torch.device) -> None:
    given = arguments((4096, 4096), (device, torch.float32))
    args = (given["params"], given["grads"], *given["state"], given["lr"], 0.9, 0.999, 1e-8, 1e-2, 1.0)
    torch.library.opcheck(torch.ops.craft_kernels.adamw8bit_.default, args)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("13 GiB: for a GPU")
    size = 2**31 + 8192
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("less than 14 GiB of GPU memory are free")
    params, grads = (torch.zeros(size, dtype=torch.float16, device=device) for _ in range(2))
    state = new_state(size - 4096, 4096, device)
    last_8bit = size - 4096 - 1
    grads[-1], grads[last_8bit] = 1.0, -1.0
    lr = torch.tensor(1e-3, dtype=torch.float64, device=device)
    assert float(adamw8bit_(params, grads, state, lr, impl="triton")) == pytest.approx(math.sqrt(2.0))
    assert float(params[-1]) == pytest.approx(-1e-3, rel=1e-3)
    assert float(params[last_8bit]) == pytest.approx(1e-3, rel=1e-3)
    assert int(params.count_nonzero()) == 2
    assert (int(state.code1[-1]), int(state.code2[-1])) == (0, 255)
    assert int(state.code2.count_nonzero()) == 1


def test_compiled_for_gpus_it_reads_and_writes_16_bytes_at_a_time(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert {row["kernel"] for row in rows} == {"_norm_kernel", "_update_kernel"}
    assert {row["arch"] for row in rows} == {80, 90, 120}
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        flat = 4 if "float32" in row["name"] else 2  # accesses for 16 elements
        if row["kernel"] == "_norm_kernel":
            assert row["ops"]["LDG.E.128"] == flat, row
            continue
        # 108 at most with triton 3.7, 168 with 3.6: three programs of 128 threads on a processor, or more.
        assert row["registers"] <= 168, row
        # Parameters, gradients, two codes, two float32 moments; what is narrower are table look-ups and scalars.
        assert row["ops"]["LDG.E.128"] >= 2 * flat + 2 + 8, row
        assert row["ops"]["STG.E.128"] == 2 * flat + 2 + 8, row
        # Two look-ups to decode and two to encode an element, 16 elements a thread.
        assert 64 <= row["ops"]["LDG.E"] <= 84, row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(12288, dtype=torch.float64)}, "params.dtype must be one of torch.float32, .*float64"),
        ({"params": torch.zeros(2, 6144)}, r"params must be floating point \[Q \+ F\], got float32 \(2, 6144\)"),
        ({"params": torch.zeros(8192), "grads": torch.zeros(8192)}, r"params must have Q \+ F = 12288 .* got 8192"),
        ({"grads": torch.zeros(12288, dtype=torch.float16)}, r"grads must be float32 \[12288\], got float16"),
        ({"grads": torch.zeros(12288, device="meta")}, "grads must be on cpu like params, got meta"),
        ({"grads": torch.zeros(24576)[::2]}, r"grads must be contiguous, got strides \(2,\)"),
        ({"lr": torch.tensor(1e-3)}, r"lr must be float64 \[\], got float32"),
        ({"code1": torch.zeros(8192)}, r"state.code1 must be uint8 \[Q\], got float32"),
        ({"code2": torch.zeros(4096, dtype=torch.uint8)}, r"state.code2 must be uint8 \[8192\], got uint8 \(4096,\)"),
        ({"moment1": torch.zeros(100)}, "state.moment1 must have a multiple of 4096 elements, got 100"),
        ({"absmax2": torch.zeros(8192)}, r"state.absmax2 must be float32 \[32\], got float32 \(8192,\)"),
        ({"step": torch.zeros(())}, r"state.step must be int64 \[\], got float32"),
        ({"tables": torch.zeros(2, 256)}, r"state.tables must be float32 \[4, 256\]"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers"),
        ({"eps": 0.0}, "eps must be finite and above 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
        ({"max_norm": 0.0}, "max_norm must be None or above 0, got 0.0"),
        ({"max_norm": math.nan}, "max_norm must be None or above 0, got nan"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = arguments(steps=0)
    fields = {name: value for name, value in change.items() if name in AdamW8bitState._fields}
    rest = {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        adamw8bit_(**{**given, "state": given["state"]._replace(**fields), **rest})


@pytest.mark.parametrize("sizes", [(-4096, 0), (100, 0), (0, 4097)])
def test_a_state_of_odd_size_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 4096, at least 0, got"):
        new_state(*sizes, "cpu")
