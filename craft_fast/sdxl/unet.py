"""The UNet apart from the other parts: a pristine one, and one with an exported result in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from craft_fast.config import ModelSettings
from craft_fast.errors import IntegrityError
from craft_fast.sdxl.drawing_form import is_in_form, is_pristine, load_in_form
from craft_fast.sdxl.load import SdxlModel, free_memory, load_part
from craft_fast.sdxl.prediction import Prediction
from craft_fast.sdxl.source import FolderPart, open_source, stored_shapes
from craft_fast.store.safe_load import check_header

__all__ = [
    "ADAPTER_NAME",
    "WEIGHTS_NAME",
    "BaseUnet",
    "base_unet",
    "drawing_unet",
    "is_pristine",
    "pristine_unet",
    "stored_shapes",
    "tuned_unet",
]

ADAPTER_NAME = "craft"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def pristine_unet(model: SdxlModel) -> Any:
    """The dense UNet without adapter, which training starts from.

    Read from disk, and put in ``model``, if training has changed the one there, or pictures are drawn in another form.
    """
    _drop_unet_unless(model, is_pristine)
    if "unet" not in model.loaded:
        model.unet = model.source.load("unet", model.device, model.dtype)
    return model.unet


def drawing_unet(model: SdxlModel) -> Any:
    """The UNet in ``model.unet_form`` without adapter; loaded again, and put in ``model``, if training changed it."""
    _drop_unet_unless(model, lambda unet: is_in_form(unet, model.unet_form))
    return model.unet


def _drop_unet_unless(model: SdxlModel, wanted: Callable[[Any], bool]) -> None:
    if "unet" in model.loaded and not wanted(model.unet):
        model.unet = None
        free_memory()


class BaseUnet(NamedTuple):
    """What is known of a model's UNet without loading it.

    Attributes:
        where: its folder, or the model's file.
        shapes: name to shape of its weights, in diffusers' naming.
        config_json: content of its ``config.json``.
        config: its configuration, all defaults filled in.
        prediction: what it predicts.
    """

    where: Path
    shapes: dict[str, tuple[int, ...]]
    config_json: bytes
    config: Mapping[str, Any]
    prediction: Prediction


def base_unet(settings: ModelSettings) -> BaseUnet:
    """The UNet that ``model`` names, from headers and configurations alone.

    Raises:
        EnvironmentProblem: missing, or not an SDXL; IntegrityError: pickled or damaged files; ConfigError: a file that
            does not say what it predicts, nor do the settings.
    """
    source = open_source(settings.path, config=settings.config, offline=settings.offline, vae=settings.vae)
    known = source.config("unet"), source.prediction(settings.prediction_type, settings.zero_terminal_snr)
    if isinstance(source.main, FolderPart):
        folder = source.main.folder("unet")
        return BaseUnet(folder, source.main.shapes("unet"), (folder / "config.json").read_bytes(), *known)
    config = {"_class_name": "UNet2DConditionModel", **source.main.config("unet")}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return BaseUnet(source.path, source.main.shapes("unet"), text.encode(), *known)


@contextmanager
def tuned_unet(model: SdxlModel, result: Path, strength: float = 1.0) -> Iterator[Any]:
    """The UNet with an exported result in it, by the very calls a user of diffusers makes.

    Args:
        model: its drawing UNet carries the LoRA inside the block and is clean again after it.
        result: a LoRA file in kohya's or diffusers' keys, loaded as ``pipe.load_lora_weights`` does, or a whole UNet
            (folder or weights in it).
        strength: of the LoRA, as ``pipe.set_adapters`` takes it; a whole UNet has none but 1.

    Raises:
        IntegrityError: the file is damaged, or its layers are not the UNet's, or not all of them were loaded.
    """
    import diffusers

    if result.is_dir() or result.name == WEIGHTS_NAME:
        # Two whole UNets at a time would not fit the card that one fits.
        folder = result if result.is_dir() else result.parent
        model.unet = None
        free_memory()
        unet = load_in_form(
            lambda device: load_part(diffusers.UNet2DConditionModel, folder, device, model.dtype), model.unet_form,
            device=model.device, dtype=model.dtype, where=folder,
        )  # fmt: skip
        try:
            yield unet
        finally:
            del unet
            free_memory()
        return
    check_header(result)
    unet = drawing_unet(model)
    loader = diffusers.StableDiffusionXLPipeline
    try:
        state, alphas, metadata = loader.lora_state_dict(
            result, return_lora_metadata=True, use_safetensors=True, unet_config=unet.config
        )
        loader.load_lora_into_unet(
            state, network_alphas=alphas, unet=unet, adapter_name=ADAPTER_NAME, metadata=metadata
        )
        _require_all_loaded(unet, state)
        unet.set_adapters([ADAPTER_NAME], [strength])
    except Exception as error:
        # A load that fails half way leaves some layers wrapped.
        model.unet = unet = None
        drawing_unet(model)
        raise IntegrityError("The LoRA does not load", where=str(result), why=str(error)) from error
    try:
        yield unet.eval().requires_grad_(False)
    finally:
        unet.unload_lora()


def _require_all_loaded(unet: Any, state: Mapping[str, Any]) -> None:
    """PEFT passes over keys that are no layer's; then the LoRA would do less than it should, in silence."""
    wanted = sum(name.startswith("unet.") for name in state) // 2
    loaded = sum(name.endswith(f".lora_A.{ADAPTER_NAME}") for name, _ in unet.named_modules())
    if loaded != wanted:
        raise ValueError(f"{loaded} of its {wanted} UNet layers were loaded")
