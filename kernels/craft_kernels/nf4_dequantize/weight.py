"""An NF4 weight as one value: the packed halves of bytes, their scales, and the shape they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_kernels.checks import check_choice
from craft_kernels.dispatch import Impl
from craft_kernels.nf4_dequantize.naive import BLOCK, GROUP
from craft_kernels.nf4_dequantize.op import nf4_dequantize


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """The tensors that ``nf4_dequantize`` takes, N elements; all of them frozen.

    Attributes:
        packed: ceil(N / 2) elements, uint8, the first of two in the high half.
        absmax: [K] float32, K = ceil(N / 64); uint8 where nested.
        shape: of the weight, [out, in] for a linear layer.
        dtype: what the weight was quantised from.
        nested_absmax: [ceil(K / 256)] float32, or None without double quantisation; the same holds for the next two.
        nested_code: [256] float32.
        offset: [] float32.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def from_bitsandbytes(cls, weight: Tensor, quant_state: Any) -> NF4Weight:
        """Views of what bitsandbytes holds, without importing it and without copying the packed weight.

        Args:
            weight: packed, ``Params4bit`` or a plain tensor of any storage dtype.
            quant_state: its ``QuantState``: nf4, blocks of 64, nested blocks of 256. Its ``code`` is not read:
                bitsandbytes does not read it either and has the levels of NF4 built in.

        Raises:
            ValueError: another format, or a weight that is repacked for CPU inference.
        """
        check_choice("quant_state.quant_type", quant_state.quant_type, ("nf4",))
        check_choice("quant_state.blocksize", quant_state.blocksize, (BLOCK,))
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError("weight must be in bitsandbytes' usual order, got one repacked for CPU inference")
        packed = weight.detach().as_subclass(Tensor)
        if packed.dtype != torch.uint8:
            packed = packed.contiguous().view(torch.uint8)
        shape, dtype = tuple(quant_state.shape), quant_state.dtype
        second = quant_state.state2
        if second is None:
            return cls(packed, quant_state.absmax.float(), shape, dtype)
        check_choice("quant_state.state2.blocksize", second.blocksize, (GROUP,))
        return cls(
            packed, quant_state.absmax, shape, dtype,
            second.absmax.float(), second.code.float(), quant_state.offset.float().reshape(()),
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None, *, impl: Impl = "auto") -> Tensor:
        """The weight [*shape] in ``dtype``, by default the one it was quantised from; see ``nf4_dequantize``."""
        return nf4_dequantize(
            self.packed, self.absmax, self.shape, nested_absmax=self.nested_absmax, nested_code=self.nested_code,
            offset=self.offset, dtype=dtype or self.dtype, impl=impl,
        )  # fmt: skip
