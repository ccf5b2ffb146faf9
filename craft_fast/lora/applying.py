"""LoRAs put into a whole SDXL for good: a folder in diffusers' layout or one file in the original layout.

``W + sum_n strength_n * scale_n * up_n @ down_n``, added in float32 and rounded once to the dtype that the weight is
stored in. The model is read and written tensor by tensor. What no LoRA touches keeps its bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from craft_fast.errors import ConfigError, IntegrityError, ResourceError, UsageError
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.base_of import base_of_layers
from craft_fast.lora.describing import MERGED
from craft_fast.lora.folder_texts import Text, folder_texts
from craft_fast.lora.layouts import ADAPTED, PLANS, Deltas, WeightFile, adapted_shapes
from craft_fast.lora.merging import layer_shape
from craft_fast.lora.original import markers, model_metadata, plain
from craft_fast.lora.streams import Entry, write_entries
from craft_fast.progress import Progress, Silent, Task
from craft_fast.sdxl.identify import read_header, require_sdxl
from craft_fast.sdxl.prediction import Prediction
from craft_fast.sdxl.single_file import check_part, refuse_unknown
from craft_fast.sdxl.source import DEFAULT_CONFIG, FilePart, Source, open_source
from craft_fast.sdxl.weights import weight_files
from craft_fast.store import atomic
from craft_fast.store.run import resolve_uri

_NAMED = 5  # layers named in an error
_IDLE_S = 600.0
# Claims about the very bytes of a file, which are others now.
_STALE = {"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"}


@dataclass(frozen=True, slots=True)
class Applied:
    """A model that was written.

    Attributes:
        path: the folder or the file.
        form: ``folder`` or ``file``.
        changed: number of weights that LoRAs changed.
        tensors: number of all tensors written.
        size: of all weights, in bytes.
        sha256: of the one file; None for a folder.
    """

    path: Path
    form: str
    changed: int
    tensors: int
    size: int
    sha256: str | None


def apply_adapters(
    model: str | Path,
    adapters: Sequence[tuple[Adapter, float]],
    out: Path,
    *,
    form: str | None = None,
    dtype: torch.dtype | None = None,
    config: str = DEFAULT_CONFIG,
    vae: str | None = None,
    offline: bool = False,
    prediction_type: str = "auto",
    zero_terminal_snr: str = "auto",
    merged: Sequence[Mapping[str, Any]] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Write a whole SDXL with LoRAs in it.

    Args:
        model: diffusers folder, ``package:NAME/FOLDER``, hub id, or one safetensors file.
        adapters: with their strengths, any sign.
        out: a folder, or a file that ends in ``.safetensors``.
        form: ``folder`` or ``file``; None: by the name of ``out``.
        dtype: of all weights; None: as each is stored.
        config: of a single file, as in ``open_source``.
        vae: another VAE that goes into the model.
        offline: ask no network.
        prediction_type: ``auto`` reads it off the model; needed where a single file becomes a folder and says nothing.
        zero_terminal_snr: likewise.
        merged: what the header says of each LoRA under ``craft.merged``, such as its sha256; strengths are added.
        force: replace ``out``.
        progress: counts tensors.

    Returns:
        What was written. A kill leaves ``out`` as it was.

    Raises:
        UsageError: ``out`` is there, or is the model itself; IntegrityError: a LoRA's layers are not the model's, a
            weight would be NaN or infinite, or a file is damaged; ResourceError: not enough room on the disk;
            EnvironmentProblem: the model is missing or no SDXL.
    """
    form = form or ("file" if out.suffix == ".safetensors" else "folder")
    out = out.expanduser().absolute()
    _check_out(out, form, force=force)
    source = open_model(model, form=form, config=config, vae=vae, offline=offline)
    if source.path.resolve() == out.resolve() or out.resolve() in source.path.resolve().parents:
        raise UsageError("The model would be written over itself", where=str(out), hint="-o another name")
    require_fit([adapter for adapter, _ in adapters], adapted_shapes(source), where=str(model))
    deltas = Deltas(adapters)
    files = PLANS[type(source.main), form](source, deltas, dtype)
    said = [*_earlier(source), *_records(adapters, merged)]
    if form == "file":
        prediction = (
            None if isinstance(source.main, FilePart) else source.prediction(prediction_type, zero_terminal_snr)
        )
        files = [_whole_file(files[0], out, said, prediction)]
        texts: list[Text] = []
    else:
        files = [file if file.original else replace(file, metadata=_kept(file.metadata, said)) for file in files]
        texts = folder_texts(source, files, lambda: _prediction(source, prediction_type, zero_terminal_snr))
    size = sum(file.size for file in files)
    _sweep(out)
    _require_room(out.parent, size + sum(len(content) for _, content in texts))
    tensors = sum(len(file.entries) for file in files)
    with (progress or Silent()).task("apply", tensors, "tensors") as task:
        if form == "folder":
            _write_folder(out, files, texts, task)
            return Applied(out, form, len(deltas), tensors, size, None)
        written = write_entries(out, files[0].entries, files[0].metadata, lambda: task.advance())
    return Applied(out, form, len(deltas), tensors, size, written.sha256)


