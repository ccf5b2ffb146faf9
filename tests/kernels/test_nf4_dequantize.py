"""NF4 dequantisation, every form of it: equal to bitsandbytes to the bit, and to numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.nf4_dequantize import NF4Weight, nf4_dequantize
from craft_kernels.nf4_dequantize.naive import LEVELS

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
# An odd number of elements, half a block, one block and one element, several groups of 256 blocks, a matrix.
SHAPES = [(1,), (63,), (64,), (65,), (77, 123), (2000,), (5, 7, 11), (33, 512), (128, 640)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.nf4_dequantize import kernel

    def launch(side: int, dtype: torch.dtype, nested: bool = True) -> None:
        size, blocks = side * side, -(-side * side // 64)
        scales = (torch.zeros(-(-blocks // 256)), torch.zeros(256), torch.zeros(())) if nested else (None, None, None)
        absmax = torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32)
        kernel.dequantize(torch.zeros(-(-size // 2), dtype=torch.uint8), absmax, (side, side), *scales, dtype)

    for side in (640, 2048):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            yield f"{dtype} {side}", lambda side=side, dtype=dtype: launch(side, dtype)
    yield "plain scales 640", lambda: launch(640, torch.bfloat16, nested=False)
    yield "odd", lambda: launch(77, torch.bfloat16)


def quantized(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, nested: bool) -> tuple[Any, Any]:
    """A random weight in bitsandbytes' own hands: packed, and its QuantState."""
    import bitsandbytes.functional as bnb

    draw = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw)
    return bnb.quantize_4bit(weight.to(device, dtype), quant_type="nf4", compress_statistics=nested)


def by_bitsandbytes(packed: Tensor, state: Any) -> Tensor:
    """Flat, and asked for an even number of elements: for an odd one the CPU form compiles itself, for seconds."""
    import bitsandbytes.functional as bnb

    shape, size = state.shape, state.shape.numel()
    state.shape = torch.Size([size + size % 2])
    flat = bnb.dequantize_4bit(packed, state).reshape(-1)[:size]
    state.shape = shape
    return flat


