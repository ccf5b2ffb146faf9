"""Loading an SDXL folder or hub id, safely: safetensors only, every weight finite, every refusal explained."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, IntegrityError, ResourceError
from craft_fast.quiet import import_bitsandbytes, quiet_progress_bars, quiet_third_party
from craft_fast.store.digest import digest_folder, digest_json, sha256_file
from craft_fast.store.run import resolve_uri
from craft_fast.store.safe_load import check_header, conversion_command

quiet_third_party()

T = TypeVar("T")
PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
WEIGHTED = ("text_encoder", "text_encoder_2", "unet", "vae")
PREDICTION_TYPES = ("epsilon", "v_prediction")
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class SdxlModel:
    """The parts of one SDXL, on one device; everything but the VAE (see ``load_sdxl``) in ``dtype``."""

    path: Path
    digest: str
    device: torch.device
    dtype: torch.dtype
    prediction_type: str
    force_zeros_for_empty_prompt: bool
    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any
    vae: Any
    scheduler: Any
    unet_config: Any

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """``(4, h, w)`` of the latents of an image.

        Raises:
            ConfigError: the size is not a multiple of what the UNet and VAE together divide by.
        """
        step = self.vae_scale_factor * 2 ** (len(self.unet_config.block_out_channels) - 1)
        if height_px % step or width_px % step:
            raise ConfigError(
                "The image size does not fit the model",
                where="generate.height_px, generate.width_px",
                why=f"found {height_px} x {width_px}; both must be multiples of {step}",
            )
        return int(self.unet_config.in_channels), height_px // self.vae_scale_factor, width_px // self.vae_scale_factor


def pick_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        EnvironmentProblem: a GPU was asked for and torch sees none.
        ConfigError: the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "No such device", where="model.device", why=f"found {name!r}; allowed: auto, cpu, cuda, cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(
            "The GPU is not there",
            where="model.device",
            why=f"asked for {name}; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs",
            hint="craft-fast doctor, or --set model.device=cpu",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that computes in it, else float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if bf16 else torch.float32
    if name not in _DTYPES:
        raise ConfigError(
            "No such dtype", where="model.dtype", why=f"found {name!r}; allowed: auto, {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def model_folder(path: Path | str) -> Path:
    """The local folder of ``path`` (folder, ``package:NAME/FOLDER`` or hub id), with all of SDXL's parts in it.

    A hub id is fetched into the hub's cache first, safetensors, JSON and text only.

    Raises:
        EnvironmentProblem: missing, or not an SDXL.
        IntegrityError: weights that are pickles or damaged.
    """
    resolved = resolve_uri(str(path))
    folder = resolved if isinstance(resolved, Path) else _fetch(resolved)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise EnvironmentProblem(
            "Not an SDXL folder in diffusers' layout",
            where=str(folder),
            why=f"missing: {', '.join(missing)}",
            hint="set model.path to a folder that StableDiffusionXLPipeline.from_pretrained opens",
        )
    for part in WEIGHTED:
        for file in weight_files(folder / part):
            check_header(file)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model part: the full-precision ones, or the fp16 variant where only that is.

    Raises:
        IntegrityError: there are only pickles.
        EnvironmentProblem: there are no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    full = [file for file in files if ".fp16" not in file.suffixes and ".fp16-" not in file.name]
    if full or files:
        return full or files
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise IntegrityError(
            "Pickled weights are refused: loading one runs whatever code it holds",
            where=str(pickles[0]),
            hint="if you trust where they come from, convert them with: " + conversion_command(pickles[0]),
        )
    raise EnvironmentProblem("A model folder holds no weights", where=str(folder), why="no *.safetensors in it")


def model_digest(path: Path | str) -> str:
    """Digest of all parts that are used, without loading them; hashed once per process and file."""
    folder = model_folder(path)
    parts: dict[str, Any] = {part: digest_folder(folder / part) for part in PARTS}
    index = folder / "model_index.json"
    parts["model_index"] = sha256_file(index) if index.is_file() else None
    return digest_json(parts)


def load_sdxl(
    path: Path | str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    prediction_type: str = "auto",
) -> SdxlModel:
    """Load all parts for inference: eval mode, no gradients.

    The VAE stays in float32 when ``dtype`` is float16, which overflows in SDXL's decoder.

    Args:
        path: diffusers folder, ``package:NAME/FOLDER`` or hub id.
        device: a device, or ``auto``.
        dtype: a dtype, its name, or ``auto``.
        prediction_type: what the UNet predicts; ``auto`` reads the scheduler's config.

    Raises:
        EnvironmentProblem: missing, or not an SDXL; IntegrityError: pickled, damaged or non-finite weights;
        ResourceError: it does not fit the device.
    """
    folder = model_folder(path)
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    with contextlib.suppress(ImportError):
        import_bitsandbytes()
    import diffusers
    import transformers

    quiet_progress_bars()
    scheduler = _guard(folder / "scheduler", lambda: _scheduler(folder))
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    unet = load_part(diffusers.UNet2DConditionModel, folder / "unet", device, dtype)
    return SdxlModel(
        path=folder,
        digest=model_digest(folder),
        device=device,
        dtype=dtype,
        prediction_type=_prediction_type(scheduler, prediction_type, folder),
        force_zeros_for_empty_prompt=_force_zeros(folder),
        tokenizer=_guard(
            folder / "tokenizer", lambda: transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        ),
        tokenizer_2=_guard(
            folder / "tokenizer_2", lambda: transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        ),
        text_encoder=load_part(transformers.CLIPTextModel, folder / "text_encoder", device, dtype),
        text_encoder_2=load_part(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2", device, dtype),
        unet=unet,
        vae=load_part(diffusers.AutoencoderKL, folder / "vae", device, vae_dtype),
        scheduler=scheduler,
        unet_config=unet.config,
    )


def load_part(cls: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One network of the folder in eval mode, without gradients, its weights checked for NaN and infinity."""
    files = weight_files(folder)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if all(".fp16" in file.name for file in files):
        options["variant"] = "fp16"
    # transformers and diffusers name the same option differently.
    options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = dtype
    part: nn.Module = _guard(folder, lambda: cls.from_pretrained(folder, **options))
    try:
        part = part.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The model does not fit into the GPU's memory",
            where=str(folder),
            why=str(error).splitlines()[0],
            hint="free the GPU, or --set model.dtype=bfloat16, or --set model.device=cpu",
        ) from error
    for name, value in part.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                "A model's weight holds NaN or infinity", where=f"{folder} ({name})", hint="get the file again"
            )
    return part


