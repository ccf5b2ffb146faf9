"""Group norm and SiLU in plain PyTorch: the truth that every faster form is held against.

Shapes: B samples, C channels, H x W pixels, G groups of C / G channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "none"]


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, activation: Activation = "silu"
) -> Tensor:
    """The normalised, scaled and activated x; see ``craft_kernels.group_norm_silu.group_norm_silu``.

    Where the dtypes of ``x`` and ``weight`` are equal, the very operations of diffusers' resnet blocks, so in half
    precision the norm is rounded before the activation, as there; else in the wider dtype throughout. Arguments are
    not checked here.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    # Not F.group_norm: it refuses one value a group, a 1 x 1 image of C = G channels, for which y = act(bias).
    normed = torch.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    y = (F.silu(normed) if activation == "silu" else normed).to(x.dtype)
    return y.contiguous(memory_format=memory_layout(x))


def memory_layout(tensor: Tensor) -> torch.memory_format:
    """Channels_last for a tensor [B, C, H, W] that lies so and is not contiguous as well, else contiguous."""
    nhwc = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format
