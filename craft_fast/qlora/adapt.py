"""Which weights of the UNet are trained, by ``train.method``, and with kernels that repeat their results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.utils.deterministic
from torch import nn

from craft_fast.qlora.lean import lean_activations
from craft_fast.qlora.lora import add_lora, lora_parameters
from craft_fast.qlora.nf4 import place, quantize_nf4


def prepare_unet(
    unet: Any,
    *,
    method: Literal["lora", "qlora", "full"],
    dtype: torch.dtype,
    rank: int,
    lora_alpha: float,
    target_modules: Sequence[str],
    seed: int,
    nf4_convs: bool = False,
    fused_lora: bool = False,
    lean: bool = False,
    device: torch.device | None = None,
) -> dict[str, nn.Parameter]:
    """Make ``unet`` trainable in place and put it in training mode; all other weights are frozen.

    Args:
        unet: a pristine diffusers UNet.
        method: ``qlora``: NF4 base and LoRA; ``lora``: base as it is and LoRA; ``full``: every weight.
        dtype: dtype of the base (with ``full`` of what is trained), and what NF4 weights are dequantised to.
        rank: LoRA rank.
        lora_alpha: the LoRA's scale is ``lora_alpha / rank``.
        target_modules: name endings of the layers that get an adapter.
        seed: root seed of the adapter's initialisation.
        nf4_convs: ``qlora``: convolutions in NF4 as well.
        fused_lora: adapters by our op, over our own NF4 layers, instead of PEFT's modules over bitsandbytes'.
        lean: blocks keep less for backward, to the same bits: see ``qlora.lean``.
        device: where it is trained, None: where it is. A UNet on the CPU is quantised layer by layer on its way, so
            a GPU never holds more of it than the quantised size and one dense layer.

    Returns:
        The trained parameters by name, in a stable order: LoRA weights in float32, or the UNet's own.
    """
    if method == "qlora":
        quantize_nf4(unet, compute_dtype=dtype, convs=nf4_convs, own_layers=fused_lora, device=device)
    else:
        place(unet, dtype=dtype, device=device)
    if method == "full":
        unet.requires_grad_(True)
        parameters = dict(sorted(unet.named_parameters()))
    else:
        add_lora(
            unet, rank=rank, lora_alpha=lora_alpha, target_modules=target_modules, seed=seed, fused=fused_lora
        )  # fmt: skip
        parameters = lora_parameters(unet)
    if lean:
        lean_activations(unet)
    unet.train()
    return parameters


@contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU, have torch choose kernels that give the same bits each time; on the CPU they do already."""
    if device.type != "cuda":
        yield
        return
    flags: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Must be there before cuBLAS makes its workspace; without it cuBLAS may choose another order of sums.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = False  # it would cost a launch per allocation, and nothing reads such memory
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        flags.fill_uninitialized_memory = fill
