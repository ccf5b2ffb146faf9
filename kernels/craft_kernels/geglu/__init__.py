"""GEGLU, the gated linear unit of SDXL's feed-forward layers, without the projection before it."""

from craft_kernels.geglu.op import geglu

__all__ = ["geglu"]
