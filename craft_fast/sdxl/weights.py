"""Networks from their weight files: strictly, finite, and onto the device without more memory than they need."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError, ResourceError
from craft_fast.quiet import import_bitsandbytes, quiet_progress_bars, quiet_third_party
from craft_fast.sdxl import published
from craft_fast.store.safe_load import check_header, conversion_command

quiet_third_party()

T = TypeVar("T")
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
# Copies of the same weights that diffusers' folders may hold beside the usual ones.
_VARIANTS = (".fp16", ".non_ema", ".ema")
# Old names of a VAE's attention layers that files still have.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_finite: set[tuple[Any, ...]] = set()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model part: the full-precision ones, or the fp16 variant where only that is.

    Raises:
        IntegrityError: there are only pickles.
        EnvironmentProblem: there are no weights, or a part of them is missing.
    """
    # A name in a hub's cache whose download did not end is a link to nothing.
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    # A VAE's own page often holds copies for other programs beside the file that diffusers reads.
    files = [file for file in files if file.name.startswith(("model", "diffusion_pytorch_model"))] or files
    full = [file for file in files if not any(f"{variant}{end}" in file.name for variant in _VARIANTS for end in ".-")]
    if full or files:
        return _complete(folder, full or files)
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES) if folder.is_dir() else []
    if pickles:
        raise IntegrityError(
            "Pickled weights are refused: loading one runs whatever code it holds",
            where=str(pickles[0]),
            hint="if you trust where they come from, convert them with: " + conversion_command(pickles[0]),
        )
    raise EnvironmentProblem("A model folder holds no weights", where=str(folder), why="no *.safetensors in it")


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    numbers = [match.groups() for file in files if (match := _SHARD.search(file.name))]
    if numbers and len(numbers) == len(files) and len(numbers) != int(numbers[0][1]):
        raise EnvironmentProblem(
            "A part of a model's weights is missing",
            where=str(folder),
            why=f"{len(numbers)} of {int(numbers[0][1])} files are there: {', '.join(f.name for f in files)}",
            hint="get the missing files",
        )
    return files


def guarded(where: Path, load: Callable[[], T]) -> T:
    """Turn what a library raises on a bad file into an error a user can act on."""
    try:
        return load()
    except CraftError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The model does not fit into the GPU's memory",
            where=str(where),
            why=str(error).splitlines()[0],
            hint="free the GPU, or --set model.dtype=bfloat16, or --set model.device=cpu",
        ) from error
    except Exception as error:
        raise IntegrityError(
            "A part of the model cannot be loaded",
            where=str(where),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            hint="get the model again, or check that its config.json belongs to its weights",
        ) from error


def load_part(cls: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One network of a diffusers folder in eval mode, without gradients, its weights checked.

    Args:
        cls: its class in diffusers or transformers.
        folder: its own folder, with ``config.json`` and weights.
        device: where it goes.
        dtype: of its weights there.

    Raises:
        IntegrityError: pickled, damaged, incomplete or not finite; ResourceError: it does not fit the device.
    """
    files = weight_files(folder)
    for file in files:
        check_header(file)
    with contextlib.suppress(ImportError):
        import_bitsandbytes()
    quiet_progress_bars()
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if all(".fp16" in file.name for file in files):
        options["variant"] = "fp16"
    # transformers and diffusers name the same option differently.
    options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = dtype
    part, info = guarded(folder, lambda: cls.from_pretrained(folder, **options))
    # What is missing would be left at random, and a wrong architecture shows in nothing else.
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
        raise IntegrityError(
            "A model's weights are not those its config.json describes",
            where=str(folder),
            why=f"{len(wrong)} missing or of another shape, such as {wrong[0]}",
            hint="get the model again",
        )
    part = guarded(folder, lambda: part.to(device))
    part.eval().requires_grad_(False)
    refuse_non_finite(part, folder, files)
    return part


def assemble(part: str, config: Mapping[str, Any], tensors: dict[str, Tensor], where: Path) -> Any:
    """A network around tensors that are on their device already; names, in diffusers' naming, and shapes must fit.

    Args:
        part: as in ``published.empty``.
        config: its configuration.
        tensors: name to tensor; emptied.
        where: told in errors.

    Raises:
        IntegrityError: a tensor is missing, too many, or of another shape.
    """
    module = guarded(where, lambda: published.empty(part, config))
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    require_same({name: tuple(value.shape) for name, value in tensors.items()}, expected, f"{where} ({part})")
    device = next(iter(tensors.values())).device
    module.load_state_dict(tensors, strict=True, assign=True)
    tensors.clear()
    published.fill_buffers(module, device)
    return module.eval().requires_grad_(False)


def require_same(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes.

    Raises:
        IntegrityError: with what is missing, too many, or different.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    different = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    said = [f"{len(names)} {word}, such as {names[0]}" for names, word in
            ((missing, "missing"), (unexpected, "not known")) if names]  # fmt: skip
    if different:
        name = different[0]
        shapes = f"{name} {list(found[name])} instead of {list(expected[name])}"
        said.append(f"{len(different)} of another shape, such as {shapes}")
    if said:
        raise IntegrityError(
            "A model's weights are not those of its configuration",
            where=where,
            why="; ".join(said),
            hint="the model is of another size or kind, or not whole; for one that is not of SDXL's size set "
            "model.config to the folder with its own configurations",
        )


def expected_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of a network's weights, from its configuration alone.

    Raises:
        IntegrityError: the configuration makes no such network.
    """
    key = (part, json.dumps(config, sort_keys=True, default=str))
    if key not in _shapes:
        module = guarded(Path(f"{part}/config.json"), lambda: published.empty(part, config))
        _shapes[key] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return _shapes[key]


_shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}


def new_vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors with its attention layers named as they are today; their weights as matrices."""
    renamed = {}
    for name, value in tensors.items():
        stem, _, end = name.rpartition(".")
        before, _, last = stem.rpartition(".")
        if ".attentions." in f".{name}":
            name = f"{before}.{_OLD_ATTENTION.get(last, last)}.{end}"
            value = value[:, :, 0, 0] if value.ndim == 4 else value
        renamed[name] = value
    return renamed


def refuse_non_finite(module: nn.Module, where: Path, files: Iterable[Path]) -> None:
    """Refuse NaN and infinity in any weight, on the first load of its files.

    The same bytes in the same dtype give the same weights, and the check reads all of them (5 GB for SDXL's UNet in
    half precision), so a model that is loaded anew for every phase is not checked anew.

    Raises:
        IntegrityError: with the weight's name.
    """
    stats = [(str(file.resolve()), file.stat()) for file in files]
    values = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    dtypes = tuple(sorted({str(value.dtype) for value in values.values()}))
    key = (str(where), dtypes, *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))
    if key in _finite or not values:
        return
    # One question to the device, not one for each of 1,680 weights.
    flags = torch.stack([torch.isfinite(value).all() for value in values.values()])
    if not bool(flags.all()):
        name = next(name for name, flag in zip(values, flags.tolist(), strict=True) if not flag)
        raise IntegrityError(
            "A model's weight holds NaN or infinity", where=f"{where} ({name})", hint="get the file again"
        )
    _finite.add(key)


def free_memory() -> None:
    """Give memory of dropped networks back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
