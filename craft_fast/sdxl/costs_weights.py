"""What the UNet's weights, an adapter, and an optimizer's state take; from the configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from craft_fast.sdxl.costs_ledger import Ledger
from craft_fast.sdxl.costs_setup import Layer, Setup
from craft_fast.sdxl.costs_unet import UnetWalk

Method = Literal["lora", "qlora", "full"]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# Moments of a tensor below this size stay in float32 (bitsandbytes' rule); blocks of this size share a scale.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256


def freeze(config: Mapping[str, Any]) -> str:
    """A configuration as something that can be a key: diffusers' own mappings hold lists."""
    names = (
        "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "in_channels",
        "layers_per_block", "mid_block_type", "out_channels", "projection_class_embeddings_input_dim",
        "transformer_layers_per_block", "up_block_types", "use_linear_projection",
    )  # fmt: skip
    return json.dumps({name: config[name] for name in names if config.get(name) is not None})


@lru_cache(maxsize=8)
def _layers(frozen: str) -> tuple[Layer, ...]:
    config = json.loads(frozen)
    side = 2 ** len(config["block_out_channels"])
    walk = UnetWalk(config, Setup(side, side), Ledger())
    walk.run()
    return tuple(walk.layers.values())


def layers(unet_config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """All layers with weights, in the order of their use."""
    return _layers(freeze(unet_config))


def parameters(unet_config: Mapping[str, Any]) -> int:
    """Number of the UNet's parameters."""
    return sum(layer.parameters for layer in layers(unet_config))


def unet_weight_bytes(
    unet_config: Mapping[str, Any], method: Method, nf4_convs: bool = False, *, dtype_bytes: int = 2
) -> int:
    """Bytes of the UNet's weights as training holds them.

    Args:
        unet_config: the UNet's configuration.
        method: ``qlora``: linear layers in NF4 with nested scales (arXiv 2305.14314).
        nf4_convs: convolutions too, but the first and the last.
        dtype_bytes: of an element of what stays dense.
    """
    from craft_fast.qlora.nf4 import KEPT, nf4_bytes

    total = 0
    for layer in layers(unet_config):
        packed = layer.kind == "linear" or (layer.kind == "conv" and nf4_convs and layer.name not in KEPT)
        if method == "qlora" and packed:
            total += nf4_bytes(layer.weight) + (layer.parameters - layer.weight) * dtype_bytes
        else:
            # A norm has a weight and a bias.
            total += layer.parameters * dtype_bytes
    return total


def adapted_layers(unet_config: Mapping[str, Any], target_modules: Sequence[str]) -> list[Layer]:
    """The linear layers that get an adapter."""
    return [
        layer
        for layer in layers(unet_config)
        if layer.kind == "linear" and any(layer.name == t or layer.name.endswith("." + t) for t in target_modules)
    ]


def lora_parameters(unet_config: Mapping[str, Any], *, rank: int, target_modules: Sequence[str]) -> int:
    """Parameters of the adapter: ``rank (in + out)`` for each layer."""
    return sum(rank * (layer.fan_in + layer.fan_out) for layer in adapted_layers(unet_config, target_modules))


def optimizer_bytes(tensors: Sequence[int]) -> int:
    """State of 8-bit AdamW (arXiv 2110.02861) for tensors of these sizes: two codes an element, two scales a block."""
    total = 0
    for size in tensors:
        blocks = -(-size // _BLOCK_8BIT)
        total += 8 * size if size < _MIN_8BIT else 2 * blocks * _BLOCK_8BIT + 8 * blocks
    return total


def trained_sizes(unet_config: Mapping[str, Any], method: Method, rank: int, targets: Sequence[str]) -> list[int]:
    """Sizes of the trained tensors."""
    if method == "full":
        sizes = []
        for layer in layers(unet_config):
            sizes += [layer.weight] + ([layer.fan_out] if layer.bias else [])
        return sizes
    return [rank * side for layer in adapted_layers(unet_config, targets) for side in (layer.fan_in, layer.fan_out)]
