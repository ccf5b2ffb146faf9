"""The text encoders with a LoRA's layers in them; a LoRA of the UNet alone leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import LoraLayer
from craft_fast.lora.reading import read_adapter
from craft_fast.sdxl.load import SdxlModel, free_memory

ENCODERS = ("text_encoder", "text_encoder_2")
_NAME = "craft"
SetStrength = Callable[[float], None]


@contextmanager
def tuned_text(model: SdxlModel, result: Path) -> Iterator[SetStrength | None]:
    """The model's text encoders with the layers that a LoRA file has for them, loaded by diffusers.

    Args:
        model: its encoders carry the layers inside the block; after it they are dropped, and their next use loads them.
        result: a LoRA file in any naming.

    Yields:
        A function that sets the strength, from which encoding is by the tuned encoders; None where the file has no
        layer of theirs.

    Raises:
        IntegrityError: the file is damaged, or not all of its layers were loaded.
    """
    wanted = {
        name: layer
        for name, layer in read_adapter(result, model.unet_config).layers.items()
        if not name.startswith("unet.")
    }
    if not wanted:
        yield None
        return
    model.use(*ENCODERS)
    try:
        scaled = _load(model, result, wanted)

        def set_strength(strength: float) -> None:
            for module, scale in scaled:
                module.scaling[_NAME] = scale * strength

        set_strength(1.0)
        yield set_strength
    finally:
        model.text_encoder = model.text_encoder_2 = None
        free_memory()


def _load(model: SdxlModel, result: Path, wanted: Mapping[str, LoraLayer]) -> list[tuple[Any, float]]:
    """Each adapted module with the scale that the file says, ``alpha / rank``.

    diffusers 0.42 looks for layers' own alphas under names with ``text_model.``, which transformers 5.6 took off, and
    gives all of them the commonest one. So it is told of no alpha, and each layer's scale is set by the file's.
    """
    import diffusers

    loader = diffusers.StableDiffusionXLPipeline
    try:
        state, _ = loader.lora_state_dict(result, use_safetensors=True, unet_config=model.unet_config)
        scaled: list[tuple[Any, float]] = []
        for part in ENCODERS:
            own = {
                name.removeprefix(f"{part}."): layer for name, layer in wanted.items() if name.startswith(f"{part}.")
            }
            if not own:
                continue
            encoder = getattr(model, part)
            loader.load_lora_into_text_encoder(
                state, network_alphas=None, text_encoder=encoder, prefix=part, adapter_name=_NAME
            )
            encoder.eval().requires_grad_(False)
            loaded = {_plain(name): module for name, module in encoder.named_modules() if hasattr(module, "lora_A")}
            scaled += [(loaded.pop(_plain(name)), layer.scale) for name, layer in own.items()]
    except KeyError as error:
        raise _not_loaded(result, f"its layer {error} was not loaded") from error
    except Exception as error:  # whatever diffusers and PEFT raise on what they do not know
        raise _not_loaded(result, str(error)) from error
    return scaled


def _plain(name: str) -> str:
    return name.removeprefix("text_model.")


def _not_loaded(result: Path, why: str) -> IntegrityError:
    return IntegrityError("The LoRA's text encoder layers do not load", where=str(result), why=why)
