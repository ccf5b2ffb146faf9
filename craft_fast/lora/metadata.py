"""The header of a LoRA file: what user interfaces read to list it under SDXL, and what made it.

Facts: readers (A1111 extensions-builtin/Lora/network.py, Forge sd_forge_lora/network.py), writers
(kohya-ss/sd-scripts train_network.py, library/sai_model_spec.py) and Stability-AI/ModelSpec. No date is written, as
equal runs give equal files; nor ``ss_mixed_precision``, as how a run is laid onto a machine is not part of what it
made. No reader looks for a mark of v-prediction in a LoRA (kohya, too, writes ``modelspec.prediction_type`` alone): the
base model has it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from craft_fast import __version__
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.check import SDXL_ARCHITECTURE

OURS = "craft."
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def header(
    adapter: Adapter,
    *,
    name: str,
    title: str = "",
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    model: str = "",
    resolution: tuple[int, int] = (1024, 1024),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What a LoRA's header says; digests of the tensors are added when it is written.

    Args:
        adapter: the layers; the rank and alpha that most of them have are named.
        name: what user interfaces call it (``ss_output_name``).
        title: for ModelSpec; empty: the name.
        prediction_type: ``epsilon`` or ``v_prediction``, of the model it was trained on.
        zero_terminal_snr: of its noise schedule.
        model: name of the base model, without folders.
        resolution: width and height that it was trained at, px.
        facts: written under ``craft.``; values that are no text as JSON.

    Returns:
        Text to text.
    """
    plain = [layer for layer in adapter.layers.values() if layer.down.shape[2:].numel() <= 1]
    main = plain or list(adapter.layers.values())
    ranks, alphas = [layer.rank for layer in main], [_alpha(layer) for layer in main]
    said = {
        # Without this A1111 takes the file for one of Stable Diffusion 1 and hides it; v-prediction models have it too.
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": _most(ranks),
        "ss_network_alpha": _most(alphas),
        "ss_network_args": json.dumps(_network_args(adapter)),
        "ss_output_name": name,
        "ss_zero_terminal_snr": str(zero_terminal_snr),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": SDXL_ARCHITECTURE,
        "modelspec.title": title or name,
        "modelspec.prediction_type": _PREDICTIONS[prediction_type],
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
        **({"ss_sd_model_name": model} if model else {}),
    }
    return said | ours({"version": __version__, **(facts or {})})


def ours(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as header entries under ``craft.``: texts as they are, all else as JSON."""
    return {
        OURS + key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        for key, value in facts.items()
    }


def _network_args(adapter: Adapter) -> dict[str, str]:
    """What kohya's ``networks.lora`` is told about convolutions with a kernel; without such layers nothing."""
    convs = [layer for layer in adapter.layers.values() if layer.down.shape[2:].numel() > 1]
    ranks, alphas = [layer.rank for layer in convs], [_alpha(layer) for layer in convs]
    return {"conv_dim": _most(ranks), "conv_alpha": _most(alphas)} if convs else {}


def _alpha(layer: LoraLayer) -> float:
    return float(layer.rank if layer.alpha is None else layer.alpha)


def _most(values: Sequence[float]) -> str:
    """The commonest value as kohya writes numbers: 16, 16.0."""
    return str(Counter(values).most_common(1)[0][0]) if values else "0"