# ---- before anything is written


def _check_out(out: Path, form: str, *, force: bool) -> None:
    if form == "file" and out.suffix != ".safetensors":
        raise UsageError("A model's file ends in .safetensors", where=str(out))
    if not out.exists():
        return
    if form == "file" and not out.is_file():
        raise UsageError("This is a folder, not a file", where=str(out), hint="-o a name that is free")
    if form == "folder" and not out.is_dir():
        raise UsageError("This is a file, not a folder", where=str(out), hint="-o a name that is free")
    if form == "folder" and any(out.iterdir()) and not (out / "model_index.json").is_file():
        # --force must not be able to remove somebody's home folder.
        raise UsageError("The folder holds something else than a model", where=str(out), hint="-o a name that is free")
    if not force:
        raise UsageError(
            "There is such a model already", where=str(out), hint="--force replaces it, or -o another name"
        )


def open_model(
    model: str | Path,
    *,
    form: str = "file",
    config: str = DEFAULT_CONFIG,
    vae: str | None = None,
    offline: bool = False,
) -> Source:
    """A model whose weights are looked at or written, not run: of a single file its tokenizers are not asked for.

    Args:
        model: as in ``apply_adapters``.
        form: what will be written; a folder needs tokenizers.
        config: of a single file, as in ``open_source``; one that is no local folder counts only where it is needed.
        vae: another VAE.
        offline: ask no network.

    Raises:
        EnvironmentProblem, IntegrityError, ConfigError: as ``open_source``.
    """
    place = resolve_uri(str(model))
    if form == "folder" or vae is not None or not isinstance(place, Path) or not place.is_file():
        source = open_source(model, config=config, vae=vae, offline=offline)
    else:
        # From file to file neither tokenizers nor a VAE are needed, so none is asked for.
        header = read_header(place)
        require_sdxl(header)
        refuse_unknown(header)
        configs = resolve_uri(config)
        folder = configs if isinstance(configs, Path) and configs.is_dir() else None
        source = Source(FilePart(header, folder), folder or place.parent)
    if isinstance(source.main, FilePart):
        for part in ADAPTED:
            check_part(source.main.header, part, source.main.config(part))
    return source


def require_fit(
    adapters: Iterable[Adapter], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], *, where: str
) -> None:
    """Refuse LoRAs whose layers are not the model's.

    Args:
        adapters: any.
        shapes: by part, plain name to shape of the model's weights; see ``adapted_shapes``.
        where: the model, for the message.

    Raises:
        IntegrityError: with the layers' names, and which base model the LoRA seems to be for.
    """
    for adapter in adapters:
        problems = misfits(adapter, shapes)
        if problems or not adapter.layers:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            base = base_of_layers(adapter)
            raise IntegrityError(
                "The LoRA does not fit the model",
                where=where,
                why=("; ".join(problems[:_NAMED]) or "it has no layers")
                + more
                + (f". It seems to be for {base}" if base else ""),
                hint="give the base model that the LoRA was trained on",
            )


