"""Layers whose frozen weight is packed in NF4 (arXiv 2305.14314) and dequantised anew in each forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.qlora.frozen import frozen_conv2d, nf4_linear
from craft_fast.quiet import import_bitsandbytes, quiet_third_party
from craft_kernels.nf4_dequantize import NF4Weight

quiet_third_party()
_bnb: Any = import_bitsandbytes()

_PARTS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")


def quantize_weight(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """``weight`` in NF4 by bitsandbytes' quantiser, on the device it is on, blocks of 64 in memory order.

    Args:
        weight: any shape, float32, float16 or bfloat16.
        double_quant: quantise the block scales as well.
    """
    packed, state = _bnb.functional.quantize_4bit(
        weight.detach(), quant_type="nf4", compress_statistics=double_quant, blocksize=64
    )
    return NF4Weight.from_bitsandbytes(packed, state)


class _NF4Layer(nn.Module):
    """Packed weight and bias as buffers: they move with the module, have no gradient, and scales keep their dtype."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.shape, self.source_dtype = tuple(weight.shape), weight.dtype
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)

    @property
    def nf4(self) -> NF4Weight:
        """The weight as craft_kernels takes it; references, no copies."""
        packed, absmax, *nested = (getattr(self, name) for name in _PARTS)
        return NF4Weight(packed, absmax, self.shape, self.source_dtype, *nested)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _NF4Layer:
        # `.to(torch.bfloat16)` and `.half()` are for weights; a rounded scale would be another weight.
        kept = {name: getattr(self, name) for name in _PARTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            now = getattr(self, name)
            if before is not None and now.dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self


class NF4Linear(_NF4Layer):
    """A frozen ``nn.Linear`` in NF4: [..., in] -> [..., out] in the dtype of its input, or autocast's.

    Args:
        layer: floating-point weight [out, in] (float32, float16 or bfloat16); copied, not kept.
        compute_dtype: dtype of the bias, so that no forward converts it.
        double_quant: quantise the block scales as well.
    """

    def __init__(self, layer: nn.Linear, *, compute_dtype: torch.dtype, double_quant: bool = True) -> None:
        weight = quantize_weight(layer.weight, double_quant=double_quant)
        super().__init__(weight, None if layer.bias is None else layer.bias.detach().to(compute_dtype, copy=True))
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``; see ``craft_fast.qlora.frozen.nf4_linear``."""
        return nf4_linear(x, self.nf4, self.bias)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` says it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Conv2d(_NF4Layer):
    """A frozen ``nn.Conv2d`` in NF4: [B, I, H, W] -> [B, O, H', W'].

    The weight is packed in the order [O, k, l, I / G]. With I / G a multiple of 64, as in all of SDXL's but
    ``conv_in``, a block holds one tap of one output channel; and the dequantised weight is channels_last uncopied.

    Args:
        layer: padded with zeros by numbers; weight in float32, float16 or bfloat16; copied, not kept.
        compute_dtype: dtype of the bias.
        double_quant: quantise the block scales as well.
    """

    def __init__(self, layer: nn.Conv2d, *, compute_dtype: torch.dtype, double_quant: bool = True) -> None:
        rows = layer.weight.detach().permute(0, 2, 3, 1).contiguous()
        weight = quantize_weight(rows, double_quant=double_quant)
        super().__init__(weight, None if layer.bias is None else layer.bias.detach().to(compute_dtype, copy=True))
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        assert not isinstance(layer.padding, str)
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    @staticmethod
    def takes(layer: nn.Conv2d) -> bool:
        """Whether the layer pads with zeros by numbers, which is all that is built here."""
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution; see ``craft_fast.qlora.frozen.frozen_conv2d``."""
        return frozen_conv2d(
            x, self.nf4, self.bias,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As ``nn.Conv2d`` says it, in short."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class FlatLinear4bit(_bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer for rows that are no multiple of 64, right on a CPU too, and for PEFT still its own kind.

    bitsandbytes 0.50's CPU code takes the scales of other rows then; on a GPU it does not. See ``frozen.dequantize``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` computed in ``compute_dtype``, in the dtype of ``x``."""
        weight = NF4Weight.from_bitsandbytes(self.weight, self.weight.quant_state)
        return nf4_linear(x.to(self.compute_dtype), weight, self.bias).to(x.dtype)
