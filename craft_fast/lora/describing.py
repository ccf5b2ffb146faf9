"""What a LoRA file is, for a person: naming, ranks, layers, base model; and the header of files made from others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from craft_fast.errors import CraftError, IntegrityError
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.base_of import base_of_layers, base_of_shapes
from craft_fast.lora.check import SDXL_ARCHITECTURE
from craft_fast.lora.keys import layers
from craft_fast.lora.merging import layer_shape
from craft_fast.lora.metadata import header
from craft_fast.lora.reading import is_lora, read_adapter
from craft_fast.lora.streams import read_table
from craft_fast.sdxl.identify import kind_of, read_header

# What a LoRA made of others still says of its base model; all else tells of one training.
_OF_BASE = (
    "ss_base_model_version", "ss_sd_model_name", "ss_v2", "modelspec.architecture", "modelspec.prediction_type",
    "modelspec.resolution",
)  # fmt: skip
MERGED = "craft.merged"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file's header and tensors say.

    Attributes:
        naming: in words, such as ``kohya's names with sgm blocks``.
        ranks: rank to number of layers, commonest first.
        alphas: alpha to number of layers, likewise; None: not stored.
        layers: component to number of layers.
        dtypes: as the format writes them, commonest first.
        size: of the file, in bytes.
        base: by shapes, such as ``SDXL``; None where they do not tell.
        said: what the header says of base model and prediction.
        craft: the header's ``craft.*`` entries.
    """

    naming: str
    ranks: Mapping[int, int]
    alphas: Mapping[float | None, int]
    layers: Mapping[str, int]
    dtypes: Sequence[str]
    size: int
    base: str | None
    said: Mapping[str, str]
    craft: Mapping[str, str]


def describe(path: Path, adapter: Adapter | None) -> Facts:
    """What a file is; without an adapter, as one that is not SDXL's cannot be read, from the header alone."""
    table, metadata = read_table(path)
    shapes = {name: one.shape for name, one in table.items()}
    found = list(adapter.layers.values()) if adapter else []
    components = (name.partition(".")[0] for name in (adapter.layers if adapter else ()))
    ranks = (layer.rank for layer in found) if adapter else _ranks(shapes)
    return Facts(
        naming=naming(shapes),
        ranks=_counted(ranks),
        alphas=_counted(layer.alpha for layer in found),
        layers=dict(Counter(components)),
        dtypes=list(_counted(one.dtype for one in table.values())),
        size=path.stat().st_size,
        base=base_of_shapes(shapes),
        said={key: metadata[key] for key in _OF_BASE if key in metadata},
        craft={key: value for key, value in metadata.items() if key.startswith("craft.")},
    )


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(values).most_common())


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    downs = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
    return [shape[0] for name, shape in shapes.items() if name.endswith(downs) and shape]


def naming(names: Iterable[str]) -> str:
    """Whose names a LoRA file's tensors have, in words."""
    text = "\n".join(names)
    for mark, word in (
        (r"^lora_unet_(input|middle|output)_block", "kohya's names with sgm blocks"),
        (r"^lora_unet_", "kohya's names with diffusers' blocks"),
        (r"^lora_te", "kohya's names"),
        (r"^lycoris_", "LyCORIS' names"),
        (r"^diffusion_model\.", "dotted sgm names"),
        (r"\.processor\.|_lora\.", "diffusers' names of before PEFT"),
        (r"^(unet|text_encoder(_2)?)\.", "diffusers' names"),
        (r"^base_model\.model\.", "PEFT's names"),
    ):
        if re.search(mark, text, re.MULTILINE):
            return word
    return "unknown names"


def written_as(path: Path) -> Literal["kohya", "diffusers"]:
    """The format in which a file made from this one stays like it."""
    found = naming(read_header(path).shapes)
    return "diffusers" if found.startswith(("diffusers'", "PEFT's")) else "kohya"


