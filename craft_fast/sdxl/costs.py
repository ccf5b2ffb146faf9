"""What the UNet costs before it is loaded: weights, activations, adapters, floating-point operations, unit by unit.

Everything follows from the UNet's configuration. Activations are not fitted: ``costs_unet`` walks through the same ops
as diffusers on tensors without content, and a test holds the result against the real network on the meta device.
Sizes are bytes, a multiply-add counts as two operations. Constants at the top that are estimates say so.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from craft_fast.sdxl.costs_ledger import Ledger, Shadow
from craft_fast.sdxl.costs_setup import Setup
from craft_fast.sdxl.costs_unet import UnetWalk
from craft_fast.sdxl.costs_weights import (
    TARGETS,
    Method,
    adapted_layers,
    freeze,
    layers,
    lora_parameters,
    optimizer_bytes,
    parameters,
    trained_sizes,
    unet_weight_bytes,
)

__all__ = [
    "TARGETS",
    "Method",
    "Pass",
    "TrainingMemory",
    "UnitCost",
    "adapted_layers",
    "by_worth",
    "choose_kept",
    "layers",
    "lora_parameters",
    "optimizer_bytes",
    "parameters",
    "step_flops",
    "training_memory",
    "unet_pass",
    "unet_setup",
    "unet_weight_bytes",
    "unit_names",
    "units",
]

OptimizerKind = Literal["flat", "bitsandbytes", "fused_backward"]

MIB = 1024**2
# Of a process on the GPU, before a tensor is made: kernels of torch, cuBLAS and cuDNN with their handles.
# ESTIMATE, 300 to 500 MB are reported for cards of this kind.
CONTEXT_BYTES = 450 * MIB
# cuBLAS' workspace of a stream, which the allocator hands out: 4096 KiB times 8 (PyTorch's CUBLAS_WORKSPACE_CONFIG),
# on Hopper 32 MiB as well; twice, since a graph is recorded on a stream of its own.
CUBLAS_BYTES = 2 * 32 * MIB
# What the allocator holds beyond what is handed out: blocks are rounded up to 2 MiB, and holes stay. ESTIMATE.
FRAGMENTATION = 0.03
# A recorded step: about 10 kB for each of its kernels, outside the allocator. ESTIMATE.
GRAPH_BYTES = 96 * MIB


@dataclass(frozen=True)
class UnitCost:
    """One ResnetBlock2D or BasicTransformerBlock.

    Attributes:
        name: of the module in the UNet.
        kind: ``resnet`` or ``transformer``.
        flops: of one forward.
        saved_bytes: kept for backward beside its input when it is not recomputed.
        boundary_bytes: its input, which is kept in any case.
        transient_bytes: needed on top while it is recomputed and gone through backward, its own gradients included.
    """

    name: str
    kind: Literal["resnet", "transformer"]
    flops: float
    saved_bytes: int
    boundary_bytes: int
    transient_bytes: int


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of a training step, by what it is for.

    Attributes:
        weights: of the UNet, packed where they are quantised.
        adapter: trained parameters that are not among the weights.
        gradients: that have memory all the time; others are in ``activations``.
        optimizer: its state.
        activations: the most that forward and backward need at once, with transients.
        runtime: workspaces of libraries.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.runtime

    @property
    def reserved(self) -> int:
        """What the allocator takes from the GPU for it."""
        return int(self.total * (1 + FRAGMENTATION))


# ---- one run through the network


@dataclass(frozen=True)
class Pass:
    """One forward, and backward if there is one.

    Attributes:
        peak_bytes: most bytes of activations at once, the inputs' included.
        forward_flops: operations of forward.
        backward_flops: of backward with recomputation.
    """

    peak_bytes: int
    forward_flops: float
    backward_flops: float


@lru_cache(maxsize=4096)
def _pass(frozen: str, setup: Setup, recomputed: frozenset[str]) -> Pass:
    ledger = Ledger()
    walk = UnetWalk(json.loads(frozen), setup, ledger, recomputed)
    last = [walk.run()]
    forward = ledger.flops
    if setup.train is not None:
        elements = last[0].size // setup.element
        # The prediction in float32, its difference to the target, and the gradient of that.
        ledger.scratch(3 * 4 * elements)
        ledger.backward(last.pop(), elements * setup.element)
    return Pass(ledger.peak, forward, ledger.flops - forward)


def unet_setup(
    *,
    height_px: int,
    width_px: int,
    batch: int,
    vae_scale_factor: int = 8,
    tokens: int = 77,
    dtype_bytes: int = 2,
    method: Method | None = None,
    nf4_convs: bool = False,
    rank: int = 16,
    target_modules: Sequence[str] = TARGETS,
    optimizer: OptimizerKind = "flat",
    lora: Literal["fused", "peft"] = "fused",
    autocast: bool = False,
    lean: Literal["none", "torch", "triton"] = "none",
    workspaces: bool = True,
) -> Setup:
    """Settings of a run as a walk takes them; ``method`` None is a forward without gradients."""
    low_rank = method in ("lora", "qlora")
    return Setup(
        height=height_px // vae_scale_factor,
        width=width_px // vae_scale_factor,
        batch=batch,
        tokens=tokens,
        element=dtype_bytes,
        train=None if method is None else "full" if method == "full" else "lora",
        nf4=method == "qlora",
        nf4_convs=method == "qlora" and nf4_convs,
        rank=rank,
        targets=tuple(target_modules),
        adapter=lora,
        autocast=autocast,
        lean=lean,
        conv="frozen" if low_rank and (lean != "none" or (method == "qlora" and nf4_convs)) else "torch",
        flat_grads=low_rank and optimizer == "flat",
        workspaces=workspaces,
    )


def unet_pass(unet_config: Mapping[str, Any], setup: Setup, kept: Collection[str] | None = None) -> Pass:
    """Peak activations and operations of one run.

    Args:
        unet_config: the UNet's configuration.
        setup: from ``unet_setup``.
        kept: units whose activations are kept for backward; None keeps all.
    """
    frozen = freeze(unet_config)
    recomputed = frozenset() if kept is None else frozenset(_names(frozen)) - frozenset(kept)
    return _pass(frozen, setup, recomputed)


@lru_cache(maxsize=8)
def _names(frozen: str) -> tuple[str, ...]:
    config = json.loads(frozen)
    side = 2 ** len(config["block_out_channels"])
    walk = UnetWalk(config, Setup(side, side), Ledger())
    walk.run()
    return tuple(unit.name for unit in walk.units)


def unit_names(unet_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of all units, in the order in which they run."""
    return _names(freeze(unet_config))


