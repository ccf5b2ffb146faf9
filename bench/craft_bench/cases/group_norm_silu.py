"""Group norm with SiLU at the shapes of SDXL's resnets, channels_last; the norm is frozen, as under a LoRA.

Bytes: forward reads x and writes y; backward reads x and the gradient of y and writes that of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_bench.cases.common import Random, compile_static, dtype_of, in_float64, makers
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_kernels.group_norm_silu import group_norm_silu
from craft_kernels.group_norm_silu.naive import group_norm_silu as naive

GROUPS, EPS = 32, 1e-5
# Images, channels and sides at 1024 px; 960, 1920 and 2560 channels come of the skip connections.
SHAPES = ((1, 320, 128), (1, 640, 64), (1, 1280, 32), (4, 320, 128), (4, 1920, 64), (4, 2560, 32))
QUICK = ((1, 640, 64), (1, 1280, 32))


def cases() -> list[Case]:
    """One image at the levels' own widths, four images at the smallest and at the widest, in bfloat16."""
    return [_case(*shape) for shape in SHAPES]


def _case(batch: int, channels: int, side: int) -> Case:
    dtype = "bfloat16"
    size = batch * channels * side * side
    each = dtype_of(dtype).itemsize
    return Case(
        op="group_norm_silu",
        name=f"{batch}x{channels}x{side}x{side}",
        dtype=dtype,
        size=size,
        traffic={"forward": 2 * size * each, "backward": 3 * size * each, "both": 5 * size * each},
        memory=size * 100,
        build=lambda device: _build((batch, channels, side, side), dtype_of(dtype), device),
        quick=(batch, channels, side) in QUICK,
    )


def _build(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Random(device)

    def image(scale: float = 1.0) -> Tensor:
        return draw.normal(shape, dtype, scale).contiguous(memory_format=torch.channels_last)

    x, grad = image(2.0).requires_grad_(), image()
    weight = draw.uniform((shape[1],), 0.5, 1.5).to(dtype)
    bias = draw.normal((shape[1],), dtype, 0.5)

    def form(impl: str) -> Form:
        if impl == TRITON:
            return Form(
                lambda: (group_norm_silu(x, weight, bias, num_groups=GROUPS, eps=EPS, impl="triton"),), (x,), (grad,)
            )
        run = compile_static(naive) if impl == COMPILE else naive
        return Form(lambda: (run(x, weight, bias, GROUPS, EPS),), (x,), (grad,))

    def exact() -> Result:
        exact_x = in_float64(x)
        y = naive(exact_x, weight.double(), bias.double(), GROUPS, EPS)
        return (y.detach(),), torch.autograd.grad((y,), (exact_x,), (grad.double(),))

    return Problem(exact, makers(form, EAGER, COMPILE, TRITON))
