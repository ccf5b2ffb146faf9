"""A linear layer with its adapter as one op, and a UNet's target layers in that form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.qlora.nf4_layers import NF4Linear
from craft_kernels.lora_linear import lora_linear


class FusedLoraLinear(nn.Module):
    """``W x + b + scaling B A x`` (LoRA, arXiv 2106.09685) by ``craft_kernels.lora_linear``; no dropout.

    Args:
        base: frozen layer, ``nn.Linear`` or ``NF4Linear``; becomes ``base_layer``.
        lora_a: [rank, in] float32, trained; becomes ``lora_A``.
        lora_b: [out, rank] float32, trained; becomes ``lora_B``.
        scaling: lora_alpha / rank.
    """

    def __init__(self, base: nn.Linear | NF4Linear, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> None:
        super().__init__()
        self.base_layer: nn.Linear | NF4Linear = base
        self.lora_A, self.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.scaling = scaling

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.base_layer.out_features

    @property
    def bias(self) -> Tensor | None:
        """[out], frozen, or None."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``x``, which is that of the base; under autocast in autocast's."""
        base = self.base_layer
        weight = base.nf4 if isinstance(base, NF4Linear) else base.weight
        return lora_linear(x, weight, self.lora_A, self.lora_B, scaling=self.scaling, bias=self.bias)

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling}"


def target_names(unet: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names of the modules that are, or end in, one of ``target_modules``, as PEFT matches a list of them; sorted."""
    return sorted(
        name
        for name, _ in unet.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    )


def fuse(unet: nn.Module, name: str, *, rank: int, scaling: float) -> FusedLoraLinear:
    """Replace the layer ``name`` of ``unet`` by a ``FusedLoraLinear`` whose factors hold nothing yet.

    Raises:
        TypeError: it is another kind of layer.
    """
    base: Any = unet.get_submodule(name)
    if type(base) not in (nn.Linear, NF4Linear):
        raise TypeError(f"{name} is a {type(base).__name__}")
    device = base.packed.device if isinstance(base, NF4Linear) else base.weight.device
    factors = [
        torch.empty(shape, dtype=torch.float32, device=device)
        for shape in ((rank, base.in_features), (base.out_features, rank))
    ]
    layer = FusedLoraLinear(base, *factors, scaling=scaling).train(base.training)
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, layer)
    return layer
