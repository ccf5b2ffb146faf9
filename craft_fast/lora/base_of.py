"""Which base model a LoRA seems to be for, told by the width of what its layers read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from craft_fast.lora.adapter import Adapter

# Width of the text conditioning that a UNet's cross-attention reads (attn2.to_k, attn2.to_v).
_CONTEXTS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "the SDXL refiner",
    2048: "SDXL",
}
_READS = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v")
_OTHERS = {
    "joint_blocks": "Stable Diffusion 3",
    "transformer_blocks_0_attn_add": "Stable Diffusion 3 or FLUX",
    "double_blocks": "FLUX",
    "single_blocks": "FLUX",
    "single_transformer_blocks": "FLUX",
}


def base_of_layers(adapter: Adapter) -> str | None:
    """The base model by its context width; None where no layer reads it, or the width is no known model's."""
    widths = {layer.down.shape[1] for name, layer in adapter.layers.items() if name.endswith(_READS)}
    return _named(widths)


def base_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The same from a file's names and shapes, whatever the naming, also of files that are not read further."""
    flat = {name.replace(".", "_"): shape for name, shape in shapes.items()}
    for mark, base in _OTHERS.items():
        if any(mark in name for name in flat):
            return base
    widths = {
        shape[1]
        for name, shape in flat.items()
        if len(shape) >= 2 and re.search(r"attn2_(processor_)?to_[kv]_", name) and re.search(r"lora_(down|A)_", name)
    }
    return _named(widths)


def _named(widths: set[int]) -> str | None:
    return _CONTEXTS.get(widths.pop()) if len(widths) == 1 else None
