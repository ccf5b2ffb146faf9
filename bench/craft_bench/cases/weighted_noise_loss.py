"""The weighted noise-prediction loss over batch sizes.

Bytes, as training uses it: forward reads the prediction and the target and writes what backward needs (the error, or
as much by another name); backward reads that and writes the gradient. Five accesses an element together. (One pass
that knew the loss's own gradient beforehand could do with three.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_bench.cases.common import Random, compile_static, dtype_of, in_float64, makers
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_kernels.weighted_noise_loss import weighted_noise_loss
from craft_kernels.weighted_noise_loss.naive import weighted_noise_loss as naive

SAMPLE = (4, 128, 128)  # SDXL's latents at 1024 px: 65,536 elements
BATCHES = (1, 8, 64, 512, 2048, 4096)  # 2048 are 2^27 elements
QUICK = (1, 8, 64)
TIMESTEPS = 1000


def cases() -> list[Case]:
    """Every batch size in bfloat16 and float32."""
    return [_case(batch, dtype) for dtype in ("bfloat16", "float32") for batch in BATCHES]


def _case(batch: int, dtype: str) -> Case:
    size = batch * SAMPLE[0] * SAMPLE[1] * SAMPLE[2]
    bytes_each = dtype_of(dtype).itemsize
    # A compilation takes seconds: in float32, which trains nothing here, only where small and large sizes are told.
    compiled = dtype == "bfloat16" or batch in (8, 2048)
    return Case(
        op="weighted_noise_loss",
        name=f"B={batch} 4x128x128",
        dtype=dtype,
        size=size,
        traffic={"forward": 3 * size * bytes_each, "backward": 2 * size * bytes_each, "both": 5 * size * bytes_each},
        memory=size * 60,  # the exact result: float64 inputs, error, square and gradients
        build=lambda device: _build(batch, dtype_of(dtype), device),
        rivals=(EAGER, COMPILE) if compiled else (EAGER,),
        quick=batch in QUICK,
    )


def _build(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = Random(device)
    shape = (batch, *SAMPLE)
    pred, target = draw.normal(shape, dtype).requires_grad_(), draw.normal(shape, dtype)
    # Positive, as training weights are by default: with both signs the sum may cancel to anything.
    weight, table = draw.uniform((batch,), 0.2, 2.0), draw.uniform((TIMESTEPS,), 0.2, 1.0)
    timesteps = draw.integers((batch,), TIMESTEPS)
    grad = torch.ones((), device=device)

    def form(impl: str) -> Form:
        if impl == TRITON:

            def forward() -> tuple[Tensor, Tensor]:
                return weighted_noise_loss(
                    pred, target, weight, timesteps=timesteps, timestep_weight=table, impl="triton"
                )
        else:
            run = compile_static(naive) if impl == COMPILE else naive

            def forward() -> tuple[Tensor, Tensor]:
                return run(pred, target, weight, timesteps, table)

        return Form(forward, (pred,), (grad,))

    def exact() -> Result:
        exact_pred = in_float64(pred)
        loss, errors = naive(exact_pred, target.double(), weight.double(), timesteps, table.double())
        return (loss.detach(), errors), torch.autograd.grad(loss, (exact_pred,))

    return Problem(exact, makers(form, EAGER, COMPILE, TRITON))