@lru_cache(maxsize=64)
def _units(frozen: str, setup: Setup) -> tuple[UnitCost, ...]:
    walk = UnetWalk(json.loads(frozen), setup, Ledger())
    walk.run()
    found: list[UnitCost] = []
    for unit in walk.units:
        alone, x = walk.alone(unit)
        out = unit.run(alone, x)
        flops = alone.ledger.flops
        saved = alone.ledger.live - x.size - out.size
        transient = alone.ledger.peak - x.size
        if out.node is not None:
            alone.ledger.peak = alone.ledger.live
            last: list[Shadow] = [out]
            del out
            alone.ledger.backward(last.pop(), unit.input_bytes)
            transient = max(transient, alone.ledger.peak - x.size)
        found.append(UnitCost(unit.name, unit.kind, flops, max(0, saved), unit.input_bytes, transient))
    return tuple(found)


def units(
    unet_config: Mapping[str, Any],
    *,
    height_px: int,
    width_px: int,
    batch: int,
    dtype_bytes: int = 2,
    method: Method = "lora",
    **options: Any,
) -> list[UnitCost]:
    """What each unit costs in training, in the order in which they run.

    Args:
        unet_config: the UNet's configuration.
        height_px: of the images.
        width_px: of the images.
        batch: samples in one forward.
        dtype_bytes: of an activation.
        method: ``train.method``.
        options: see ``unet_setup``.
    """
    setup = unet_setup(
        height_px=height_px, width_px=width_px, batch=batch, dtype_bytes=dtype_bytes, method=method, **options
    )
    return list(_units(freeze(unet_config), setup))


# ---- a training step


