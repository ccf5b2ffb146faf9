"""Export: the trained weights as files that diffusers loads, read back and compared before they count.

A LoRA goes to ``lora/<name>.safetensors`` with PEFT's names under ``unet.``, as ``pipe.load_lora_weights`` takes
them. Its scale ``lora_alpha / rank`` is multiplied into ``lora_B``, so that every loader reproduces it, also one
that knows nothing of alpha. A fully trained UNet becomes the folder ``lora/<name>-unet``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.config import Settings
from craft_fast.errors import IntegrityError
from craft_fast.records import FileRef
from craft_fast.sdxl.unet import WEIGHTS_NAME, base_unet
from craft_fast.store import atomic
from craft_fast.store.run import Run
from craft_fast.store.safe_load import load_safetensors

FOLDER = "lora"
_PREFIX = "unet."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def export_lora(
    run: Run, adapter_state: Mapping[str, Tensor], *, settings: Settings, metadata: Mapping[str, str]
) -> FileRef:
    """Write what training left, by ``train.method``; the same state gives the same bytes.

    Args:
        run: the open run.
        adapter_state: ``<layer>.lora_A.weight`` [rank, in] and ``<layer>.lora_B.weight`` [out, rank] by layer of the
            UNet; with method ``full`` the UNet's own weights.
        settings: ``export``, and of ``train`` the method, rank and alpha; ``model.path`` tells the UNet's shapes.
        metadata: text put into the file's header under ``craft_fast.``.

    Returns:
        The LoRA file, or the weights file in the folder of a whole UNet.

    Raises:
        IntegrityError: NaN or infinity, layers that are not the UNet's, or a file that reads back differently.
    """
    base = base_unet(settings.model)
    shapes = base.shapes
    dtype: torch.dtype = getattr(torch, settings.export.dtype)
    header = {f"craft_fast.{name}": str(value) for name, value in metadata.items()}
    if settings.train.method == "full":
        tensors = {name: value.to(dtype) for name, value in adapter_state.items()}
        _same_names_and_shapes({name: tuple(value.shape) for name, value in tensors.items()}, shapes, base.where)
        path = run.path(FOLDER, f"{settings.export.name}-unet", WEIGHTS_NAME)
        atomic.write_bytes(path.with_name("config.json"), base.config_json)
        return _write(run, path, tensors, {"format": "pt", **header})
    rank, alpha = settings.train.rank, settings.train.lora_alpha
    tensors = lora_tensors(adapter_state, scale=alpha / rank, dtype=dtype)
    check_fit(tensors, shapes, where=settings.model.path)
    path = run.path(FOLDER, f"{settings.export.name}.safetensors")
    header |= {"craft_fast.rank": str(rank), "craft_fast.lora_alpha": str(alpha)}
    return _write(run, path, tensors, {**_lora_header(settings), **header})


def lora_tensors(state: Mapping[str, Tensor], *, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA file: names under ``unet.``, ``scale`` multiplied into ``lora_B`` in float32."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        scaled = value.float() * scale if name.endswith(_UP) else value
        tensors[_PREFIX + name] = scaled.to("cpu", dtype).contiguous()
    return tensors


def check_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Refuse a LoRA whose layers are not the UNet's, or whose matrices do not pair up.

    Args:
        tensors: by name under ``unet.``.
        shapes: the UNet's weights, name to shape.
        where: the model, for the message.

    Raises:
        IntegrityError: with the first difference.
    """
    problems = [] if tensors else ["it is empty"]
    layers = {name.removeprefix(_PREFIX).removesuffix(_DOWN).removesuffix(_UP) for name in tensors}
    for layer in sorted(layers):
        down, up = tensors.get(_PREFIX + layer + _DOWN), tensors.get(_PREFIX + layer + _UP)
        weight = shapes.get(f"{layer}.weight")
        if down is None or up is None:
            problems.append(f"{layer} has not both lora_A and lora_B")
        elif weight is None:
            problems.append(f"the UNet has no layer {layer}")
        elif (up.shape[0], down.shape[1]) != weight[:2] or up.shape[1] != down.shape[0]:
            problems.append(f"{layer}: {tuple(up.shape)} @ {tuple(down.shape)} for a weight of {weight}")
    if problems:
        raise IntegrityError(
            "The LoRA does not fit the model", where=where, why=f"{len(problems)} problems, first: {problems[0]}"
        )


def _same_names_and_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], base: Path
) -> None:
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise IntegrityError(
            "The trained UNet does not fit the model",
            where=str(base),
            why=f"{len(different)} differences, first: {name} is {found.get(name)}, not {wanted.get(name)}",
        )


def _write(run: Run, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> FileRef:
    """Write, read back, compare bit by bit."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                "A trained weight is NaN or infinite, so nothing was exported",
                where=name,
                why=f"stored as {value.dtype}",
                hint="--set export.dtype=float32; else a lower train.learning_rate",
            )
    written = atomic.write_safetensors(path, tensors, header)
    saved = load_safetensors(path, expect_sha256=written.sha256)
    if set(saved) != set(tensors) or not all(torch.equal(saved[name], tensors[name].cpu()) for name in tensors):
        path.unlink()
        raise IntegrityError(
            "The exported file reads back differently from what was written",
            where=str(path),
            hint="check the disk, then run again",
        )
    return FileRef(path.relative_to(run.root).as_posix(), *written)


def _lora_header(settings: Settings) -> dict[str, str]:
    """What user interfaces look for to list a LoRA under SDXL; no date, so equal runs give equal files."""
    rank = str(settings.train.rank)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": settings.export.name,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": settings.export.name,
    }