def unload(model: SdxlModel) -> None:
    """Free the networks' memory; ``model`` is of no use afterwards."""
    for part in WEIGHTED:
        setattr(model, part, None)
    free_memory()


def free_memory() -> None:
    """Give memory of dropped networks back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _guard(where: Path, load: Callable[[], T]) -> T:
    """Turn what a library raises on a bad file into an error a user can act on."""
    try:
        return load()
    except CraftError:
        raise
    except Exception as error:
        raise IntegrityError(
            "A part of the model cannot be loaded",
            where=str(where),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            hint="get the model again, or check that its config.json belongs to its weights",
        ) from error


def _scheduler(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, config["_class_name"])
    return cls.from_config(config)


def _prediction_type(scheduler: Any, wanted: str, folder: Path) -> str:
    found = str(scheduler.config.get("prediction_type", "epsilon")) if wanted == "auto" else wanted
    if found not in PREDICTION_TYPES:
        raise ConfigError(
            "This kind of prediction is not supported",
            where=str(folder / "scheduler"),
            why=f"found {found!r}; allowed: {', '.join(PREDICTION_TYPES)}",
            hint="--set model.prediction_type=epsilon, if the model was trained that way",
        )
    return found


def _force_zeros(folder: Path) -> bool:
    index = folder / "model_index.json"
    if not index.is_file():
        return True
    return bool(json.loads(index.read_text(encoding="utf-8")).get("force_zeros_for_empty_prompt", True))


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt")]
    patterns += [f"{part}/*.safetensors" for part in WEIGHTED] + ["model_index.json"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:
        raise EnvironmentProblem(
            "The model is neither a folder nor to be had from the hub",
            where=hub_id,
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            hint="check the name and the network, or set model.path to a local folder",
        ) from error
