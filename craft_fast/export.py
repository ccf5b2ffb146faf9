"""Export: the trained weights as files that other programs load, read back and checked before they count.

A LoRA goes to ``lora/<name>.safetensors`` in kohya's keys, which ComfyUI, A1111, Forge and diffusers load, and on
request in diffusers' own (``export.format``). A fully trained UNet becomes the folder ``lora/<name>-unet``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.config import Settings
from craft_fast.errors import ConfigError, IntegrityError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.metadata import header, ours
from craft_fast.lora.writing import Format, refuse_non_finite, write_adapter
from craft_fast.progress import Progress
from craft_fast.records import FileRef
from craft_fast.sdxl.identify import read_header
from craft_fast.sdxl.unet import WEIGHTS_NAME, BaseUnet, base_unet
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import Run
from craft_fast.store.safe_load import load_safetensors

FOLDER = "lora"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Exported:
    """What the export stage wrote.

    Attributes:
        path: the LoRA, or the weights file in the folder of a whole UNet; POSIX, relative to the run.
        sha256: of it.
        size: in bytes.
        also: other files: the same LoRA in another format, the model with the LoRA in it where that is one file.
        notes: figures for the stage's row: ``resize_error``, ``merged``.
    """

    path: str
    sha256: str
    size: int
    also: tuple[FileRef, ...] = ()
    notes: Mapping[str, Any] | None = None

    def info(self) -> dict[str, Any]:
        """As it stands in the stage's row."""
        also = [{"path": ref.path, "sha256": ref.sha256, "size": ref.size} for ref in self.also]
        main: dict[str, Any] = {"path": self.path, "sha256": self.sha256, "size": self.size}
        return {**main, **({"also": also} if also else {}), **(self.notes or {})}


def export_lora(
    run: Run,
    adapter_state: Mapping[str, Tensor],
    *,
    settings: Settings,
    metadata: Mapping[str, Any],
    progress: Progress | None = None,
) -> Exported:
    """Write what training left, by ``train.method``; the same state and metadata give the same bytes.

    Args:
        run: the open run.
        adapter_state: ``<layer>.lora_A.weight`` [rank, in] and ``<layer>.lora_B.weight`` [out, rank] by layer of the
            UNet; with method ``full`` the UNet's own weights.
        settings: ``export``, and of ``train`` the method, rank and alpha; ``model`` tells the UNet's shapes.
        metadata: put into the file's header under ``craft.``.
        progress: told of a lowered rank and of a model that is written.

    Raises:
        IntegrityError: NaN or infinity, layers that are not the UNet's, or a file that a program would not load.
        ConfigError: ``export.merged`` with a whole UNet.
    """
    base = base_unet(settings.model)
    if settings.train.method == "full":
        return _whole_unet(run, adapter_state, base, settings, metadata)
    dtype: torch.dtype = getattr(torch, settings.export.dtype)
    adapter = adapter_of_state(adapter_state, alpha=settings.train.lora_alpha, dtype=dtype)
    check_fit(adapter, base.shapes, where=settings.model.path)
    notes: dict[str, Any] = {}
    rank = settings.export.rank
    if rank is not None and rank < settings.train.rank:
        from craft_fast.lora.resizing import resize_adapter

        refuse_non_finite(adapter_state)
        adapter, report = resize_adapter(adapter, rank)
        notes["resize_error"] = report.error
        if progress is not None:
            progress.info(f"rank {settings.train.rank} to {rank}: the LoRA changes by {report.error:.2%} of its size")
    facts = {**metadata, **({"rank_resize_error": notes["resize_error"]} if notes else {})}
    kinds: dict[str, tuple[Format, ...]] = {"both": ("kohya", "diffusers"), "diffusers": ("diffusers",)}
    refs = [
        _write(run, adapter, format, main=number == 0, base=base, settings=settings, facts=facts)
        for number, format in enumerate(kinds.get(settings.export.format, ("kohya",)))
    ]
    if settings.export.merged != "none":
        merged = _merge(run, adapter, refs[0], settings, progress)
        refs += [merged] if merged is not None else []
        notes["merged"] = merged_path(settings)
    return Exported(refs[0].path, refs[0].sha256, refs[0].size, tuple(refs[1:]), notes)


def lora_path(settings: Settings, *, main: bool = True) -> str:
    """Where the LoRA goes, and where its copy in diffusers' keys."""
    return f"{FOLDER}/{settings.export.name}{'' if main else '-diffusers'}.safetensors"


def merged_path(settings: Settings) -> str:
    """Where the whole model with the LoRA in it goes."""
    return f"{FOLDER}/{settings.export.name}-merged{'.safetensors' if settings.export.merged == 'file' else ''}"


def _write(
    run: Run,
    adapter: Adapter,
    format: Format,
    *,
    main: bool,
    base: BaseUnet,
    settings: Settings,
    facts: Mapping[str, Any],
) -> FileRef:
    path = run.path(lora_path(settings, main=main))
    said = header(
        adapter,
        name=settings.export.name,
        prediction_type=base.prediction.prediction_type,
        zero_terminal_snr=base.prediction.zero_terminal_snr,
        model=Path(settings.model.path).name,
        resolution=(settings.generate.width_px, settings.generate.height_px),
        facts=facts,
    )
    written = write_adapter(path, adapter, format=format, unet_config=base.config, metadata=said)
    return FileRef(path.relative_to(run.root).as_posix(), *written)


