"""Read a LoRA file, whoever wrote it, into layers by diffusers' module names; nothing in it is left out in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.keys import TE1, TE2, UNET, Layers, layers
from craft_fast.sdxl.identify import read_header
from craft_fast.store.safe_load import load_safetensors

Part = Literal["down", "up", "alpha"]
DIFFUSERS_METADATA = "lora_adapter_metadata"
ALPHA_DTYPES = "craft.alpha_dtypes"
"""Header entry: JSON of layer to dtype, where a kohya file's alphas had another dtype than its matrices."""

# Endings of the two matrices: kohya's, PEFT's, and diffusers' before PEFT (loaders/lora_conversion_utils.py).
_ENDINGS: tuple[tuple[str, Part], ...] = (
    (".lora_down.weight", "down"), (".lora_up.weight", "up"),
    (".lora_A.weight", "down"), (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"), (".lora_B.default.weight", "up"),
    (".lora_linear_layer.down.weight", "down"), (".lora_linear_layer.up.weight", "up"),
    ("_lora.down.weight", "down"), ("_lora.up.weight", "up"),
    (".lora.down.weight", "down"), (".lora.up.weight", "up"),
    (".alpha", "alpha"),
)  # fmt: skip
# Other adapters, by what only their keys have (LyCORIS, PEFT, sd-scripts).
_OTHERS = (
    (r"\.dora_scale$|lora_magnitude_vector", "DoRA"),
    (r"\.lokr_", "LoKr"),
    (r"\.hada_", "LoHa"),
    (r"\.oft_|\.oft_blocks$", "OFT"),
    (r"\.on_input$", "IA3"),
    (r"\.lora_mid\.", "LoCon with a core between its matrices"),
    (r"\.(a|b)[12]\.weight$", "GLoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a whole difference of weights"),
)
_MARKS = re.compile("|".join([re.escape(ending) for ending, _ in _ENDINGS[:-1]] + [mark for mark, _ in _OTHERS]))


def is_lora(path: Path) -> bool:
    """Whether a safetensors file holds adapters, by its header's names.

    Raises:
        EnvironmentProblem: no such file; IntegrityError: not safetensors, or damaged.
    """
    return any(_MARKS.search(name) for name in read_header(path).shapes)


def read_adapter(path: Path, unet_config: Mapping[str, Any] | None = None) -> Adapter:
    """Read a LoRA for SDXL in kohya's, PEFT's or diffusers' older naming.

    Args:
        path: the file.
        unet_config: of diffusers; None: SDXL's as published. Names of blocks follow from it.

    Returns:
        Layers, sorted by name, with tensors as stored, and the file's header.

    Raises:
        EnvironmentProblem: no such file.
        IntegrityError: a pickle, damaged, another kind of adapter, keys that are no layer of an SDXL's, or a matrix
            without its other half; names them.
    """
    header = read_header(path)
    return adapter_of(load_safetensors(path), header.metadata, layers(unet_config), where=str(path))


def adapter_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], known: Layers, *, where: str) -> Adapter:
    """The layers that a file's tensors are of; see ``read_adapter``."""
    refuse_other_kinds(tensors, where=where)
    parts: dict[str, dict[Part, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        place = locate(key, known)
        if place is None:
            unknown.append(key)
        else:
            parts.setdefault(place[0], {})[place[1]] = value
    halves = [name for name, found in parts.items() if not {"down", "up"} <= found.keys()]
    if unknown or halves or not parts:
        _refuse(unknown, halves, where)
    stored = _stored_alphas(metadata, known, where)
    found = {name: _layer(name, parts[name], stored.get(name), where) for name in sorted(parts)}
    odd = _odd_alpha_dtypes(parts)
    return Adapter(found, {**metadata, **({ALPHA_DTYPES: json.dumps(odd, sort_keys=True)} if odd else {})})


def refuse_other_kinds(names: Mapping[str, Any], *, where: str) -> None:
    """Refuse adapters that are no plain LoRA.

    Raises:
        IntegrityError: with the kind and some of its keys.
    """
    for mark, kind in _OTHERS:
        found = [name for name in names if re.search(mark, name)]
        if found:
            raise IntegrityError(
                f"This adapter is no plain LoRA but {kind}",
                where=where,
                why=f"{len(found)} of its keys, such as {found[0]}",
                hint="only LoRA is read here; the trainer that made it may be able to convert it",
            )


def locate(key: str, known: Layers) -> tuple[str, Part] | None:
    """The layer that a file's key is of, in diffusers' naming, and which part of it; None: no key that is known."""
    for ending, part in _ENDINGS:
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            name = _layer_name(stem, known)
            if name is not None:
                return name, part
    return None


def _layer_name(stem: str, known: Layers) -> str | None:
    if stem.startswith("lycoris_"):
        stem = UNET + stem.removeprefix("lycoris_")
    if stem.startswith("lora_te_"):
        stem = TE1 + stem.removeprefix("lora_te_")
    if stem.startswith((UNET, TE1, TE2)):
        return known.by_kohya.get(stem)
    if stem.startswith("diffusion_model."):
        return known.by_dotted.get(stem.removeprefix("diffusion_model."))
    stem = re.sub(r"^base_model\.model\.", "unet.", stem)
    # diffusers before PEFT: attention processors, whose layers carry the matrices in their own names.
    stem = re.sub(r"\.processor\.(to_[qkv]|to_out)$", r".\1", stem)
    if stem.endswith(".to_out"):
        stem += ".0"
    stem = re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", stem)
    stem = re.sub(r"(self_attn)\.to_([qkv])$", r"\1.\2_proj", stem)
    stem = re.sub(r"(self_attn)\.to_out\.0$", r"\1.out_proj", stem)
    return stem if stem in known.shapes else None


def _refuse(unknown: list[str], halves: list[str], where: str) -> None:
    problems = [f"{len(unknown)} keys are no layer of an SDXL's: {', '.join(unknown[:4])}"] if unknown else []
    problems += [f"{len(halves)} layers lack one of their two matrices: {', '.join(halves[:4])}"] if halves else []
    raise IntegrityError(
        "This is no LoRA that an SDXL can load",
        where=where,
        why="; ".join(problems) or "it holds no adapter at all",
        hint="a LoRA of another base model fits that one alone; a whole model goes to --set model.path=",
    )


def _layer(name: str, found: Mapping[Part, Tensor], stored_alpha: float | None, where: str) -> LoraLayer:
    down, up = found["down"], found["up"]
    alpha = found.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise IntegrityError("A LoRA's alpha is no single number", where=where, why=f"{name}: {tuple(alpha.shape)}")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != down.shape[0]:
        raise IntegrityError(
            "A LoRA's two matrices do not belong together", where=where,
            why=f"{name}: {tuple(up.shape)} @ {tuple(down.shape)}",
        )  # fmt: skip
    return LoraLayer(down, up, float(alpha) if alpha is not None else stored_alpha)


def _stored_alphas(metadata: Mapping[str, str], known: Layers, where: str) -> dict[str, float]:
    """Alphas that diffusers keeps in the header, by layer: ``r`` and ``lora_alpha`` with patterns, per component."""
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        config: dict[str, Any] = dict(json.loads(metadata[DIFFUSERS_METADATA]).items())
        found: dict[str, float] = {}
        for component in ("unet", "text_encoder", "text_encoder_2"):
            if f"{component}.lora_alpha" in config:
                alpha, pattern = config[f"{component}.lora_alpha"], config.get(f"{component}.alpha_pattern") or {}
                for name in known.shapes:
                    if name.startswith(f"{component}."):
                        module = name.removeprefix(f"{component}.")
                        found[name] = float(_by_pattern(pattern, module, alpha))
        return found
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise IntegrityError(
            f"The header's {DIFFUSERS_METADATA} cannot be read", where=where, why=str(error), hint="get the file again"
        ) from error


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT looks them up."""
    if module in pattern:
        return pattern[module]
    inner = module.removeprefix("text_model.")
    return pattern.get(inner, default)


def _odd_alpha_dtypes(parts: Mapping[str, Mapping[Part, Tensor]]) -> dict[str, str]:
    """Alphas whose dtype is not that of their layer, so that a file can be written again to the bit."""
    return {
        name: str(found["alpha"].dtype).removeprefix("torch.")
        for name, found in parts.items()
        if "alpha" in found and found["alpha"].dtype != found["down"].dtype
    }
