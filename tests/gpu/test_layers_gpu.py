"""The UNet's own layers on a GPU: near the CPU's results, within their bytes, no waiting, inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_fast.qlora.adapt import repeatable_kernels
from craft_fast.qlora.frozen import dequantize, frozen_conv2d
from craft_fast.qlora.lean import lean_activations
from craft_fast.qlora.nf4 import quantize_nf4, quantized_bytes
from craft_fast.qlora.nf4_layers import NF4Conv2d
from craft_fast.qlora.recompute import recompute, unit_names
from craft_fast.sdxl.attention import set_attention
from craft_fast.sdxl.load import free_memory
from craft_fast.sdxl.published import random_unet
from tests.unit.small_unets import (
    difference,
    forward,
    inputs,
    loss_and_gradients,
    prepared,
    shipped_unet,
    small_unet,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FORMS: dict[str, dict[str, Any]] = {
    "peft": {"method": "lora"},
    "peft-nf4": {"method": "qlora"},
    "peft-nf4-convs": {"method": "qlora", "nf4_convs": True},
    "fused": {"method": "lora", "fused_lora": True},
    "fused-nf4": {"method": "qlora", "fused_lora": True},
    "fused-nf4-convs": {"method": "qlora", "fused_lora": True, "nf4_convs": True},
}


def built(form: str, make: Callable[[], Any] = small_unet, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return prepared(make, dtype=dtype, device=CUDA, **FORMS[form])


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """TF32 off, so that float32 is compared with float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("make", [small_unet, shipped_unet])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_the_cpu(form: str, make: Callable[[], Any]) -> None:
    """With rows of 32, 48 and 96 too; quantised on the GPU, whose scales may differ in the last bit."""
    expected, theirs = loss_and_gradients(*prepared(make, **FORMS[form]))
    found, ours = loss_and_gradients(*built(form, make), device=CUDA)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    whole = [torch.cat([t.flatten().cpu() for t in gradients.values()]) for gradients in (ours, theirs)]
    assert difference(*whole) < 5e-3


@pytest.mark.parametrize("kind", ["", "-nf4", "-nf4-convs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_adapter_agree(kind: str, dtype: torch.dtype) -> None:
    results = [
        loss_and_gradients(*built(form + kind, dtype=dtype), dtype=dtype, device=CUDA) for form in ("peft", "fused")
    ]
    (expected, theirs), (found, ours) = results
    assert float(found) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 0.02)
    whole = [torch.cat([t.flatten() for t in gradients.values()]) for gradients in (ours, theirs)]
    assert difference(*whole) < (1e-4 if dtype == torch.float32 else 0.08)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "outer", "stride", "size"), [(64, 96, 1, 3), (320, 320, 2, 3), (96, 64, 1, 1)])
