"""The NF4 base of QLoRA (arXiv 2305.14314): every linear layer of a UNet in 4 bits, frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from craft_fast.quiet import import_bitsandbytes, quiet_third_party

quiet_third_party()


def quantize_nf4(unet: nn.Module, *, compute_dtype: torch.dtype, double_quant: bool = True) -> int:
    """Replace each ``nn.Linear`` of ``unet`` by bitsandbytes' ``Linear4bit`` in NF4 and freeze the whole model.

    Works on the device the weights are on, layer by layer, so the peak is one layer above the quantised size.
    Convolutions and norms keep their dtype; bitsandbytes quantises linear layers only.

    Args:
        unet: model with floating-point weights; changed in place.
        compute_dtype: dtype that weights are dequantised to in forward and backward.
        double_quant: quantise the block scales as well (0.37 bit a weight less, the paper's section 3).

    Returns:
        How many layers were replaced.
    """
    replaced = 0
    for name, layer in list(unet.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, _to_linear4bit(layer, compute_dtype, double_quant))
            replaced += 1
    unet.requires_grad_(False)
    # PEFT reads this flag to choose its 4-bit LoRA layer.
    unet.is_loaded_in_4bit = True  # type: ignore[assignment]
    return replaced


def _to_linear4bit(layer: nn.Linear, compute_dtype: torch.dtype, double_quant: bool) -> nn.Module:
    bnb = import_bitsandbytes()
    with torch.device("meta"):
        quantized: Any = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
    weight = bnb.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=quantized
    )
    quantized.weight = weight.to(layer.weight.device)
    if layer.bias is not None:
        # In the compute dtype now: Linear4bit would cast its bias in place in the first forward.
        quantized.bias = nn.Parameter(layer.bias.detach().to(compute_dtype), requires_grad=False)
    # In eval mode Linear4bit repacks the weight for an inference kernel that has no backward; we train afterwards.
    quantized.support_avx512bf16_for_cpu = False
    quantized.train(layer.training)
    return quantized  # type: ignore[no-any-return]
