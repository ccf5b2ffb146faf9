"""Read a LoRA file, whoever wrote it, into layers by diffusers' module names; nothing in it is left out in silence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import COMPONENTS, Adapter, LoraLayer
from craft_fast.lora.keys import TE1, TE2, UNET, Layers, layers
from craft_fast.sdxl.identify import read_header
from craft_fast.store.safe_load import load_safetensors

Part = Literal["down", "up", "alpha"]
DIFFUSERS_METADATA = "lora_adapter_metadata"
_ALPHA_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        elif place[1] in parts.setdefault(place[0], {}):
            _refuse_twice(place[0], key, where)
        else:
            parts[place[0]][place[1]] = value
    halves = [name for name, found in parts.items() if not {"down", "up"} <= found.keys()]
    if unknown or halves or not parts:
        _refuse(unknown, halves, where)
    stored = _stored_alphas(metadata, parts, where)
    found = {name: _layer(name, parts[name], stored.get(name), where) for name in sorted(parts)}
    kept = dict(metadata)
    if any("alpha" in one for one in parts.values()):
        kept.pop(ALPHA_DTYPES, None)
        kept |= {ALPHA_DTYPES: json.dumps(odd, sort_keys=True)} if (odd := _odd_alpha_dtypes(parts)) else {}
    return Adapter(found, kept)


def alpha_dtypes(metadata: Mapping[str, str]) -> dict[str, torch.dtype]:
    """What ``ALPHA_DTYPES`` says, by layer; what is no dtype of numbers is left out, as the header may be anybody's."""
    try:
        said = json.loads(metadata.get(ALPHA_DTYPES, "{}"))
    except (ValueError, RecursionError):
        return {}
    known = {str(dtype).removeprefix("torch."): dtype for dtype in _ALPHA_DTYPES}
    return {name: known[dtype] for name, dtype in said.items() if dtype in known} if isinstance(said, dict) else {}


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
    # ComfyUI's own names of the text encoders.
    stem = re.sub(r"^text_encoders\.clip_l\.transformer\.", "text_encoder.", stem)
    stem = re.sub(r"^text_encoders\.clip_g\.transformer\.", "text_encoder_2.", stem)
    stem = re.sub(r"^base_model\.model\.", "unet.", stem)
    # diffusers before PEFT: attention processors, whose layers carry the matrices in their own names.
    stem = re.sub(r"\.processor\.(to_[qkv]|to_out)$", r".\1", stem)
    if stem.endswith(".to_out"):
        stem += ".0"
    stem = re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", stem)
    stem = re.sub(r"(self_attn)\.to_([qkv])$", r"\1.\2_proj", stem)
    stem = re.sub(r"(self_attn)\.to_out\.0$", r"\1.out_proj", stem)
    # What diffusers' UNet itself saved before PEFT has no "unet." in front.
    return next((name for name in (stem, f"unet.{stem}") if name in known.shapes), None)


def _refuse(unknown: list[str], halves: list[str], where: str) -> None:
    problems = [f"{len(unknown)} keys are no layer of an SDXL's: {', '.join(unknown[:4])}"] if unknown else []
    problems += [f"{len(halves)} layers lack one of their two matrices: {', '.join(halves[:4])}"] if halves else []
    raise IntegrityError(
        "This is no LoRA that an SDXL can load",
        where=where,
        why="; ".join(problems) or "it holds no adapter at all",
        hint="a LoRA of another base model fits that one alone; a whole model goes to --set model.path=",
    )


def _refuse_twice(name: str, key: str, where: str) -> None:
    raise IntegrityError(
        "A LoRA has a layer twice, under two names",
        where=where,
        why=f"{key} is {name}, which is there already",
        hint="programs differ in which of the two they take; get the file again, or remove one of them",
    )


def _layer(name: str, found: Mapping[Part, Tensor], stored_alpha: float | None, where: str) -> LoraLayer:
    down, up = found["down"], found["up"]
    alpha = found.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        said = float(alpha) if alpha.numel() == 1 else f"shape {tuple(alpha.shape)}"
        raise IntegrityError("A LoRA's alpha is no single finite number", where=where, why=f"{name}: {said}")
    kernel = set(up.shape[2:]) - {1}
    if {down.ndim, up.ndim} - {2, 4} or up.shape[1] != down.shape[0] or not down.numel() or not up.numel() or kernel:
        raise IntegrityError(
            "A LoRA's two matrices do not belong together", where=where,
            why=f"{name}: {tuple(up.shape)} @ {tuple(down.shape)}",
        )  # fmt: skip
    return LoraLayer(down, up, float(alpha) if alpha is not None else stored_alpha)


def _stored_alphas(
    metadata: Mapping[str, str], parts: Mapping[str, Mapping[Part, Tensor]], where: str
) -> dict[str, float]:
    """Alphas that diffusers keeps in the header, by layer: ``lora_alpha`` and ``alpha_pattern``, per component."""
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        config = json.loads(metadata[DIFFUSERS_METADATA])
        if not isinstance(config, dict):
            raise TypeError(f"it is no object but {str(config)[:40]}")
        found: dict[str, float] = {}
        for component in COMPONENTS:
            own = {name: one for name, one in parts.items() if name.startswith(f"{component}.")}
            if f"{component}.lora_alpha" not in config or not own:
                continue
            patterns = Patterns(config.get(f"{component}.alpha_pattern") or {})
            for name, one in own.items():
                # Text encoders are named with or without "text_model." around them, by transformers' version.
                module = name.partition(".")[2]
                modules = {module, module.removeprefix("text_model.")}
                alpha = patterns.get(modules, config[f"{component}.lora_alpha"])
                # Rank-stabilised LoRA divides by the root of the rank (arXiv 2312.03732).
                rank = one["down"].shape[0] if config.get(f"{component}.use_rslora") else 1
                found[name] = _finite(alpha) * math.sqrt(rank)
        return found
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"The header's {DIFFUSERS_METADATA} cannot be read", where=where, why=str(error), hint="get the file again"
        ) from error


def _finite(alpha: Any) -> float:
    if not math.isfinite(value := float(alpha)):
        raise ValueError(f"lora_alpha is {value}")
    return value


class Patterns:
    """Values by ends of module names, the first that fits, as PEFT looks them up (``get_pattern_key``).

    PEFT takes them for regular expressions; what a file says is not run as one here, and names hold no other signs.
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        if strange := [name for name in said if not re.fullmatch(r"\^?[\w.]+", name)]:
            raise ValueError(f"a pattern is no module's name: {strange[0][:80]}")
        self._values = list(said.values())
        self._order = {name: at for at, name in reversed(list(enumerate(said)))}

    def get(self, modules: Iterable[str], default: Any) -> Any:
        """The value for a module that goes by these names."""
        found = [at for name in modules for end in _ends(name) if (at := self._order.get(end)) is not None]
        return self._values[min(found)] if found else default


def _ends(module: str) -> Iterator[str]:
    yield f"^{module}"
    words = module.split(".")
    yield from (".".join(words[at:]) for at in range(len(words)))


def _odd_alpha_dtypes(parts: Mapping[str, Mapping[Part, Tensor]]) -> dict[str, str]:
    """Alphas whose dtype is not that of their layer, so that a file can be written again to the bit."""
    return {
        name: str(found["alpha"].dtype).removeprefix("torch.")
        for name, found in parts.items()
        if "alpha" in found and found["alpha"].dtype != found["down"].dtype
    }
