"""LoRAs of random values for tests: single layers, and one for every layer of a small model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from craft_fast import rng
from craft_fast.lora.adapter import Adapter, LoraLayer

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def layer(
    shape: tuple[int, ...], rank: int, seed: int = 0, *, alpha: float | None = 4.0, dtype: torch.dtype = torch.float32
) -> LoraLayer:
    """A layer for a weight of ``shape``, [O, I] or [O, I, kh, kw]."""
    kernel = (1,) * len(shape[2:])
    down = rng.normal((rank, *shape[1:]), seed) * 0.1
    up = rng.normal((shape[0], rank, *kernel), seed + 1) * 0.1
    return LoraLayer(down.to(dtype), up.to(dtype), alpha)


def everywhere(shapes: Shapes, *, rank: int = 3, alpha: float | None = 1.5, seed: int = 0) -> Adapter:
    """A LoRA of every linear layer and convolution; names as in ``Adapter.layers``.

    Args:
        shapes: by part, plain name to shape of the model's weights.
        rank: of all layers.
        alpha: of all layers.
        seed: of the values.
    """
    layers = {}
    for part, weights in shapes.items():
        for name, shape in weights.items():
            module = name.removesuffix(".weight")
            if module != name and len(shape) in (2, 4) and "_embedding" not in name.removeprefix("time_embedding"):
                wrapped = part != "unet" and not module.startswith("text_projection")
                seed += 2
                full = f"{part}.text_model.{module}" if wrapped else f"{part}.{module}"
                layers[full] = layer(shape, rank, seed, alpha=alpha)
    return Adapter(layers)
