"""GEGLU in plain PyTorch: the truth that every faster form is held against.

Shapes: D width of the result; ``...`` any leading sizes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def geglu(x: Tensor) -> Tensor:
    """``x[..., :D] * gelu(x[..., D:])``; see ``craft_kernels.geglu.geglu``.

    The very operations of diffusers' GEGLU, so in half precision gelu is rounded before the product, as there.
    Arguments are not checked here.
    """
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)
