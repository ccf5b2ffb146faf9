"""A training set of six samples in memory, of one size or of several, and the draws of its steps."""

from __future__ import annotations

from typing import Any

import torch

from craft_fast.losses import Batch, draw_batch
from craft_fast.qlora.inputs import Inputs

CPU = torch.device("cpu")
T = 100
IDS = tuple(f"sample-{i}" for i in range(6))
SIZES = [(8, 8), (4, 12), (8, 8), (12, 4), (4, 12), (8, 8)]


def dataset(*, mixed: bool = False) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    found = {
        "latents": torch.randn(6, 4, 8, 8, generator=draw), "prompt_embeds": torch.randn(4, 32, 64, generator=draw),
        "pooled_prompt_embeds": torch.randn(4, 32, generator=draw), "prompt_index": torch.tensor([0, 1, 2, 0, 1, 2]),
        "empty_index": 3, "weights": torch.rand(6, generator=draw) + 0.5,
    }  # fmt: skip
    return {**found, "latents": tuple(torch.randn(4, h, w, generator=draw) for h, w in SIZES)} if mixed else found


def inputs(dtype: torch.dtype = torch.float32, *, mixed: bool = False) -> Inputs:
    return Inputs(**dataset(mixed=mixed), dtype=dtype, device=CPU)


def batch(step: int = 0, size: int = 5) -> Batch:
    return draw_batch(IDS, seed=1, step=step, timesteps=T, batch_size=size, prompt_dropout=0.4)