def _merge(run: Run, adapter: Adapter, lora: FileRef, settings: Settings, progress: Progress | None) -> FileRef | None:
    from craft_fast.lora.applying import apply_adapters

    model, path = settings.model, run.path(merged_path(settings))
    apply_adapters(
        model.path, [(adapter, 1.0)], path, form=settings.export.merged, config=model.config, vae=model.vae,
        offline=model.offline, prediction_type=model.prediction_type, zero_terminal_snr=model.zero_terminal_snr,
        merged=[{"lora": Path(lora.path).name, "sha256": lora.sha256}], force=True, progress=progress,
    )  # fmt: skip
    return run.ref(path) if path.is_file() else None


def adapter_of_state(state: Mapping[str, Tensor], *, alpha: float, dtype: torch.dtype) -> Adapter:
    """The trained LoRA: matrices as they were trained, in ``dtype``, and ``lora_alpha``.

    Raises:
        IntegrityError: a matrix without its other half, or none at all.
    """
    names = {name.removesuffix(_DOWN).removesuffix(_UP) for name in state}
    half = sorted(name for name in names if name + _DOWN not in state or name + _UP not in state)
    if half or not names:
        why = f"{half[0]} has not both lora_A and lora_B" if half else "it is empty"
        raise IntegrityError("The LoRA does not fit the model", where="the trained state", why=why)

    def stored(value: Tensor) -> Tensor:
        return value.to("cpu", dtype).contiguous()

    return Adapter(
        {
            f"unet.{name}": LoraLayer(stored(state[name + _DOWN]), stored(state[name + _UP]), alpha)
            for name in sorted(names)
        }
    )


def check_fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Refuse a LoRA whose layers are not the UNet's, or whose matrices do not pair up.

    Args:
        adapter: with layers of the UNet alone.
        shapes: the UNet's weights, name to shape.
        where: the model, for the message.

    Raises:
        IntegrityError: with the first difference.
    """
    problems = []
    for name, layer in adapter.layers.items():
        module = name.removeprefix("unet.")
        weight, up, down = shapes.get(f"{module}.weight"), tuple(layer.up.shape), tuple(layer.down.shape)
        if weight is None:
            problems.append(f"the UNet has no layer {module}")
        elif (up[0], down[1]) != weight[:2] or up[1] != down[0]:
            problems.append(f"{module}: {up} @ {down} for a weight of {weight}")
    if problems:
        raise IntegrityError(
            "The LoRA does not fit the model", where=where, why=f"{len(problems)} problems, first: {problems[0]}"
        )


def _whole_unet(
    run: Run, state: Mapping[str, Tensor], base: BaseUnet, settings: Settings, metadata: Mapping[str, Any]
) -> Exported:
    """A fully trained UNet as a folder that ``UNet2DConditionModel.from_pretrained`` opens."""
    if settings.export.merged != "none":
        raise ConfigError(
            "A fully trained UNet is not merged into a model here",
            where="export.merged",
            why=f"found {settings.export.merged}; with train.method=full it must be none",
            hint="StableDiffusionXLPipeline.from_pretrained(MODEL, unet=...) takes the folder that is written",
        )
    tensors = {name: value.to("cpu", getattr(torch, settings.export.dtype)) for name, value in state.items()}
    _same_names_and_shapes({name: tuple(value.shape) for name, value in tensors.items()}, base.shapes, base.where)
    refuse_non_finite(tensors)
    path = run.path(FOLDER, f"{settings.export.name}-unet", WEIGHTS_NAME)
    atomic.write_bytes(path.with_name("config.json"), base.config_json)
    written = atomic.write_safetensors(path, tensors, {"format": "pt", **ours(metadata)})
    saved = load_safetensors(path, expect_sha256=written.sha256)
    if set(saved) != set(tensors) or not all(torch.equal(saved[name], value) for name, value in tensors.items()):
        path.unlink()
        raise IntegrityError(
            "The exported file reads back differently from what was written",
            where=str(path),
            hint="check the disk, then run again",
        )
    return Exported(path.relative_to(run.root).as_posix(), *written)


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


def stamp(
    run: Run,
    files: Sequence[FileRef],
    facts: Mapping[str, Any],
    *,
    pending: Sequence[FileRef] = (),
    announce: Callable[[Sequence[FileRef]], None] = lambda files: None,
) -> list[FileRef]:
    """Put facts that came later into the header of exported LoRA files; tensors stay, to the bit.

    Args:
        run: the open run.
        files: as recorded.
        facts: written under ``craft.``, in place of those of the same name.
        pending: what ``announce`` was told by a call that was killed; files may be these already.
        announce: told what the files will be before the first is written, so that after a kill both are known.

    Returns:
        The files as they are now, in the same order.

    Raises:
        IntegrityError: a file is neither what was written nor what was going to be.
    """
    known = {(ref.path, ref.sha256) for ref in (*files, *pending)}
    plan = []
    for ref in files:
        path = run.path(ref.path)
        found = replace(ref, sha256=sha256_file(path))
        if (found.path, found.sha256) not in known:
            raise IntegrityError(
                "An exported file is not what was written", where=str(path), hint="type craft-fast export"
            )
        tensors = load_safetensors(path, expect_sha256=found.sha256)
        metadata = {**read_header(path).metadata, **ours(facts)}
        new = FileRef(ref.path, *atomic.safetensors_digest(tensors, metadata))
        plan.append((found, new, tensors, metadata))
    announce([new for _, new, _, _ in plan])
    for found, new, tensors, metadata in plan:
        if found.sha256 != new.sha256:
            atomic.write_safetensors(run.path(new.path), tensors, metadata)
    return [new for _, new, _, _ in plan]
