"""GEGLU at the shapes of SDXL's feed-forward layers; Liger's kernel has the tanh approximation of gelu.

Bytes for each element of the result: forward reads two and writes one, backward reads three and writes two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_bench.cases.common import Random, compile_static, dtype_of, in_float64, makers
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_kernels.geglu import geglu
from craft_kernels.geglu.naive import geglu as naive

LIGER = "liger"
SHAPES = ((4096, 2560), (1024, 5120))  # tokens of one image, width of the result
BATCHES = (1, 4)
# How far the tanh approximation is from the exact gelu, relative to the whole tensor.
LIGER_TOLERANCE = 1e-2


def cases() -> list[Case]:
    """Both shapes for one image and four, in bfloat16."""
    return [_case(batch, *shape) for batch in BATCHES for shape in SHAPES]


def _case(batch: int, tokens: int, width: int) -> Case:
    dtype = "bfloat16"
    size = batch * tokens * width
    each = dtype_of(dtype).itemsize
    return Case(
        op="geglu",
        name=f"B={batch} {tokens}x{2 * width}",
        dtype=dtype,
        size=size,
        traffic={"forward": 3 * size * each, "backward": 5 * size * each, "both": 8 * size * each},
        memory=size * 120,
        build=lambda device: _build((batch, tokens, 2 * width), dtype_of(dtype), device),
        rivals=(EAGER, COMPILE, LIGER),
        quick=batch == 1,
        unit="elements of the result",
    )


def _build(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Random(device)
    x = draw.normal(shape, dtype).requires_grad_()
    grad = draw.normal((*shape[:-1], shape[-1] // 2), dtype)

    def form(impl: str) -> Form:
        if impl == TRITON:
            return Form(lambda: (geglu(x, impl="triton"),), (x,), (grad,))
        if impl == LIGER:
            from liger_kernel.ops.geglu import LigerGELUMulFunction

            def forward() -> tuple[Tensor]:
                hidden, gate = x.chunk(2, dim=-1)
                return (LigerGELUMulFunction.apply(gate, hidden),)

            return Form(forward, (x,), (grad,), tolerance=LIGER_TOLERANCE)
        run = compile_static(naive) if impl == COMPILE else naive
        return Form(lambda: (run(x),), (x,), (grad,))

    def exact() -> Result:
        exact_x = in_float64(x)
        y = naive(exact_x)
        return (y.detach(),), torch.autograd.grad((y,), (exact_x,), (grad.double(),))

    return Problem(exact, makers(form, EAGER, COMPILE, LIGER, TRITON))