def misfits(adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    """What of an adapter is not the model's, a line for each layer."""
    problems = []
    for name, layer in adapter.layers.items():
        part, _, module = name.partition(".")
        found = shapes.get(part, {}).get(f"{plain(part, module)}.weight")
        if found is None:
            problems.append(f"{name}: the model has no such layer")
        elif layer_shape(layer) != (found[:2] if found[2:] == (1, 1) else found):
            problems.append(f"{name}: for a weight of {list(layer_shape(layer))}, the model's is {list(found)}")
    return problems


def _sweep(out: Path) -> None:
    """Remove what a killed command left of this output: nobody would look for 7 GB in a hidden file."""
    for path in out.parent.glob(f".{glob.escape(out.name[:100])}.*{atomic.TEMP_SUFFIX}"):
        # A command that is at work writes all the time.
        if path.is_file() and time.time() - path.stat().st_mtime > _IDLE_S:
            path.unlink(missing_ok=True)


def _require_room(folder: Path, size: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise ResourceError(
            "Not enough room on the disk",
            where=str(there),
            why=f"the model needs {size:,} bytes, {free:,} are free",
            hint="free some space, -o a name on another disk, or --dtype float16",
        )


# ---- what the header says


def _records(adapters: Sequence[tuple[Adapter, float]], merged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    given = [*merged, *({} for _ in range(len(adapters) - len(merged)))]
    return [{**said, "strength": strength} for said, (_, strength) in zip(given, adapters, strict=True)]


def _earlier(source: Source) -> list[Any]:
    """Which LoRAs the model's own headers say are in it already."""
    if isinstance(source.main, FilePart):
        headers = [source.main.header]
    else:
        headers = [read_header(path) for part in ADAPTED for path in weight_files(source.main.folder(part))]
    found: list[Any] = []
    for header in headers:
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(header.metadata.get(MERGED, "[]"))
            found += [one for one in said if one not in found] if isinstance(said, list) else []
    return found


def _kept(metadata: Mapping[str, str], said: Sequence[Any]) -> dict[str, str]:
    """A header's entries that are still true, and which LoRAs are in the weights."""
    kept = {key: value for key, value in metadata.items() if key not in _STALE}
    return {**kept, MERGED: json.dumps(said, sort_keys=True)}


def _whole_file(file: WeightFile, out: Path, said: Sequence[Any], prediction: Prediction | None) -> WeightFile:
    """Of a file made from a folder also what a folder says beside its weights."""
    if prediction is None:
        return replace(file, metadata=_kept(file.metadata, said))
    marks = markers(prediction.prediction_type, zero_terminal_snr=prediction.zero_terminal_snr)
    entries = [*file.entries, *(Entry.made(name, torch.float32, (0,), _no_values) for name in marks)]
    metadata = model_metadata(out.stem, prediction.prediction_type)
    return replace(file, entries=entries, metadata=_kept(metadata, said))


def _no_values() -> torch.Tensor:
    return torch.zeros(0)


def _prediction(source: Source, prediction_type: str, zero_terminal_snr: str) -> Prediction:
    try:
        return source.prediction(prediction_type, zero_terminal_snr)
    except ConfigError as error:
        error.hint = "--prediction epsilon or --prediction v_prediction; " + error.hint
        raise


# ---- writing


def _write_folder(out: Path, files: Sequence[WeightFile], texts: Sequence[Text], task: Task) -> None:
    """All into a folder beside ``out`` that gets its name when it is whole."""
    temp = out.with_name(f".{out.name}{atomic.TEMP_SUFFIX}")
    shutil.rmtree(temp, ignore_errors=True)  # what a kill left
    try:
        for path, content in texts:
            atomic.write_bytes(temp / path, content)
        for file in files:
            if file.original is not None:
                _copy(file.original, temp / file.path)
                task.advance(len(file.entries))
            else:
                write_entries(temp / file.path, file.entries, file.metadata, lambda: task.advance())
        atomic.commit_folder(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        atomic.write_chunks(target, iter(lambda: file.read(16 * 1024 * 1024), b""))
