"""Blocks that keep less for backward: the same bits as diffusers' own, and fewer bytes."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from craft_fast.qlora.lean import LeanConv2d, lean_activations
from craft_fast.qlora.saved import saved_bytes_by_unit, saved_tensors
from tests.unit.small_unets import difference, forward, loss_and_gradients, prepared, shipped_unet, small_unet

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lean_blocks_give_the_same_bits_and_keep_less(method: str, dtype: torch.dtype) -> None:
    results, sizes = [], []
    for lean in (False, True):
        unet, parameters = prepared(shipped_unet, dtype=dtype, method=method, fused_lora=True)
        names = list(unet.state_dict())
        if lean:
            assert lean_activations(unet) > 30
            assert lean_activations(unet) == 0
            assert list(unet.state_dict()) == names
        results.append(loss_and_gradients(unet, parameters, dtype=dtype))
        sizes.append(sum(saved_bytes_by_unit(unet, lambda unet=unet: forward(unet, dtype=dtype)).values()))  # type: ignore[misc]
    (expected, plain), (found, lean_gradients) = results
    assert torch.equal(found, expected)
    assert all(torch.equal(value, plain[name]) for name, value in lean_gradients.items())
    assert sizes[1] < (0.75 if method == "lora" else 0.85) * sizes[0], sizes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "autocast", "triton"])
def test_lean_blocks_in_other_modes_agree(mode: str, channels_last: bool) -> None:
    if mode == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    results = []
    for lean in (False, True):
        method = "qlora" if mode == "nf4" else "lora"
        unet, parameters = prepared(small_unet, method=method, nf4_convs=mode == "nf4", fused_lora=True)
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        if lean:
            lean_activations(unet, impl="triton" if mode == "triton" else "torch")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            results.append(loss_and_gradients(unet, parameters))
    (expected, plain), (found, gradients) = results
    assert float(found) == pytest.approx(float(expected), rel=1e-2 if mode == "autocast" else 1e-5)
    for name, gradient in gradients.items():
        assert difference(gradient, plain[name]) < (0.1 if mode == "autocast" else 1e-4), name


def test_a_lean_resnet_block_keeps_two_images() -> None:
    """Its input, and the sum of convolution and time embedding; diffusers' keeps six."""
    kinds = []
    for lean in (False, True):
        unet, _ = prepared(small_unet, method="lora", fused_lora=True)
        if lean:
            lean_activations(unet)
        # The last one of all: everything before it asks for gradients.
        name = "up_blocks.1.resnets.1"
        found = saved_tensors(unet, lambda unet=unet: forward(unet))  # type: ignore[misc]
        kinds.append([one.shape for one in found if one.unit == name and len(one.shape) == 4])
    assert sum(shape[2:] == (16, 16) for shape in kinds[0]) == 6
    assert kinds[1] == [(2, 64, 16, 16), (2, 32, 16, 16)]


def test_a_trained_lean_convolution_still_learns() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight, conv.bias))
    conv.__class__ = LeanConv2d
    found = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight, conv.bias))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