def test_a_convolution_in_nf4_is_its_dequantised_self(
    inner: int, outer: int, stride: int, size: int, dtype: torch.dtype, channels_last: bool
) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2).to(CUDA, dtype).requires_grad_(False)
    own = NF4Conv2d(base, compute_dtype=dtype)
    base.weight.copy_(dequantize(own.nf4, dtype).permute(0, 3, 1, 2))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, inner, 24, 24, device=CUDA, dtype=dtype).contiguous(memory_format=layout)
    results = []
    for layer in (own, base):
        given = x.detach().requires_grad_()
        out = layer(given)
        (grad,) = torch.autograd.grad(out, given, torch.ones_like(out).cumsum(1).cos())
        results.append((out.detach(), grad))
    for found, expected in zip(*results, strict=True):
        assert difference(found, expected) < (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
        if channels_last and size == 3:
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_frozen_convolution_keeps_no_input_and_lays_out_no_gradient_anew() -> None:
    conv = nn.Conv2d(320, 320, 3, padding=1).to(CUDA, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    conv.requires_grad_(False)
    x = torch.randn(1, 320, 128, 128, device=CUDA, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    kinds = []
    for run in (
        lambda t: frozen_conv2d(t, conv.weight, conv.bias, padding=(1, 1)),
        lambda t: conv(t),
    ):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = run(x * 1.0)  # an intermediate result, which only the graph may keep
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        kinds.append((kept, out.detach(), grad))
        del out
    assert kinds[0][0] < x.nbytes / 4
    assert kinds[1][0] >= x.nbytes
    assert all(difference(a, b) < 1e-2 for a, b in zip(kinds[0][1:], kinds[1][1:], strict=True))
    assert kinds[0][2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", ["fused", "fused-nf4", "fused-nf4-convs"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_waits_for_the_device(form: str, recomputed: bool) -> None:
    unet, parameters = built(form, dtype=torch.bfloat16)
    lean_activations(unet)
    recompute(unet, [] if recomputed else unit_names(unet))
    given = inputs(unet, dtype=torch.bfloat16, device=CUDA)
    unet(**given).sample.float().square().mean().backward()  # Triton compiles, cuDNN and cuBLAS start
    with no_waiting():
        unet(**given).sample.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())


@pytest.mark.parametrize("form", ["fused", "fused-nf4-convs"])
@pytest.mark.parametrize("share", [0, 2, 1])
def test_a_cuda_graph_holds_forward_recomputation_and_backward(form: str, share: int) -> None:
    """None, every second and all units kept; new inputs in the same places give the eager loss and gradients."""
    unet, parameters = built(form, dtype=torch.bfloat16)
    lean_activations(unet)
    recompute(unet, unit_names(unet)[::share] if share else [])
    given = inputs(unet, dtype=torch.bfloat16, device=CUDA)

    def step() -> Tensor:
        for p in parameters.values():
            p.grad = None if p.grad is None else p.grad.zero_()
        loss: Tensor = unet(**given).sample.float().square().mean()
        loss.backward()
        return loss.detach()

    with repeatable_kernels(CUDA):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        given["sample"].mul_(0.7)
        given["timestep"].add_(13)
        graph.replay()
        found = [loss.clone(), *(p.grad.clone() for p in parameters.values())]
        expected = [step(), *(p.grad.clone() for p in parameters.values())]
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-3)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


@pytest.mark.parametrize("form", ["peft-nf4", "fused", "fused-nf4-convs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_gives_the_same_bits(form: str, dtype: torch.dtype) -> None:
    unet, parameters = built(form, dtype=dtype)
    with repeatable_kernels(CUDA):
        loss_and_gradients(unet, parameters, dtype=dtype, device=CUDA)
        expected, theirs = loss_and_gradients(unet, parameters, dtype=dtype, device=CUDA)
        for kept in ([], unit_names(unet)[::2]):
            recompute(unet, kept)
            found, ours = loss_and_gradients(unet, parameters, dtype=dtype, device=CUDA)
            assert torch.equal(found, expected)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_blocks_give_the_same_bits_and_triton_is_near(dtype: torch.dtype) -> None:
    results = []
    for impl in (None, "torch", "triton"):
        unet, parameters = built("fused", dtype=dtype)
        if impl is not None:
            lean_activations(unet, impl=impl)  # type: ignore[arg-type]
        with repeatable_kernels(CUDA):
            loss_and_gradients(unet, parameters, dtype=dtype, device=CUDA)
            results.append(loss_and_gradients(unet, parameters, dtype=dtype, device=CUDA))
    (expected, theirs), (found, ours), (near, other) = results
    # cuDNN may choose another algorithm for our own convolution's backward than for PyTorch's.
    assert torch.equal(found, expected)
    whole = [torch.cat([t.flatten() for t in gradients.values()]) for gradients in (theirs, ours, other)]
    assert difference(whole[1], whole[0]) < (1e-5 if dtype == torch.float32 else 0.03)
    assert float(near) == pytest.approx(float(expected), rel=1e-4 if dtype == torch.float32 else 0.02)
    assert difference(whole[2], whole[0]) < (1e-3 if dtype == torch.float32 else 0.1)


def test_lean_blocks_and_recomputation_lower_the_peak() -> None:
    peaks = []
    for lean, all_again in ((False, False), (True, False), (True, True)):
        unet, parameters = built("fused", shipped_unet, torch.bfloat16)
        if lean:
            lean_activations(unet)
        recompute(unet, [] if all_again else unit_names(unet))
        options: dict[str, Any] = {"batch": 64, "dtype": torch.bfloat16, "device": CUDA}
        loss_and_gradients(unet, parameters, **options)
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(unet, parameters, **options)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[2] < 0.6 * peaks[1]


def test_a_unet_from_the_cpu_never_lies_dense_on_the_gpu() -> None:
    expected, theirs = loss_and_gradients(*built("fused-nf4-convs", shipped_unet), device=CUDA)
    unet = shipped_unet()
    size = quantized_bytes(unet, dtype=torch.float32, convs=True)
    largest = max(p.nbytes for p in unet.parameters())
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize_nf4(unet, compute_dtype=torch.float32, convs=True, own_layers=True, device=CUDA)
    rounding = 512 * len([*unet.parameters(), *unet.buffers()])
    assert torch.cuda.memory_allocated() - before <= size + rounding
    assert torch.cuda.max_memory_allocated() - before <= size + 4 * largest + rounding
    del expected, theirs


@pytest.mark.parametrize(("convs", "promised"), [(False, 1.822e9), (True, 1.328e9)])
def test_full_size_sdxl_takes_its_bytes_and_runs(convs: bool, promised: float) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 10 * 2**30:
        pytest.skip("the dense UNet must fit first")
    free_memory()
    before = torch.cuda.memory_allocated()
    unet = random_unet(device=CUDA, dtype=torch.bfloat16)
    quantize_nf4(unet, compute_dtype=torch.bfloat16, convs=convs, own_layers=True)
    free_memory()
    assert torch.cuda.memory_allocated() - before == pytest.approx(promised, rel=5e-3)
    with torch.no_grad():
        given = {
            "sample": torch.randn(1, 4, 64, 64, device=CUDA, dtype=torch.bfloat16),
            "timestep": torch.tensor([500], device=CUDA),
            "encoder_hidden_states": torch.randn(1, 77, 2048, device=CUDA, dtype=torch.bfloat16),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(1, 1280, device=CUDA, dtype=torch.bfloat16),
                "time_ids": torch.full((1, 6), 512.0, device=CUDA),
            },
        }
        assert unet(**given).sample.isfinite().all()


def test_xformers_where_it_is_installed() -> None:
    pytest.importorskip("xformers")
    results = []
    for kind in ("sdpa", "xformers"):
        unet, parameters = built("fused", dtype=torch.float16)
        assert set_attention(unet, kind) == kind  # type: ignore[arg-type]
        results.append(loss_and_gradients(unet, parameters, dtype=torch.float16, device=CUDA))
    (expected, theirs), (found, ours) = results
    assert float(found) == pytest.approx(float(expected), rel=1e-2)
    whole = [torch.cat([t.flatten() for t in gradients.values()]) for gradients in (ours, theirs)]
    assert difference(*whole) < 0.05


def test_sampling_costs_nothing_with_recomputation() -> None:
    unet, _ = built("fused", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = forward(unet, dtype=torch.bfloat16, device=CUDA)
        recompute(unet, [])
        torch.cuda.reset_peak_memory_stats()
        found = forward(unet, dtype=torch.bfloat16, device=CUDA)
    assert torch.equal(found, expected)
    assert not found.requires_grad
