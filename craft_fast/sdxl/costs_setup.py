"""The words of the cost formulas: a layer with weights, and how the UNet is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "conv", "norm"]


@dataclass(frozen=True)
class Layer:
    """One layer with weights.

    Attributes:
        name: in the UNet.
        kind: ``linear``, ``conv`` or ``norm``.
        fan_in: input features; for a convolution, input channels times kernel area.
        fan_out: output features.
        bias: whether it has one.
    """

    name: str
    kind: Kind
    fan_in: int
    fan_out: int
    bias: bool = True

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.fan_out if self.kind == "norm" else self.fan_in * self.fan_out

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.weight + (self.fan_out if self.bias else 0)


@dataclass(frozen=True)
class Setup:
    """How the UNet is run.

    Attributes:
        height: of the latents.
        width: of the latents.
        batch: images in one forward.
        tokens: text tokens.
        element: bytes of an activation.
        train: ``lora``: adapters alone; ``full``: all weights, each gradient used and freed at once; None: no backward.
        nf4: linear layers are dequantised for each use.
        nf4_convs: convolutions, too.
        rank: of the adapters.
        targets: name endings of the layers that get one.
        adapter: ``fused``: our op; ``peft``: its modules, which keep what they read in the adapters' float32.
        autocast: under autocast, which PEFT's modules need in low precision.
        lean: blocks that keep less and work it out again (``qlora.lean``), in the form ``torch`` or ``triton``.
        conv: ``torch``, which keeps a convolution's input even where its weight is frozen, or ``frozen``: our op,
            which does not.
        flat_grads: adapters' gradients have memory of their own all the time, as the flat optimizer gives them.
        workspaces: count what GPU libraries take inside an op.
    """

    height: int
    width: int
    batch: int = 1
    tokens: int = 77
    element: int = 2
    train: Literal["lora", "full"] | None = None
    nf4: bool = False
    nf4_convs: bool = False
    rank: int = 16
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    adapter: Literal["fused", "peft"] = "fused"
    autocast: bool = False
    lean: Literal["none", "torch", "triton"] = "none"
    conv: Literal["torch", "frozen"] = "torch"
    flat_grads: bool = False
    workspaces: bool = False
