"""The form of the UNet that pictures are drawn with: dense, or in NF4 where memory is short.

NF4 (arXiv 2305.14314) takes 1.33 GB for SDXL's UNet instead of 5.14; it is another UNet, though, and draws other
pictures. Its linear layers are bitsandbytes' own, which PEFT and diffusers' LoRA loader know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from craft_fast.sdxl.weights import guarded

UnetForm = Literal["dense", "nf4"]
FORMS: tuple[UnetForm, ...] = ("dense", "nf4")
_MARK = "craft_fast_form"
# Whose layers replace the model's own when it is trained.
_TRAINERS = ("bitsandbytes", "peft", "craft_fast.qlora")


def load_in_form(
    load: Callable[[torch.device], Any], form: UnetForm, *, device: torch.device, dtype: torch.dtype, where: Path
) -> Any:
    """A UNet in ``form`` on ``device``.

    For NF4 it is loaded in the machine's memory and quantised layer by layer on its way: ``device`` never holds more
    than the quantised UNet and one dense layer.

    Args:
        load: gives the dense UNet, in ``dtype``, on the device it is called with.
        form: ``dense`` or ``nf4``.
        device: where it goes.
        dtype: that NF4 weights are dequantised to.
        where: told in errors.

    Raises:
        ResourceError: it does not fit; others as ``load`` does.
    """
    if form == "dense":
        return load(device)
    from craft_fast.qlora.nf4 import quantize_nf4

    unet = load(torch.device("cpu"))
    guarded(where, lambda: quantize_nf4(unet, compute_dtype=dtype, convs=True, own_layers=False, device=device))
    setattr(unet, _MARK, form)
    return unet.eval()


def is_pristine(unet: Any) -> bool:
    """Whether ``unet`` is as it is on disk: no quantised layers, no adapter, nothing set to train."""
    return _is_untouched(unet) and not _has_layers_of(unet, _TRAINERS)


def is_in_form(unet: Any, form: UnetForm) -> bool:
    """Whether ``unet`` is what ``load_in_form`` gives: in that form, no adapter, nothing set to train."""
    if form == "dense":
        return is_pristine(unet)
    return _is_untouched(unet) and getattr(unet, _MARK, None) == form and not _has_layers_of(unet, ("peft",))


def _is_untouched(unet: Any) -> bool:
    if unet is None or getattr(unet, "peft_config", None):
        return False
    return not any(parameter.requires_grad for parameter in unet.parameters())


def _has_layers_of(unet: Any, packages: tuple[str, ...]) -> bool:
    return any(type(module).__module__.startswith(packages) for module in unet.modules())
