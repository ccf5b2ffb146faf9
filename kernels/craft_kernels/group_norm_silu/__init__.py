"""Group norm with or without SiLU behind it, in channels_last as in contiguous memory."""

from craft_kernels.group_norm_silu.naive import Activation
from craft_kernels.group_norm_silu.op import group_norm_silu

__all__ = ["Activation", "group_norm_silu"]
