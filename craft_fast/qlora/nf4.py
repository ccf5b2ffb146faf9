"""The NF4 base of QLoRA (arXiv 2305.14314): the linear layers of a UNet in 4 bits, its convolutions too if asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from craft_fast.quiet import import_bitsandbytes, quiet_third_party

quiet_third_party()

BLOCK, GROUP = 64, 256  # weights that share a scale, scales that share a second scale
# They touch the latents: 4 channels, 23 kB each of SDXL's 2.6 GB, and every error in them reaches the whole image.
KEPT = ("conv_in", "conv_out")


def quantize_nf4(
    unet: nn.Module,
    *,
    compute_dtype: torch.dtype,
    double_quant: bool = True,
    convs: bool = False,
    own_layers: bool = False,
    device: torch.device | None = None,
) -> int:
    """Put each ``nn.Linear`` of ``unet``, and with ``convs`` each ``nn.Conv2d``, in NF4; freeze the whole model.

    Layer by layer, each dense weight freed before the next is quantised: the peak is one layer above the quantised
    size, on ``device`` too where the model comes from elsewhere. Norms, biases, ``conv_in``, ``conv_out`` and
    convolutions that do not pad with zeros stay dense, in ``compute_dtype``.

    Args:
        unet: model with floating-point weights; changed in place.
        compute_dtype: dtype that weights are dequantised to in forward and backward, and of what stays dense.
        double_quant: quantise the block scales as well (0.37 bit a weight less, the paper's section 3).
        convs: convolutions too, as ``NF4Conv2d``.
        own_layers: linear layers as ``NF4Linear``; else as bitsandbytes' ``Linear4bit``, which PEFT knows.
        device: where the model goes; None: each layer stays where it is.

    Returns:
        How many layers were replaced.
    """
    names = quantized_names(unet, convs=convs)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = unet.get_submodule(name)
        if device is not None:
            layer.to(device)
        quantized = _quantized(layer, compute_dtype, double_quant, own_layers)
        setattr(unet.get_submodule(parent), child, quantized.train(layer.training))
    place(unet, dtype=compute_dtype, device=device)
    unet.requires_grad_(False)
    if not own_layers:
        # PEFT reads this flag to choose its 4-bit LoRA layer.
        unet.is_loaded_in_4bit = True  # type: ignore[assignment]
    return len(names)


def quantized_names(unet: nn.Module, *, convs: bool) -> list[str]:
    """Names of the layers that ``quantize_nf4`` replaces in a model that is not yet quantised."""
    from craft_fast.qlora.nf4_layers import NF4Conv2d

    found = []
    for name, layer in unet.named_modules():
        conv = convs and type(layer) is nn.Conv2d and name not in KEPT and NF4Conv2d.takes(layer)
        if type(layer) is nn.Linear or conv:
            found.append(name)
    return found


def place(unet: nn.Module, *, dtype: torch.dtype, device: torch.device | None) -> None:
    """Move ``unet`` to ``device``, and what is not quantised to ``dtype``, tensor by tensor."""
    for module in unet.modules():
        packed = {"weight"} if hasattr(getattr(module, "weight", None), "quant_state") else set()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in packed or hasattr(module, "nf4"):
                continue  # quantised where it shall be
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device or tensor.device, wanted)


def nf4_bytes(count: int, *, double_quant: bool = True) -> int:
    """Bytes of ``count`` weights in NF4: halves of bytes, the scales, and with double quantisation theirs."""
    blocks = -(-count // BLOCK)
    if not double_quant:
        return -(-count // 2) + 4 * blocks
    second = 4 * -(-blocks // GROUP) + 4 * 256 + 4  # scales of scales, their code, their mean
    return -(-count // 2) + blocks + second


def quantized_bytes(unet: nn.Module, *, dtype: torch.dtype, convs: bool = False, double_quant: bool = True) -> int:
    """Bytes that the weights of ``unet`` take after ``quantize_nf4``; nothing is allocated.

    Args:
        unet: not quantised; the meta device will do.
        dtype: of what stays dense.
        convs: as in ``quantize_nf4``.
        double_quant: as in ``quantize_nf4``.
    """
    names = quantized_names(unet, convs=convs)
    counts = [_count(unet.get_submodule(name)) for name in names]
    dense = sum(p.numel() for p in unet.parameters()) - sum(counts)
    return dense * dtype.itemsize + sum(nf4_bytes(count, double_quant=double_quant) for count in counts)


def _count(layer: Any) -> int:
    return int(layer.weight.numel())


def _quantized(layer: Any, compute_dtype: torch.dtype, double_quant: bool, own_layers: bool) -> nn.Module:
    from craft_fast.qlora.nf4_layers import NF4Conv2d, NF4Linear

    if isinstance(layer, nn.Conv2d):
        return NF4Conv2d(layer, compute_dtype=compute_dtype, double_quant=double_quant)
    if own_layers:
        return NF4Linear(layer, compute_dtype=compute_dtype, double_quant=double_quant)
    return _to_linear4bit(layer, compute_dtype, double_quant)


def _to_linear4bit(layer: nn.Linear, compute_dtype: torch.dtype, double_quant: bool) -> nn.Module:
    from craft_fast.qlora.nf4_layers import FlatLinear4bit

    bnb = import_bitsandbytes()
    kind = FlatLinear4bit if layer.in_features % BLOCK else bnb.nn.Linear4bit
    with torch.device("meta"):
        quantized: Any = kind(
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
    return quantized  # type: ignore[no-any-return]
