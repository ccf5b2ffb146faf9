"""Write a LoRA in kohya's or diffusers' format; what was written is read back and held against every reader's rules."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import COMPONENTS, Adapter, LoraLayer
from craft_fast.lora.keys import layers
from craft_fast.lora.reading import DIFFUSERS_METADATA, alpha_dtypes
from craft_fast.store import atomic

Format = Literal["kohya", "diffusers"]
OUR_METADATA = (
    DIFFUSERS_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.implementation",
)  # fmt: skip
"""Header entries that follow from tensors and format, so that they are made anew at every writing."""


def kohya_tensors(adapter: Adapter, unet_config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Tensors under kohya's names with sgm blocks: ``.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` [].

    Matrices keep their bits. An alpha takes its layer's dtype, as sd-scripts saves it, unless that cannot hold it (then
    float32), or the file that it came from had another. A layer without one gets its rank, which is the same scale.

    Raises:
        IntegrityError: a layer that is no SDXL's.
    """
    names = layers(unet_config).kohya
    dtypes = alpha_dtypes(adapter.metadata)
    tensors = {}
    for name, layer in sorted(adapter.layers.items()):
        if name not in names:
            raise IntegrityError("A LoRA has a layer that this model has not", where=name)
        key = names[name]
        tensors[f"{key}.lora_down.weight"] = _plain(layer.down)
        tensors[f"{key}.lora_up.weight"] = _plain(layer.up)
        tensors[f"{key}.alpha"] = _alpha(layer, dtypes.get(name, layer.down.dtype))
    return tensors


def diffusers_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under PEFT's names and the header entry in which diffusers (0.34 and later) keeps ranks and alphas."""
    tensors = {}
    for name, layer in sorted(adapter.layers.items()):
        tensors[f"{name}.lora_A.weight"] = _plain(layer.down)
        tensors[f"{name}.lora_B.weight"] = _plain(layer.up)
    config: dict[str, Any] = {}
    for component in COMPONENTS:
        own = {n.removeprefix(f"{component}."): x for n, x in adapter.layers.items() if n.startswith(f"{component}.")}
        if own:
            config |= {f"{component}.{key}": value for key, value in _peft_config(own).items()}
    return tensors, {DIFFUSERS_METADATA: json.dumps(config, sort_keys=True)}


def _peft_config(named: Mapping[str, LoraLayer]) -> dict[str, Any]:
    # PEFT compares ends of names: without "text_model." they fit CLIPTextModel with that wrapper (transformers < 5.6)
    # and without it, which diffusers takes off the tensors' names alone.
    own = {name.removeprefix("text_model."): layer for name, layer in named.items()}
    ranks = {name: layer.rank for name, layer in own.items()}
    alphas = {name: float(layer.rank if layer.alpha is None else layer.alpha) for name, layer in own.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {name: value for name, value in sorted(alphas.items()) if value != alpha},
        "target_modules": sorted(own),
        "use_dora": False,
        "lora_bias": False,
    }


def write_adapter(
    path: Path,
    adapter: Adapter,
    *,
    format: Format = "kohya",
    unet_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> atomic.Written:
    """Write a LoRA whole, then check that every program loads it and that it says what ``adapter`` says.

    The same adapter and metadata give the same bytes.

    Args:
        path: the file to write; replaced if it is there.
        adapter: the layers.
        format: ``kohya``: what all programs load; ``diffusers``: PEFT's names.
        unet_config: of diffusers; None: SDXL's.
        metadata: of the header, over the adapter's own.

    Returns:
        sha256 and size.

    Raises:
        IntegrityError: a value that is not finite, or a failed check, with the keys; the file is gone then.
    """
    from craft_fast.lora.check import require_loads

    tensors, own = (kohya_tensors(adapter, unet_config), {}) if format == "kohya" else diffusers_tensors(adapter)
    refuse_non_finite(tensors)
    given = {**adapter.metadata, **(metadata or {})}
    header = {key: value for key, value in given.items() if key not in OUR_METADATA}
    header |= {"format": "pt", **own, "modelspec.implementation": implementation(format)}
    header |= hashes(tensors, header)
    written = atomic.write_safetensors(path, tensors, header)
    try:
        require_loads(path, format=format, unet_config=unet_config, expected=adapter)
    except IntegrityError:
        path.unlink(missing_ok=True)
        raise
    return written


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The digests that user interfaces show and compare; entries that are not kohya's (``ss_``) may change later.

    kohya-ss/sd-scripts library/train_util.py (``precalculate_safetensors_hashes``: what follows the header, and, for
    the oldest readers, 64 KiB from 1 MiB on of a file with kohya's entries alone), ModelSpec (``hash_sha256``).
    """
    digest = atomic.tensors_sha256(tensors)
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    legacy = atomic.safetensors_part(tensors, trained, start=1 << 20, size=1 << 16)
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }


def implementation(format: Format) -> str:
    """ModelSpec's word for the code whose layer names the file follows."""
    return "https://github.com/Stability-AI/generative-models" if format == "kohya" else "diffusers"


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity before anything is written.

    Raises:
        IntegrityError: with the tensor's name.
    """
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                "A trained weight is NaN or infinite, so nothing was exported",
                where=name,
                why=f"stored as {value.dtype}",
                hint="--set export.dtype=float32; else a lower train.learning_rate",
            )


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu").contiguous()


def _alpha(layer: LoraLayer, dtype: torch.dtype) -> Tensor:
    value = float(layer.rank if layer.alpha is None else layer.alpha)
    stored = torch.tensor(value, dtype=dtype)
    # 13.3 is 13.296875 in float16, which would change the LoRA's strength.
    return stored if float(stored) == value else torch.tensor(value, dtype=torch.float32)
