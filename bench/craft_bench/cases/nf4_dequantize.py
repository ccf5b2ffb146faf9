"""NF4 weights with nested scales back to half precision: SDXL's linear layers, and one large enough for bandwidth.

Bytes: half a byte and one scale in 64 read, a number written, for each element.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from craft_bench.cases.common import Random, compile_static, dtype_of, makers
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_fast.quiet import import_bitsandbytes
from craft_kernels.adamw8bit.state import dynamic_map
from craft_kernels.nf4_dequantize import NF4Weight
from craft_kernels.nf4_dequantize.naive import BLOCK, GROUP
from craft_kernels.nf4_dequantize.naive import nf4_dequantize as naive

BITSANDBYTES = "bitsandbytes"
# Out and in features: attention at both widths, text to keys, both halves of a feed-forward layer, and no layer at all.
SHAPES = ((640, 640), (1280, 1280), (1280, 2048), (5120, 640), (10240, 1280), (8192, 8192), (16384, 16384))
QUICK = SHAPES[:3]


def cases() -> list[Case]:
    """Every shape to bfloat16, attention's and the largest one to float16 too."""
    halves = [_case(shape, "bfloat16") for shape in SHAPES]
    return [*halves, _case((1280, 1280), "float16"), _case((8192, 8192), "float16")]


def random_nf4(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> NF4Weight:
    """A weight of random codes in the format that bitsandbytes' double quantisation makes."""
    draw = Random(device, seed)
    size = math.prod(shape)
    blocks = -(-size // BLOCK)
    packed = draw.integers((size // 2, 1), 256).to(torch.uint8)
    return NF4Weight(
        packed,
        draw.integers((blocks,), 256).to(torch.uint8),
        shape,
        dtype,
        draw.uniform((-(-blocks // GROUP),), 0.001, 0.01),
        dynamic_map(signed=True).to(device),
        torch.tensor(0.02, device=device),
    )


def bitsandbytes_state(weight: NF4Weight) -> Any:
    """The ``QuantState`` of the same tensors."""
    functional = import_bitsandbytes().functional
    nested = functional.QuantState(
        absmax=weight.nested_absmax, code=weight.nested_code, blocksize=GROUP, dtype=torch.float32
    )
    code = functional.get_4bit_type("nf4", weight.packed.device)
    return functional.QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=code, blocksize=BLOCK, quant_type="nf4",
        dtype=weight.dtype, offset=weight.offset, state2=nested,
    )  # fmt: skip


def packed_bytes(size: int) -> int:
    """What an NF4 weight of ``size`` elements takes, nested scales included."""
    blocks = -(-size // BLOCK)
    return -(-size // 2) + blocks + 4 * -(-blocks // GROUP)


def _case(shape: tuple[int, int], dtype: str) -> Case:
    size = math.prod(shape)
    return Case(
        op="nf4_dequantize",
        name=f"{shape[0]}x{shape[1]}",
        dtype=dtype,
        size=size,
        traffic={"forward": packed_bytes(size) + size * dtype_of(dtype).itemsize},
        memory=size * 48,  # the naive form looks pairs of levels up by int32 and multiplies in float32
        build=lambda device: _build(shape, dtype_of(dtype), device),
        # A compilation for two of SDXL's shapes: the figures are about bitsandbytes.
        rivals=(EAGER, *((COMPILE,) if shape in QUICK[:2] else ()), BITSANDBYTES),
        quick=shape in QUICK and dtype == "bfloat16",
    )


def _build(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    weight = random_nf4(shape, dtype, device)
    tensors = (
        weight.packed.view(-1), weight.absmax, shape, weight.nested_absmax, weight.nested_code, weight.offset
    )  # fmt: skip

    def form(impl: str) -> Form:
        if impl == TRITON:
            return Form(lambda: (weight.dequantize(impl="triton"),))
        if impl == BITSANDBYTES:
            functional, state = import_bitsandbytes().functional, bitsandbytes_state(weight)
            return Form(lambda: (functional.dequantize_4bit(weight.packed, state),))
        run = compile_static(naive) if impl == COMPILE else naive
        return Form(lambda: (run(*tensors, dtype),))

    def exact() -> Result:
        return (naive(*tensors, torch.float64),), ()

    return Problem(exact, makers(form, EAGER, COMPILE, BITSANDBYTES, TRITON))
