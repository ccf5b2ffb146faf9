"""Noised latents and target over batch sizes, forward alone: latents are data, no gradient flows into them.

Bytes: the latents are read, noised latents and target are written; the noise is made on the way. ``eager`` and
``compile`` are the naive form, which makes the very same noise out of integer arithmetic and so is slow by nature;
``randn`` is what one would write instead, with torch's own generator, and the figure is judged by that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_bench.cases.common import Random, compile_static, dtype_of, makers
from craft_bench.cases.weighted_noise_loss import BATCHES, QUICK, SAMPLE, TIMESTEPS
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_kernels.noise_and_target import PredictionType, counter_noise, noise_and_target
from craft_kernels.noise_and_target.naive import noise_and_target as naive

SEED, STEP = 1234567, 100
RANDN = "randn"


def cases() -> list[Case]:
    """Every batch size in bfloat16 and float32, epsilon; one size with v-prediction."""
    plain = [_case(batch, dtype, v=False) for dtype in ("bfloat16", "float32") for batch in BATCHES]
    return [*plain, _case(64, "bfloat16", v=True)]


def _case(batch: int, dtype: str, *, v: bool) -> Case:
    size = batch * SAMPLE[0] * SAMPLE[1] * SAMPLE[2]
    # A compilation of Philox's ten rounds takes long: where a figure needs none, there is none.
    compiled = batch == (8 if dtype == "float32" else 64) and not v
    return Case(
        op="noise_and_target",
        name=f"B={batch} 4x128x128" + (" v" if v else ""),
        dtype=dtype,
        size=size,
        traffic={"forward": 3 * size * dtype_of(dtype).itemsize},
        memory=size * 70,  # four int64 words for four elements and what the rounds make of them
        build=lambda device: _build(batch, dtype_of(dtype), device, v=v),
        rivals=(EAGER, *((COMPILE,) if compiled else ()), RANDN),
        quick=batch in QUICK[:2] and not v,
    )


def _build(batch: int, dtype: torch.dtype, device: torch.device, *, v: bool) -> Problem:
    draw = Random(device)
    latents = draw.normal((batch, *SAMPLE), dtype)
    ids = draw.integers((batch,), 2**40)
    alphas_cumprod = torch.linspace(0.999, 0.005, TIMESTEPS, device=device)
    timesteps = draw.integers((batch,), TIMESTEPS)
    kind: PredictionType = "v_prediction" if v else "epsilon"

    def formula(noise: Tensor) -> tuple[Tensor, Tensor]:
        a_t = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, sigma = a_t.sqrt().to(dtype), (1 - a_t).sqrt().to(dtype)
        return signal * latents + sigma * noise, signal * noise - sigma * latents if v else noise

    def form(impl: str) -> Form:
        if impl == TRITON:
            return Form(
                lambda: noise_and_target(
                    latents, ids, alphas_cumprod, timesteps, seed=SEED, step=STEP, prediction_type=kind, impl="triton"
                )
            )
        if impl == RANDN:
            # Its numbers are others; what can be held against the exact result is its formula. It rounds the roots.
            return Form(
                lambda: formula(torch.randn_like(latents)),
                result=lambda: formula(counter_noise(ids, SAMPLE, seed=SEED, step=STEP).to(dtype)),
            )
        run = compile_static(naive) if impl == COMPILE else naive
        return Form(lambda: run(latents, ids, alphas_cumprod, timesteps, SEED, STEP, kind))

    def exact() -> Result:
        return naive(latents.double(), ids, alphas_cumprod, timesteps, SEED, STEP, kind), ()

    return Problem(exact, makers(form, EAGER, COMPILE, RANDN, TRITON))
