"""Names of SDXL's layers in the files people use: diffusers', kohya's with sgm or diffusers block names, dotted sgm.

sgm names are those of the original training code; kohya writes them with ``_`` in place of ``.``, which cannot be
undone by rule, so the way back is a table over all layers of a UNet. Blocks are counted from the UNet's configuration.

Facts: kohya-ss/sd-scripts library/sdxl_original_unet.py and networks/lora.py; diffusers
loaders/lora_conversion_utils.py; ComfyUI comfy/utils.py (unet_to_diffusers) and comfy/lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from craft_fast.sdxl import published
from craft_fast.sdxl.weights import expected_shapes

UNET, TE1, TE2 = "lora_unet_", "lora_te1_", "lora_te2_"
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Layers:
    """The layers of one SDXL that a LoRA may adapt: linear ones and convolutions.

    Attributes:
        shapes: ``<component>.<module>``, as in ``Adapter.layers``, to the weight's shape, [O, I] or [O, I, kh, kw].
        kohya: the same to kohya's name with sgm blocks, such as ``lora_unet_input_blocks_4_1_proj_in``.
        by_kohya: names that kohya's trainers write, sgm or diffusers blocks, and back to the first.
        by_dotted: dotted sgm names (``input_blocks.4.1.proj_in``) of the UNet, and back.
        sized: names whose shape is known; of a UNet that is not of SDXL's width, the text encoders' are not.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kohya: Mapping[str, str]
    by_kohya: Mapping[str, str]
    by_dotted: Mapping[str, str]
    sized: frozenset[str]


def layers(unet_config: Mapping[str, Any] | None = None) -> Layers:
    """The layers of an SDXL with this UNet; the text encoders are SDXL's own.

    Args:
        unet_config: of diffusers; None: SDXL's as published.
    """
    return _layers(json.dumps(dict(unet_config or published.UNET), sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _layers(config_json: str) -> Layers:
    config: dict[str, Any] = json.loads(config_json)
    shapes = {f"unet.{name}": shape for name, shape in _adaptable(expected_shapes("unet", config))}
    for part, published_config in (
        ("text_encoder", published.TEXT_ENCODER),
        ("text_encoder_2", published.TEXT_ENCODER_2),
    ):
        for name, shape in _adaptable(expected_shapes(part, published_config)):
            # transformers 5.6 took the wrapper "text_model." off CLIPTextModel; LoRA files keep it.
            inner = name.removeprefix("text_model.")
            if inner.startswith("encoder."):
                shapes[f"{part}.text_model.{inner}"] = shape
            elif inner == "text_projection":
                shapes[f"{part}.{inner}"] = shape
    kohya = {name: to_kohya(name, config) for name in shapes}
    diffusers_blocks = {_kohya_as_diffusers(name): name for name in shapes}
    dotted = {to_sgm(name.removeprefix("unet."), config): name for name in shapes if name.startswith("unet.")}
    by_kohya = {**diffusers_blocks, **{key: name for name, key in kohya.items()}}
    whole = config.get("cross_attention_dim") == published.UNET["cross_attention_dim"]
    sized = frozenset(name for name in shapes if whole or name.startswith("unet."))
    return Layers(shapes, kohya, by_kohya, dotted, sized)


def _adaptable(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings." not in name:
            yield name.removesuffix(".weight"), shape


def to_kohya(name: str, unet_config: Mapping[str, Any] | None = None) -> str:
    """Kohya's name of a layer, with sgm blocks.

    Args:
        name: ``<component>.<module>`` in diffusers' naming.
        unet_config: of diffusers; None: SDXL's as published.

    Raises:
        KeyError: no layer of such an SDXL.
    """
    component, _, module = name.partition(".")
    if component == "unet":
        return UNET + to_sgm(module, unet_config or published.UNET).replace(".", "_")
    return _kohya_as_diffusers(name)


def to_diffusers(key: str, unet_config: Mapping[str, Any] | None = None) -> str:
    """The layer, ``<component>.<module>`` in diffusers' naming, of a name that a kohya trainer gives it.

    Args:
        key: with sgm or diffusers blocks, without the matrix's ending, such as ``lora_unet_input_blocks_4_1_proj_in``.
        unet_config: of diffusers; None: SDXL's as published.

    Raises:
        KeyError: no layer of such an SDXL.
    """
    return layers(unet_config).by_kohya[key]


def _kohya_as_diffusers(name: str) -> str:
    component, _, module = name.partition(".")
    prefix = {"unet": UNET, "text_encoder": TE1, "text_encoder_2": TE2}[component]
    return prefix + module.replace(".", "_")


def to_sgm(module: str, unet_config: Mapping[str, Any]) -> str:
    """The sgm name of a UNet's module, such as ``input_blocks.4.1.proj_in``.

    Args:
        module: in diffusers' naming.
        unet_config: ``layers_per_block`` and the blocks' types decide the numbers.

    Raises:
        KeyError: no module of such a UNet.
    """
    if module in _OUTER:
        return _OUTER[module]
    for start, sgm in _OUTER.items():
        if module.startswith(start + "."):
            return f"{sgm}.{_inner(module.removeprefix(start + '.'), 'resnets' in start)}"
    found = _BLOCK.fullmatch(module)
    if found is None:
        raise KeyError(module)
    side, block, kind, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    size = int(unet_config["layers_per_block"]) + 1
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{size * (block + 1)}.0.op"
        return f"input_blocks.{1 + size * block + at}.{_slot(kind)}.{_inner(rest, kind == 'resnets')}"
    if kind == "upsamplers":
        slot = 2 if "CrossAttn" in unet_config["up_block_types"][block] else 1
        return f"output_blocks.{size * block + size - 1}.{slot}.{rest}"
    return f"output_blocks.{size * block + at}.{_slot(kind)}.{_inner(rest, kind == 'resnets')}"


def _slot(kind: str) -> int:
    return {"resnets": 0, "attentions": 1}[kind]


def _inner(rest: str, resnet: bool) -> str:
    return _RESNET[rest] if resnet else rest
