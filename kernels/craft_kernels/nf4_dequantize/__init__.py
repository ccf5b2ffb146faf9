"""Dequantisation of weights in bitsandbytes' 4-bit NormalFloat format, nested scales included, in one launch."""

from craft_kernels.nf4_dequantize.op import nf4_dequantize
from craft_kernels.nf4_dequantize.weight import NF4Weight

__all__ = ["NF4Weight", "nf4_dequantize"]
