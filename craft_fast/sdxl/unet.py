"""The UNet apart from the other parts: a pristine one, and one with an exported result in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from craft_fast.errors import IntegrityError
from craft_fast.sdxl.load import SdxlModel, free_memory, load_part, weight_files
from craft_fast.store.safe_load import check_header

ADAPTER_NAME = "craft"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def is_pristine(unet: Any) -> bool:
    """Whether ``unet`` is as loaded: no quantised layers, no adapter, nothing set to train."""
    if unet is None or getattr(unet, "peft_config", None):
        return False
    if any(type(module).__module__.startswith(("bitsandbytes", "peft")) for module in unet.modules()):
        return False
    return not any(parameter.requires_grad for parameter in unet.parameters())


def pristine_unet(model: SdxlModel) -> Any:
    """The unquantised UNet without adapter; read from disk again, and put in ``model``, if training changed it."""
    import diffusers

    if not is_pristine(model.unet):
        model.unet = None
        free_memory()
        model.unet = load_part(diffusers.UNet2DConditionModel, model.path / "unet", model.device, model.dtype)
    return model.unet


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of the weights in a part's folder, from the files' headers alone."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        check_header(path)
        with safe_open(path, "pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


@contextmanager
def tuned_unet(model: SdxlModel, result: Path) -> Iterator[Any]:
    """The UNet with an exported result in it, by the very calls a user of diffusers makes.

    Args:
        model: its pristine UNet carries the LoRA inside the block and is clean again after it.
        result: a LoRA file, loaded as ``pipe.load_lora_weights`` does, or a whole UNet (folder or weights in it).

    Raises:
        IntegrityError: the file is not what export wrote, or its layers are not the UNet's.
    """
    import diffusers

    if result.is_dir() or result.name == WEIGHTS_NAME:
        # Two whole UNets at a time would not fit the card that one fits.
        folder = result if result.is_dir() else result.parent
        model.unet = None
        free_memory()
        unet = load_part(diffusers.UNet2DConditionModel, folder, model.device, model.dtype)
        try:
            yield unet
        finally:
            del unet
            free_memory()
        return
    check_header(result)
    unet = pristine_unet(model)
    loader = diffusers.StableDiffusionXLPipeline
    try:
        state, alphas, metadata = loader.lora_state_dict(result, return_lora_metadata=True, use_safetensors=True)
        loader.load_lora_into_unet(
            state, network_alphas=alphas, unet=unet, adapter_name=ADAPTER_NAME, metadata=metadata
        )
    except Exception as error:
        # A load that fails half way leaves some layers wrapped.
        model.unet = unet = None
        pristine_unet(model)
        raise IntegrityError("The LoRA does not load", where=str(result), why=str(error)) from error
    try:
        yield unet.eval().requires_grad_(False)
    finally:
        unet.unload_lora()
