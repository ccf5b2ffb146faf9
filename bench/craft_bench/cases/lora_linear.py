"""A frozen linear layer with a LoRA at SDXL's attention shapes: against PEFT's layer, dense and NF4.

Everything in bfloat16, and then with the float32 adapters that training keeps: both sides cast then, PEFT to float32
and x with them. Bytes are those of the inputs, the frozen weight (again in backward) and the outputs; at these shapes
the matrix products, not the bytes, set the floor. ``torch`` is our form as ``auto`` takes it, ``triton`` has both
low-rank products in one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from craft_bench.cases.common import Random, compile_static, dtype_of, in_float64, makers
from craft_bench.cases.nf4_dequantize import bitsandbytes_state, packed_bytes, random_nf4
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_fast.quiet import import_bitsandbytes
from craft_kernels.dispatch import Impl
from craft_kernels.lora_linear import lora_linear
from craft_kernels.lora_linear.naive import lora_linear as naive
from craft_kernels.nf4_dequantize import NF4Weight

PEFT, TORCH = "peft", "torch"
SHAPES = ((4096, 640), (1024, 1280))  # tokens of one image, width
RANKS = (16, 64)
SCALING = 1.0


def cases() -> list[Case]:
    """Both shapes and ranks, dense and NF4, in bfloat16; then with the float32 adapters that training keeps."""
    return [
        _case(*shape, rank, nf4=nf4, exact_adapters=exact)
        for exact in (False, True)
        for nf4 in (False, True)
        for rank in RANKS
        for shape in SHAPES
    ]


def _case(tokens: int, width: int, rank: int, *, nf4: bool, exact_adapters: bool) -> Case:
    dtype = "bfloat16"
    each = dtype_of(dtype).itemsize
    rows, low = tokens * width * each, 2 * rank * width * (4 if exact_adapters else each)
    frozen = packed_bytes(width * width) if nf4 else width * width * each
    forward = rows + frozen + low + rows
    backward = 2 * rows + frozen + low + rows + low
    return Case(
        op="lora_linear",
        name=f"{tokens}x{width} r={rank} {'nf4' if nf4 else 'dense'}{', float32 adapters' if exact_adapters else ''}",
        dtype=dtype,
        size=tokens * width,
        traffic={"forward": forward, "backward": backward, "both": forward + backward},
        memory=(tokens * width + width * width) * 100,
        build=lambda device: _build(
            tokens,
            width,
            rank,
            dtype_of(dtype),
            device,
            nf4=nf4,
            adapter_dtype=torch.float32 if exact_adapters else dtype_of(dtype),
        ),
        rivals=(EAGER, PEFT) if nf4 or rank != RANKS[0] or exact_adapters else (EAGER, COMPILE, PEFT),
        ours=(TORCH, TRITON),
        quick=rank == 16 and not exact_adapters,
        unit="elements of x",
    )


def _build(
    tokens: int, width: int, rank: int, dtype: torch.dtype, device: torch.device, *, nf4: bool,
    adapter_dtype: torch.dtype,
) -> Problem:  # fmt: skip
    draw = Random(device)
    x = draw.normal((1, tokens, width), dtype).requires_grad_()
    dense = draw.normal((width, width), dtype, width**-0.5)
    weight: Tensor | NF4Weight = random_nf4((width, width), dtype, device) if nf4 else dense
    lora_a = draw.normal((rank, width), adapter_dtype, width**-0.5).requires_grad_()
    lora_b = draw.normal((width, rank), adapter_dtype, 0.1).requires_grad_()
    grad = draw.normal((1, tokens, width), dtype)

    def form(impl: str) -> Form:
        if impl == PEFT:
            layer = _peft_layer(weight, lora_a, lora_b)
            parameters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            return Form(lambda: (layer(x),), (x, *parameters), (grad,))
        if impl in (EAGER, COMPILE):
            run = compile_static(naive) if impl == COMPILE else naive
            return Form(
                lambda: (run(x, weight, lora_a.to(dtype), lora_b.to(dtype), SCALING, None),),
                (x, lora_a, lora_b),
                (grad,),
            )
        ours: Impl = "triton" if impl == TRITON else "torch"
        return Form(
            lambda: (lora_linear(x, weight, lora_a, lora_b, scaling=SCALING, impl=ours),), (x, lora_a, lora_b), (grad,)
        )

    def exact() -> Result:
        inputs = [in_float64(tensor) for tensor in (x, lora_a, lora_b)]
        # The weight that all forms multiply with is the one in the dtype of x.
        full = weight.dequantize(dtype, impl="torch").double() if isinstance(weight, NF4Weight) else weight.double()
        out = naive(inputs[0], full, inputs[1], inputs[2], SCALING, None)
        return (out.detach(),), torch.autograd.grad((out,), inputs, (grad.double(),))

    return Problem(exact, makers(form, EAGER, COMPILE, PEFT, TORCH, TRITON))


def _peft_layer(weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor) -> Any:
    """PEFT's layer around a frozen one, with our weights in it."""
    bnb = import_bitsandbytes()  # before PEFT, which would import it with its request to a hub
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    rank, width = lora_a.shape
    config = LoraConfig(r=rank, lora_alpha=rank)
    with torch.device(lora_a.device):
        if isinstance(weight, NF4Weight):
            from peft.tuners.lora.bnb import Linear4bit

            base: Any = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
            state = bitsandbytes_state(weight)
            base.weight = bnb.nn.Params4bit(
                weight.packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=base
            )
            base.quant_state = state
            layer: Any = Linear4bit(base, "default", config=config, r=rank, lora_alpha=rank)
        else:
            base = nn.Linear(width, width, bias=False, dtype=weight.dtype)
            base.weight = nn.Parameter(weight, requires_grad=False)
            layer = Linear(base, "default", config=config, r=rank, lora_alpha=rank)
    layer.lora_A["default"].weight = nn.Parameter(lora_a.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(lora_b.detach().clone())
    return layer.train()
