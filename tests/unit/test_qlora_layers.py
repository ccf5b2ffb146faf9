"""Our own layers against the dense ones, bitsandbytes' and PEFT's: same weights, results, gradients; fewer bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_fast.errors import ConfigError
from craft_fast.qlora import nf4
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.frozen import dequantize, frozen_conv2d
from craft_fast.qlora.layers import FusedLoraLinear
from craft_fast.qlora.lora import add_lora, load_lora_state_dict, lora_state_dict
from craft_fast.qlora.nf4 import nf4_bytes, quantize_nf4, quantized_bytes
from craft_fast.qlora.nf4_layers import FlatLinear4bit, NF4Conv2d, NF4Linear, quantize_weight
from craft_fast.sdxl.published import random_unet
from tests.unit.small_unets import (
    TARGETS,
    difference,
    forward,
    loss_and_gradients,
    prepared,
    shipped_unet,
    small_unet,
)

DTYPES = [torch.float32, torch.bfloat16]
CONVS = [
    {"in_channels": 64, "out_channels": 96, "kernel_size": 3, "padding": 1},
    {"in_channels": 48, "out_channels": 10, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 5, "out_channels": 3, "kernel_size": 1, "bias": False},
    {"in_channels": 12, "out_channels": 8, "kernel_size": (3, 5), "padding": (0, 2), "dilation": (2, 1), "groups": 4},
]


def kept(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return shapes


def with_input_gradient(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(torch.arange(out.numel(), dtype=torch.float32).cos().view(out.shape).to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


# ---- NF4 layers


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 96), (48, 48), (128, 160), (640, 64), (5, 3), (7, 1)])
def test_dequantised_on_a_cpu_it_is_near_the_weight_and_equals_the_op(shape: Any, double_quant: bool) -> None:
    """bitsandbytes' own call mixes up scales where rows are no multiple of 64, so nearness is asked for as well."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, shape[0])[:, None]
    packed = quantize_weight(weight, double_quant=double_quant)
    assert difference(packed.dequantize(), weight) < 0.12
    for dtype in (*DTYPES, torch.float16, torch.float64):
        assert torch.equal(dequantize(packed, dtype), packed.dequantize(dtype))


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_in_nf4_is_its_dequantised_self(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(width, 40)
    own = NF4Linear(base, compute_dtype=dtype)
    weight, bias = dequantize(own.nf4, dtype), base.bias.detach().to(dtype)
    x = torch.randn(2, 9, width, dtype=dtype)
    found, expected = with_input_gradient(own, x), with_input_gradient(lambda t: F.linear(t, weight, bias), x)
    assert difference(weight, base.weight.detach()) < 0.12
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", [64, 96])
def test_peft_gets_a_layer_with_the_same_weights(width: int) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"a": nn.Linear(width, 40)})
    own = NF4Linear(holder["a"], compute_dtype=torch.float32)  # type: ignore[arg-type]
    quantize_nf4(holder, compute_dtype=torch.float32)
    theirs: Any = holder["a"]
    assert isinstance(theirs, FlatLinear4bit) == (width == 96)
    assert torch.equal(theirs.weight.data.view(-1), own.packed.view(-1))
    x = torch.randn(5, width)
    for one, other in zip(with_input_gradient(own, x), with_input_gradient(theirs, x), strict=True):
        assert difference(one, other) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_in_nf4_is_its_dequantised_self(dtype: torch.dtype, options: Any, channels_last: bool) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(**options)
    own = NF4Conv2d(base, compute_dtype=dtype)
    dense = nn.Conv2d(**options).requires_grad_(False).to(dtype)
    dense.weight.copy_(dequantize(own.nf4, dtype).permute(0, 3, 1, 2))
    if dense.bias is not None and base.bias is not None:
        dense.bias.copy_(base.bias)
    assert difference(dense.weight, base.weight.detach()) < 0.12
    x = torch.randn(2, base.in_channels, 9, 8, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found, expected = with_input_gradient(own, x), with_input_gradient(dense, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert difference(one, other) < (1e-6 if dtype == torch.float32 else 2**-7)
    if channels_last and base.in_channels == 64:
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found)


def test_nothing_but_packed_weights_is_kept() -> None:
    linear, conv = nn.Linear(64, 40), nn.Conv2d(64, 40, 3, padding=1)
    x, image = torch.randn(9, 64, requires_grad=True), torch.randn(1, 64, 8, 8, requires_grad=True)
    own = NF4Linear(linear, compute_dtype=torch.float32), NF4Conv2d(conv, compute_dtype=torch.float32)
    for layer, given in zip(own, (x, image), strict=True):
        # Packed weight, its scales, theirs, their code and mean.
        parts = [layer.packed, layer.absmax, layer.nested_absmax, layer.nested_code, layer.offset]
        assert kept(lambda layer=layer, given=given: layer(given)) == [tuple(t.shape) for t in parts]  # type: ignore[misc]
    assert not kept(lambda: own[1](image.detach()))
    # The reason for our own frozen convolution: PyTorch's keeps its input, its linear layer does not.
    conv.requires_grad_(False)
    linear.requires_grad_(False)
    assert tuple(image.shape) in kept(lambda: conv(image))
    assert kept(lambda: frozen_conv2d(image, conv.weight, conv.bias, padding=(1, 1))) == [tuple(conv.weight.shape)]
    assert tuple(x.shape) not in kept(lambda: linear(x))


def test_scales_keep_their_dtype_when_the_model_is_converted() -> None:
    layer = NF4Linear(nn.Linear(64, 40), compute_dtype=torch.float32)
    before = dequantize(layer.nf4, torch.float32)
    layer.half()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert torch.equal(dequantize(layer.nf4, torch.float32), before)
    moved = NF4Linear(nn.Linear(64, 40), compute_dtype=torch.float32).to("meta")
    assert {t.device.type for t in moved.buffers()} == {"meta"}
    assert not list(moved.parameters())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_autocast_they_compute_in_its_dtype(kind: str) -> None:
    torch.manual_seed(0)
    base: Any = nn.Linear(64, 40) if kind == "linear" else nn.Conv2d(64, 40, 3, padding=1)
    layer: Any = (NF4Linear if kind == "linear" else NF4Conv2d)(base, compute_dtype=torch.float32)
    x = torch.randn((6, 64) if kind == "linear" else (1, 64, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_input_gradient(layer, x)
    expected = with_input_gradient(layer, x)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert 0 < difference(one, other) < 0.02


# ---- the whole UNet


@pytest.mark.parametrize("own_layers", [True, False])
@pytest.mark.parametrize("convs", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_are_what_the_formula_says(convs: bool, own_layers: bool, double_quant: bool) -> None:
    unet = small_unet()
    expected = quantized_bytes(unet, dtype=torch.bfloat16, convs=convs, double_quant=double_quant)
    names = nf4.quantized_names(unet, convs=convs)
    options: Any = {"convs": convs, "own_layers": own_layers, "double_quant": double_quant}
    assert quantize_nf4(unet, compute_dtype=torch.bfloat16, **options) == len(names)
    tensors: list[Tensor] = [*unet.parameters(), *unet.buffers()]
    for layer in unet.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            second = (state.state2.absmax, state.state2.code, state.offset) if double_quant else ()
            tensors += [state.absmax, *second]
    # bitsandbytes keeps one code of 256 numbers for all layers; ours move with each layer.
    found = sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())
    linear = len(names) if not convs else len(nf4.quantized_names(small_unet(), convs=False))
    shared = 1024 * (linear - 1) if double_quant and not own_layers else 0
    assert expected - shared - 1024 * len(names) <= found <= expected


def test_full_size_sdxl_takes_the_bytes_that_are_promised() -> None:
    """From SDXL's published configuration, nothing allocated. With its 21 time layers dense: 1.86 GB and 1.36."""
    unet = random_unet(device="meta", dtype=torch.bfloat16)
    assert sum(p.nbytes for p in unet.parameters()) == 5_134_927_368
    linear = quantized_bytes(unet, dtype=torch.bfloat16)
    both = quantized_bytes(unet, dtype=torch.bfloat16, convs=True)
    assert linear == pytest.approx(1.822e9, rel=1e-3)
    assert both == pytest.approx(1.328e9, rel=1e-3)
    assert nf4_bytes(64 * 256) == 8192 + 256 + 4 + 1024 + 4
    assert nf4_bytes(65, double_quant=False) == 33 + 8


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_dense_weight_is_freed_before_the_next_is_quantised(
    device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = small_unet()
    alive: list[weakref.ref[Any]] = []
    most = 0
    real = nf4._quantized

    def counted(layer: Any, *options: Any) -> nn.Module:
        nonlocal most
        alive.append(weakref.ref(layer))
        most = max(most, sum(ref() is not None for ref in alive))
        return real(layer, *options)

    monkeypatch.setattr(nf4, "_quantized", counted)
    gc.disable()  # by counting references alone, since memory must be free at once
    try:
        quantize_nf4(unet, compute_dtype=torch.float32, convs=True, own_layers=True, device=device)
    finally:
        gc.enable()
    assert len(alive) > 30
    assert most <= 2  # itself, and the one before it in the caller's variable


def test_latents_side_stays_dense_and_dtype_is_one() -> None:
    unet = small_unet()
    quantize_nf4(unet, compute_dtype=torch.bfloat16, convs=True, own_layers=True)
    dense = [name for name, layer in unet.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    assert dense == ["conv_in", "conv_out"]
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in unet.parameters())
    assert forward(unet, dtype=torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("convs", [False, True])
def test_noise_prediction_of_the_shipped_model_stays_near(convs: bool) -> None:
    unet = shipped_unet()
    with torch.no_grad():
        before = forward(unet, batch=8)
        quantize_nf4(unet, compute_dtype=torch.float32, convs=convs, own_layers=True)
        after = forward(unet, batch=8)
    # Measured over 32 latents: 2.4 % and 5.8 %; conv_in and conv_out in NF4 would alone be 9.5 %.
    low, high = (0.03, 0.08) if convs else (0.01, 0.035)
    assert low < difference(after, before) < high


# ---- the fused adapter


@pytest.mark.parametrize("make", [small_unet, shipped_unet])
@pytest.mark.parametrize(("method", "convs"), [("lora", False), ("qlora", False), ("qlora", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_give_the_same_loss_and_gradients(make: Any, method: str, convs: bool, dtype: torch.dtype) -> None:
    results = []
    for fused in (False, True):
        unet, parameters = prepared(make, dtype=dtype, method=method, nf4_convs=convs, fused_lora=fused)
        results.append(loss_and_gradients(unet, parameters, dtype=dtype))
    (expected, theirs), (found, ours) = results
    assert list(ours) == list(theirs)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in ours)
    assert float(found) == pytest.approx(float(expected), rel=1e-6 if dtype == torch.float32 else 0.02)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert difference(gradient, theirs[name]) < (2e-5 if dtype == torch.float32 else 0.25), name
    whole = [torch.cat([value.flatten() for value in gradients.values()]) for gradients in (ours, theirs)]
    assert difference(*whole) < (5e-6 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_both_forms_train_alike(method: Any) -> None:
    losses = []
    for fused in (False, True):
        unet, parameters = prepared(small_unet, method=method, fused_lora=fused)
        optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
        curve = []
        for _ in range(6):
            loss = (forward(unet) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < 0.99 * losses[0][0]


def test_a_state_of_one_form_loads_into_the_other() -> None:
    forms = [prepared(small_unet, method="lora", fused_lora=fused)[0] for fused in (False, True)]
    for source, target in (forms, forms[::-1]):
        state = {name: value + 0.5 for name, value in lora_state_dict(source).items()}
        load_lora_state_dict(target, state)
        assert all(torch.equal(value, state[name]) for name, value in lora_state_dict(target).items())


def test_both_forms_start_alike() -> None:
    states = []
    for fused in (False, True):
        unet = small_unet()
        layers = add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=7, fused=fused)
        states.append((layers, lora_state_dict(unet)))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())


def test_the_fused_layer_stands_in_for_the_one_it_replaces() -> None:
    unet, parameters = prepared(small_unet, method="lora", fused_lora=True)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(layer, FusedLoraLinear)
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 64, None)
    assert [p.requires_grad for p in (layer.lora_A, layer.lora_B, layer.base_layer.weight)] == [True, True, False]
    assert layer.scaling == 1.5
    assert sum(p.requires_grad for p in unet.parameters()) == len(parameters)


@pytest.mark.parametrize("targets", [["to_nothing"], ["conv1"], ["to_out"]])
def test_what_the_fused_form_cannot_adapt_is_named(targets: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(small_unet(), rank=4, lora_alpha=4, target_modules=targets, seed=0, fused=True)
    assert caught.value.where == "train.target_modules"
    assert str(targets) in caught.value.why


def test_bitsandbytes_layers_are_refused_by_the_fused_form() -> None:
    unet = small_unet()
    quantize_nf4(unet, compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match="adapter") as caught:
        add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=0, fused=True)
    assert "Linear4bit" in caught.value.why


@pytest.mark.parametrize("dtype", DTYPES)
def test_method_full_trains_all_in_the_dtype(dtype: torch.dtype) -> None:
    unet = small_unet()
    parameters = prepare_unet(
        unet, method="full", dtype=dtype, rank=1, lora_alpha=1, target_modules=TARGETS, seed=0
    )  # fmt: skip
    assert {p.dtype for p in parameters.values()} == {dtype}
    assert all(p.requires_grad for p in unet.parameters())
    assert all(name in dict(unet.named_parameters()) for name in parameters)
