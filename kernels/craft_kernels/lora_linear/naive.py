"""A frozen linear layer with a low-rank update in plain PyTorch: the truth that every faster form is held against.

Shapes: M rows (tokens), in and out features, r rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from craft_kernels.nf4_dequantize import NF4Weight


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    """``x W^T + b + scaling (x A^T) B^T``; see ``craft_kernels.lora_linear.lora_linear``.

    Arguments are not checked here and lie in the dtype of ``x``, but for ``weight`` and ``bias``, which are converted.
    """
    dense = weight.dequantize(x.dtype, impl="torch") if isinstance(weight, NF4Weight) else weight.detach().to(x.dtype)
    base = F.linear(x, dense, None if bias is None else bias.detach().to(x.dtype))
    return base + scaling * F.linear(F.linear(x, lora_a), lora_b)