def arguments(size: int = 1000, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Every byte at random: also such scales as no weight would have."""
    draw, blocks = torch.Generator().manual_seed(size), -(-size // 64)

    def random_bytes(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=draw, dtype=torch.uint8).to(device)

    return {
        "packed": random_bytes(-(-size // 2)),
        "absmax": random_bytes(blocks),
        "shape": (size,),
        "nested_absmax": torch.randn(-(-blocks // 256), generator=draw).to(device),
        "nested_code": torch.randn(256, generator=draw).to(device),
        "offset": torch.randn((), generator=draw).to(device),
        "dtype": torch.float32,
    }


def test_by_hand(device: torch.device) -> None:
    packed = torch.tensor([0x0F, 0xF7, 0x80], dtype=torch.uint8, device=device)
    eighth = float(12.5 * torch.tensor(LEVELS[8]))
    for form in FORMS:
        plain = nf4_dequantize(packed, torch.tensor([2.0], device=device), (5,), dtype=torch.float32, impl=form)
        assert plain.tolist() == [-2.0, 2.0, 2.0, 0.0, 2 * LEVELS[8]]
        nested = nf4_dequantize(
            packed, torch.tensor([3], dtype=torch.uint8, device=device), (1, 5), dtype=torch.float32, impl=form,
            nested_absmax=torch.tensor([4.0], device=device), offset=torch.tensor(0.5, device=device),
            nested_code=torch.arange(256.0, device=device),
        )  # fmt: skip
        assert nested.tolist() == [[-12.5, 12.5, 12.5, 0.0, eighth]]


def test_the_levels_are_those_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    assert bnb.get_4bit_type("nf4", device="cpu").tolist() == list(LEVELS)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_is_bitsandbytes_to_the_bit(where: Where, shape: tuple[int, ...], nested: bool) -> None:
    device, dtype = where
    packed, state = quantized(shape, dtype, device, nested)
    found = NF4Weight.from_bitsandbytes(packed, state).dequantize(impl="triton")
    assert found.shape == shape
    assert found.dtype == dtype
    assert torch.equal(found.reshape(-1), by_bitsandbytes(packed, state))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_plain_form_is_bitsandbytes_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, ...], nested: bool, device: torch.device
) -> None:
    packed, state = quantized(shape, dtype, device, nested)
    found = NF4Weight.from_bitsandbytes(packed, state).dequantize(impl="torch")
    assert found.shape == shape
    assert found.dtype == dtype
    assert torch.equal(found.reshape(-1), by_bitsandbytes(packed, state))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(640, 640), (1280, 640), (10240, 1280), (1280, 5120), (1280, 2048)])
def test_sdxl_weights_are_bitsandbytes_to_the_bit(shape: tuple[int, int], where: Where) -> None:
    device, dtype = where
    if device.type != "cuda":
        pytest.skip("millions of elements: for a GPU")
    packed, state = quantized(shape, dtype, device, True)
    found = NF4Weight.from_bitsandbytes(packed, state).dequantize(impl="triton")
    assert torch.equal(found.reshape(-1), by_bitsandbytes(packed, state))


@pytest.mark.parametrize("size", [1, 2, 255, 2049, 16384 * 2 + 3])
def test_every_byte_and_every_scale(where: Where, size: int) -> None:
    device, dtype = where
    given = {**arguments(size, device), "dtype": dtype}
    assert torch.equal(nf4_dequantize(**given, impl="triton"), nf4_dequantize(**given, impl="torch"))


@pytest.mark.parametrize("form", FORMS)
def test_float64_holds_the_float32_product(form: str, device: torch.device) -> None:
    given = arguments(130, device)
    wide = nf4_dequantize(**{**given, "dtype": torch.float64}, impl=form)
    assert torch.equal(wide, nf4_dequantize(**given, impl=form).double())


@pytest.mark.parametrize("form", FORMS)
def test_the_formula_in_float64(form: str, device: torch.device) -> None:
    given = arguments(777, device)
    code, groups, offset = (given[name].double() for name in ("nested_code", "nested_absmax", "offset"))
    scale = code[given["absmax"].long()] * groups[0] + offset
    halves = torch.stack([given["packed"] >> 4, given["packed"] & 15], dim=1).reshape(-1)[:777].long()
    exact = torch.tensor(LEVELS, dtype=torch.float64, device=device)[halves] * scale.repeat_interleave(64)[:777]
    assert torch.allclose(nf4_dequantize(**given, impl=form).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_strided_and_misaligned_inputs(form: str, device: torch.device) -> None:
    given = arguments(40_000, device)
    expected = nf4_dequantize(**given, impl=form)
    strided = dict(given)
    for name in ("packed", "absmax", "nested_absmax", "nested_code"):
        strided[name] = torch.stack([given[name], given[name].flip(0)], dim=1)[:, 0]
        assert not strided[name].is_contiguous()
    assert torch.equal(nf4_dequantize(**strided, impl=form), expected)
    moved = dict(given)
    for name in ("packed", "absmax", "nested_absmax", "nested_code"):
        moved[name] = torch.cat([given[name][:1], given[name]])[1:]
    moved["packed"] = moved["packed"].view(-1, 1)
    assert torch.equal(nf4_dequantize(**{**moved, "shape": (200, 200)}, impl=form), expected.view(200, 200))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form: str, device: torch.device) -> None:
    nothing = torch.zeros(0, device=device)
    found = nf4_dequantize(nothing.byte(), nothing, (3, 0), impl=form)
    assert found.shape == (3, 0)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_scale_leaves_other_blocks_alone(form: str, device: torch.device) -> None:
    given = arguments(300, device)
    scale = torch.ones(5, device=device)
    scale[2] = float("nan")
    found = nf4_dequantize(given["packed"], scale, (300,), dtype=torch.float32, impl=form)
    assert found.isnan().nonzero().flatten().tolist() == list(range(128, 192))


def test_repeats_are_equal_to_the_bit(where: Where) -> None:
    device, dtype = where
    given = {**arguments(33_000, device), "dtype": dtype}
    first = nf4_dequantize(**given, impl="triton")
    for _ in range(100 if device.type == "cuda" else 3):
        assert torch.equal(nf4_dequantize(**given, impl="triton"), first)


@pytest.mark.parametrize("form", FORMS)
def test_it_has_no_gradient(form: str, device: torch.device) -> None:
    given = arguments(100, device)
    given["offset"].requires_grad_()
    assert not nf4_dequantize(**given, impl=form).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "triton", "compile"])
def test_torch_compile_sees_one_graph(form: str, device: torch.device) -> None:
    torch._dynamo.reset()
    weight = NF4Weight(**{**arguments(4096, device), "shape": (64, 64)})
    x = torch.randn(3, 64, device=device)

    def layer(x: Tensor) -> Tensor:
        return x @ weight.dequantize(impl=form).t()

    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nested", [True, False])
def test_the_registration_is_sound(nested: bool, device: torch.device) -> None:
    from craft_kernels.nf4_dequantize import op

    assert op.nf4_dequantize is nf4_dequantize
    given = arguments(1000, device)
    scales = [given[name] if nested else None for name in ("nested_absmax", "nested_code", "offset")]
    absmax = given["absmax"] if nested else given["absmax"].float()
    args = (given["packed"], absmax, [25, 40], *scales, torch.float32)
    torch.library.opcheck(torch.ops.craft_kernels.nf4_dequantize.default, args)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("5 GiB: for a GPU")
    size = 2**31 + 4099
    blocks = -(-size // 64)
    packed = torch.full((-(-size // 2),), 0x77, dtype=torch.uint8, device=device)  # level 7 is zero
    packed[-1] = 0xFF
    scale = torch.ones(blocks, device=device)
    scale[-1] = 3.0
    found = nf4_dequantize(packed, scale, (size,), dtype=torch.float16, impl="triton")
    assert found[-1].item() == 3.0
    assert not found[:-1].any()


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    given = arguments(640 * 640, device)
    nf4_dequantize(**given, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nf4_dequantize(**given, impl="triton")
    given["offset"].fill_(0.25)
    graph.replay()
    assert torch.equal(captured, nf4_dequantize(**given, impl="triton"))


def test_compiled_for_gpus_it_writes_16_bytes_at_a_time_and_fuses_no_rounding(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert {row["kernel"] for row in rows} == {"_dequantize_kernel"}
    for row in rows:
        assert not row["spilled_bytes"], row
        assert not [op for op in row["ops"] if op.startswith(("FFMA", "DFMA"))], row
        assert row["registers"] <= 64, row
        if "odd" not in row["name"]:
            stores = {op: count for op, count in row["ops"].items() if op.startswith("STG")}
            assert set(stores) == {"STG.E.128"}, row
            # A thread's 16 bytes cost one read of packed bytes, at most four for their scale, and table reads.
            loads = sum(count for op, count in row["ops"].items() if op.startswith("LDG"))
            assert loads <= 5 * stores["STG.E.128"], row


def test_a_bitsandbytes_layer_is_read_in_place(device: torch.device) -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True).to(device)
    weight = NF4Weight.from_bitsandbytes(layer.weight, layer.weight.quant_state)
    assert type(weight.packed) is Tensor
    assert weight.packed.data_ptr() == layer.weight.data_ptr()
    assert weight.shape == (64, 128)
    assert torch.equal(weight.dequantize(), bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state))
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_another_storage_dtype_is_the_same_bytes(device: torch.device) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(16, 64, device=device)
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
        found = NF4Weight.from_bitsandbytes(packed, state).dequantize()
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "fp4"}, r"quant_state.quant_type must be one of nf4, got 'fp4'"),
        ({"quant_type": "nf4", "blocksize": 128}, r"quant_state.blocksize must be one of 64, got 128"),
    ],
)
def test_other_formats_are_refused(options: dict[str, Any], message: str) -> None:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(4, 64), **options)
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_bitsandbytes(packed, state)


def test_a_repacked_or_unknown_state_is_refused() -> None:
    packed, state = quantized((4, 64), torch.float32, "cpu", True)
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="weight must be in bitsandbytes' usual order, got one repacked"):
        NF4Weight.from_bitsandbytes(packed, state)
    state.packing_format_for_cpu = False
    state.state2.blocksize = 512
    with pytest.raises(ValueError, match=r"quant_state.state2.blocksize must be one of 256, got 512"):
        NF4Weight.from_bitsandbytes(packed, state)


def test_a_weight_of_another_shape_is_refused() -> None:
    weight = NF4Weight(**{**arguments(64), "shape": (8, 8)})
    with pytest.raises(ValueError, match=r"packed must be uint8 with 36 elements for shape \(8, 9\)"):
        replace(weight, shape=(8, 9)).dequantize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(500)}, r"packed must be uint8 with 500 elements for shape \(1000,\), got float32"),
        ({"packed": torch.zeros(499, dtype=torch.uint8)}, r"packed must be uint8 with 500 .*\(499,\)"),
        ({"shape": (-5, -200)}, r"shape must hold no negative size, got \(-5, -200\)"),
        ({"absmax": torch.zeros(16)}, r"absmax must be uint8 \[16\], got float32 \(16,\)"),
        ({"absmax": torch.zeros(15, dtype=torch.uint8)}, r"absmax must be uint8 \[16\], got uint8 \(15,\)"),
        ({"nested_absmax": torch.zeros(2)}, r"nested_absmax must be float32 \[1\], got float32 \(2,\)"),
        ({"nested_code": torch.zeros(255)}, r"nested_code must be float32 \[256\], got float32 \(255,\)"),
        ({"offset": torch.zeros(1)}, r"offset must be float32 \[\], got float32 \(1,\)"),
        ({"offset": torch.zeros((), device="meta")}, "offset must be on cpu like packed, got meta"),
        ({"offset": None}, "nested_absmax, nested_code and offset go together: offset is None"),
        ({"dtype": torch.int8}, r"dtype must be one of torch.float16, .*, got torch.int8"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, compile, torch, got 'cuda'"),
        (
            {"nested_absmax": None, "nested_code": None, "offset": None},
            r"absmax must be float32 \[16\], got uint8 \(16,\)",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(**{**arguments(), **change})