def read_lora(path: Path, unet_config: Mapping[str, Any] | None = None) -> Adapter:
    """``read_adapter``, with what a file is that is no LoRA for an SDXL.

    Raises:
        EnvironmentProblem: no such file. IntegrityError: as ``read_adapter``; it says what the file is instead, or
            which base model its LoRA seems to be for.
    """
    require_lora(path)
    shapes = read_header(path).shapes
    try:
        adapter = read_adapter(path, unet_config)
    except IntegrityError as error:
        base = base_of_shapes(shapes)
        if base is not None and base != "SDXL":
            error.why += f". It seems to be for {base}"
        raise
    _require_shapes(path, adapter, unet_config)
    return adapter


def _require_shapes(path: Path, adapter: Adapter, unet_config: Mapping[str, Any] | None) -> None:
    """Names may be an SDXL's by chance, such as those of the middle block; then sizes tell."""
    known = layers(unet_config).shapes
    # Of the text encoders of a model of another size nothing is known here.
    counted = {name: layer for name, layer in adapter.layers.items() if name.startswith("unet.") or unet_config is None}
    wrong = [
        f"{name}: for a weight of {list(layer_shape(layer))}, the model's is {list(known[name])}"
        for name, layer in counted.items()
        if layer_shape(layer) != (known[name][:2] if known[name][2:] == (1, 1) else known[name])
    ]
    if wrong:
        base = base_of_layers(adapter)
        raise IntegrityError(
            "This is no LoRA that an SDXL can load",
            where=str(path),
            why=f"{len(wrong)} of {len(adapter.layers)} layers are of another size, such as {wrong[0]}"
            + (f". It seems to be for {base}" if base not in (None, "SDXL") else ""),
            hint="a LoRA of another base model fits that one alone",
        )


def require_lora(path: Path) -> None:
    """Refuse a file that is no LoRA at all.

    Raises:
        EnvironmentProblem: no such file. IntegrityError: a pickle, damaged, or a model; says which.
    """
    if is_lora(path):
        return
    kind, _ = kind_of(read_header(path))
    whole = kind == "SDXL"
    raise IntegrityError(
        "Not a LoRA",
        where=str(path),
        why=f"this is {'a whole SDXL' if whole else kind}",
        hint=f"give it as --model {path}" if whole else "give a LoRA's .safetensors file, or the name of a run",
    )


# ---- headers of files made from others


_OF_SIZE = (
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_output_name", "modelspec.title",
)  # fmt: skip


def network_entries(adapter: Adapter, title: str) -> dict[str, str]:
    """What a header says of ranks and name, of a LoRA that was made from another."""
    said = header(adapter, name=title)
    return {key: said[key] for key in _OF_SIZE}


def listed_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """What A1111 and Forge must find, where a file lacks it or says something else: it was read as an SDXL's."""
    base = metadata.get("ss_base_model_version", "")
    return {
        "ss_base_model_version": base if base.startswith("sdxl_") else "sdxl_base_v1-0",
        "modelspec.sai_model_spec": metadata.get("modelspec.sai_model_spec", "1.0.0"),
        "modelspec.architecture": SDXL_ARCHITECTURE,
    }


def merged_header(parts: Sequence[tuple[str, str, float, Adapter]], adapter: Adapter, title: str) -> dict[str, str]:
    """The header of a sum of LoRAs: of the first what it says of its base model, and which files are in it.

    Args:
        parts: file name, sha256, weight and content of each.
        adapter: the sum.
        title: its name.
    """
    first = parts[0][3].metadata
    said = [{"lora": name, "sha256": sha256, "weight": weight} for name, sha256, weight, _ in parts]
    return {
        **header(adapter, name=title),
        **{key: first[key] for key in _OF_BASE if key in first},
        **listed_entries(first),
        MERGED: json.dumps(said, sort_keys=True),
    }


def predictions(adapters: Iterable[Adapter]) -> set[str]:
    """What the headers say their base models predict; more than one: they should not be merged."""
    found = (adapter.metadata.get("modelspec.prediction_type") for adapter in adapters)
    return {"v" if said.lower().startswith("v") else said.lower() for said in found if said}


def refused(path: Path, unet_config: Mapping[str, Any] | None) -> tuple[Adapter | None, str]:
    """A file's content, or why it cannot be read as an SDXL's LoRA; hostile files raise all the same."""
    require_lora(path)
    try:
        return read_lora(path, unet_config), ""
    except CraftError as error:
        return None, f"{error.what}: {error.why}"
