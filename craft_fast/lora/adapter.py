"""A LoRA in memory, whatever file it came from: layers by diffusers' module names.

Shapes: r rank, O out, I in, kh x kw kernel of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One adapted layer, ``W + scale * up @ down`` (arXiv 2106.09685); tensors are as stored.

    Attributes:
        down: [r, I], of a convolution [r, I, kh, kw] (kohya's ``lora_down``, PEFT's ``lora_A``).
        up: [O, r], of a convolution [O, r, 1, 1] (``lora_up``, ``lora_B``).
        alpha: scale is ``alpha / r``; None: not stored, the scale is 1.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """R, the inner size."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """What ``up @ down`` is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the layer's weight: float32 [O, I] or [O, I, kh, kw]."""
        up, down = self.up.float(), self.down.float()
        return ((up.flatten(1) @ down.flatten(1)) * self.scale).view(up.shape[0], *down.shape[1:])


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole LoRA.

    Attributes:
        layers: by ``<component>.<module>``, such as ``unet.down_blocks.1.attentions.0.proj_in`` or
            ``text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj``; the component is one of ``COMPONENTS``.
        metadata: the file's header, text to text.
    """

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)