def training_memory(
    unet_config: Mapping[str, Any],
    *,
    height_px: int,
    width_px: int,
    micro_batch: int,
    method: Method,
    nf4_convs: bool = False,
    rank: int = 16,
    target_modules: Sequence[str] = TARGETS,
    optimizer: OptimizerKind = "flat",
    kept: Collection[str] | None = None,
    grad_accum_steps: int = 1,
    dtype_bytes: int = 2,
    gpu: bool = True,
    **options: Any,
) -> TrainingMemory:
    """Peak memory of a training step.

    Args:
        unet_config: the UNet's configuration.
        height_px: of the images.
        width_px: of the images.
        micro_batch: samples in one forward.
        method: ``train.method``.
        nf4_convs: ``train.nf4_convs``.
        rank: of the adapter.
        target_modules: layers that get one.
        optimizer: the kind in use.
        kept: units whose activations are kept for backward; None keeps all.
        grad_accum_steps: with more than one, ``full`` must hold a gradient for every weight.
        dtype_bytes: of weights and activations.
        gpu: count workspaces of GPU libraries.
        options: see ``unet_setup``.
    """
    setup = unet_setup(
        height_px=height_px, width_px=width_px, batch=micro_batch, dtype_bytes=dtype_bytes, method=method,
        nf4_convs=nf4_convs, rank=rank, target_modules=target_modules, optimizer=optimizer, workspaces=gpu, **options,
    )  # fmt: skip
    sizes = trained_sizes(unet_config, method, rank, target_modules)
    full = method == "full"
    element = dtype_bytes if full else 4
    gradients = sum(sizes) * element if setup.flat_grads or (full and grad_accum_steps > 1) else 0
    return TrainingMemory(
        weights=unet_weight_bytes(unet_config, method, nf4_convs, dtype_bytes=dtype_bytes),
        adapter=0 if full else sum(sizes) * element,
        gradients=gradients,
        optimizer=optimizer_bytes(sizes),
        activations=unet_pass(unet_config, setup, kept).peak_bytes,
        runtime=CUBLAS_BYTES if gpu else 0,
    )


def by_worth(costs: Sequence[UnitCost]) -> list[UnitCost]:
    """Units in the order in which keeping their activations pays: operations saved a byte, best first.

    Units through which no gradient goes keep nothing and come first.
    """
    return sorted(costs, key=lambda unit: -unit.flops / unit.saved_bytes if unit.saved_bytes else float("-inf"))


def choose_kept(
    unet_config: Mapping[str, Any],
    *,
    height_px: int,
    width_px: int,
    micro_batch: int,
    method: Method,
    nf4_convs: bool = False,
    rank: int = 16,
    target_modules: Sequence[str] = TARGETS,
    optimizer: OptimizerKind = "flat",
    budget_bytes: float,
    **options: Any,
) -> tuple[str, ...]:
    """Units whose activations to keep for backward: as many as fit, those first that save most time a byte.

    The choice for a larger budget contains that for a smaller one. Where not even recomputing all of them fits, the
    answer is the units that keep nothing anyway.

    Args:
        unet_config: the UNet's configuration.
        height_px: of the images.
        width_px: of the images.
        micro_batch: samples in one forward.
        method: ``train.method``; the next four as in ``training_memory``.
        nf4_convs: likewise.
        rank: likewise.
        target_modules: likewise.
        optimizer: likewise.
        budget_bytes: that ``TrainingMemory.reserved`` may reach; infinity keeps all.
        options: see ``training_memory`` and ``unet_setup``.
    """
    common: dict[str, Any] = {
        "height_px": height_px, "width_px": width_px, "method": method, "nf4_convs": nf4_convs, "rank": rank,
        "target_modules": target_modules, "optimizer": optimizer,
    }  # fmt: skip
    walk_options = {name: value for name, value in options.items() if name not in ("grad_accum_steps", "gpu")}
    order = by_worth(units(unet_config, batch=micro_batch, **common, **walk_options))
    names = [unit.name for unit in order]

    def fits(count: int) -> bool:
        memory = training_memory(unet_config, micro_batch=micro_batch, kept=names[:count], **common, **options)
        return memory.reserved <= budget_bytes

    low = sum(unit.saved_bytes == 0 for unit in order)
    high = len(names)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    chosen = set(names[:low])
    return tuple(name for name in unit_names(unet_config) if name in chosen)


def step_flops(
    unet_config: Mapping[str, Any], *, setup: Setup, kept: Collection[str] | None = None
) -> tuple[float, float]:
    """Operations of a training step on ``setup.batch`` samples: with this recomputation, and without any."""
    with_it, without = unet_pass(unet_config, setup, kept), unet_pass(unet_config, setup, None)
    return with_it.forward_flops + with_it.backward_flops, without.forward_flops + without.backward_flops


def inference_setup(setup: Setup, batch: int) -> Setup:
    """The same network in a forward without gradients."""
    return replace(setup, batch=batch, train=None, flat_grads=False, nf4=False, nf4_convs=False)
