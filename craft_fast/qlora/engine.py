"""How a training is laid onto the machine: which form of adapter, optimizer and attention, what is computed again.

None of these choices changes the method; they change speed, memory and the last bits.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from craft_fast.config import EngineSettings, TrainSettings
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.optim import Kind, Optimizer, make_optimizer, optimizer_kind
from craft_fast.qlora.recompute import recompute, unit_names
from craft_fast.sdxl.attention import set_attention
from craft_fast.sdxl.costs import choose_kept
from craft_fast.sdxl.graph import compile_blocks
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.unet import pristine_unet
from craft_kernels.dispatch import choose

Method = Literal["lora", "qlora", "full"]


@dataclass(frozen=True)
class Choices:
    """The ``engine`` section with every ``auto`` decided.

    Attributes:
        method: ``train.method``.
        lora: form of the adapter.
        optimizer: kind of the optimizer.
        autocast: whether the UNet runs under autocast.
        graph: whether steps are recorded.
        compile: whether transformer blocks are compiled.
        attention: what was asked for.
    """

    method: Method
    lora: Literal["fused", "peft"]
    optimizer: Kind
    autocast: bool
    graph: bool
    compile: bool
    attention: Literal["auto", "sdpa", "xformers"]

    @property
    def lean(self) -> bool:
        """Whether blocks keep less for backward; autocast and a compiler decide that themselves."""
        return self.lora == "fused" and not self.autocast and not self.compile

    def record(self) -> dict[str, str]:
        """What bit-identity of a training depends on, for its checkpoints."""
        names = ("lora", "optimizer", "autocast", "graph", "compile", "attention")
        return {f"engine.{name}": str(getattr(self, name)) for name in names}


def decide(
    engine: EngineSettings, *, method: str, device: torch.device, dtype: torch.dtype, several_sizes: bool = False
) -> Choices:
    """Decide every ``auto``.

    PEFT's adapters are float32 in a UNet of another dtype and need autocast there; ours convert for themselves.

    Samples of several sizes are trained without ``torch.compile``, which makes code for one shape at a time and leaves
    what comes after the eighth (``torch._dynamo.config.recompile_limit``) as it is: bits would depend on which shapes
    came first since the run was last continued.

    Args:
        engine: the settings.
        method: ``lora``, ``qlora`` or ``full``.
        device: where training runs.
        dtype: of the UNet.
        several_sizes: whether samples are.

    Raises:
        ValueError: ``method`` is still ``auto``.
    """
    if method not in ("lora", "qlora", "full"):
        raise ValueError(f"train.method must be decided before training, got {method!r}")
    cuda = device.type == "cuda"
    lora = engine.lora if engine.lora != "auto" else "fused"
    kind = optimizer_kind(engine.optimizer, method=method, device=device)
    mixed = method != "full" and lora == "peft"
    return Choices(
        method=method,  # type: ignore[arg-type]
        lora=lora,
        optimizer=kind,
        autocast=dtype != torch.float32 and (engine.autocast or mixed),
        graph=engine.graph and cuda and kind != "fused_backward",
        compile=engine.compile and not several_sizes,
        attention="sdpa" if engine.attention == "auto" else engine.attention,
    )


def environment(device: torch.device) -> dict[str, str]:
    """What bit-identity of a training depends on besides its settings and choices, for its checkpoints."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    names = ["torch", "bitsandbytes", "peft", "diffusers"]
    # The form that craft_kernels' ops take, and what compiles them: their last bits depend on both.
    kernels = choose("auto", torch.empty(0, device=device))
    if kernels == "triton":
        names.append("triton")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": name, "threads": str(torch.get_num_threads()), "kernels": kernels, **versions}


@dataclass
class Trainee:
    """A UNet that is ready to be trained.

    Attributes:
        unet: in training mode.
        parameters: what is trained, by name.
        optimizer: over these.
        units: names of the blocks that can recompute their activations.
        kept: those that keep them.
    """

    unet: Any
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    units: tuple[str, ...]
    kept: frozenset[str]

    def recompute_all(self) -> bool:
        """Let every block recompute from here on, which changes no bit; False where they all do already."""
        if not self.kept:
            return False
        self.kept = frozenset()
        recompute(self.unet, kept=())
        return True


def make_trainee(
    model: SdxlModel,
    choices: Choices,
    settings: TrainSettings,
    *,
    seed: int,
    latent_size: tuple[int, int],
    tokens: int,
    micro_batch_size: int,
    memory_bytes: float | None,
) -> Trainee:
    """The UNet with adapter, optimizer, attention and recomputation as chosen.

    Where parts do not stay on the device, its dense weights come through the machine's memory: a GPU that holds
    the quantised UNet need not have room for the dense one, and ``model`` does not keep it.

    Args:
        model: the SDXL; where its UNet is loaded, it is changed in place.
        choices: from :func:`decide`.
        settings: the ``train`` section.
        seed: root seed.
        latent_size: height and width of the latents; of several sizes the largest.
        tokens: length of the prompts' embeddings.
        micro_batch_size: samples in one forward.
        memory_bytes: what training may use of the device, for ``gradient_checkpointing: auto``; None: not known,
            nothing is recomputed until memory runs out.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    unet, device = _own_unet(model)
    parameters = prepare_unet(
        unet, method=choices.method, dtype=model.dtype, rank=settings.rank, lora_alpha=settings.lora_alpha,
        target_modules=settings.target_modules, seed=seed, nf4_convs=settings.nf4_convs,
        fused_lora=choices.lora == "fused", lean=choices.lean, device=device,
    )  # fmt: skip
    set_attention(unet, choices.attention)
    if choices.compile:
        compile_blocks(unet)
    units = tuple(unit_names(unet))
    kept = frozenset(units)
    if settings.gradient_checkpointing == "all":
        kept = frozenset()
    elif settings.gradient_checkpointing == "auto" and memory_bytes is not None:
        kept &= frozenset(
            choose_kept(
                model.unet_config, height_px=latent_size[0] * model.vae_scale_factor,
                width_px=latent_size[1] * model.vae_scale_factor, vae_scale_factor=model.vae_scale_factor,
                micro_batch=micro_batch_size, method=choices.method, nf4_convs=settings.nf4_convs, rank=settings.rank,
                target_modules=settings.target_modules, optimizer=choices.optimizer,
                budget_bytes=memory_bytes,
                grad_accum_steps=settings.grad_accum_steps, dtype_bytes=model.dtype.itemsize, tokens=tokens,
                lora=choices.lora, autocast=choices.autocast,
                lean="torch" if choices.lean else "none", gpu=model.device.type == "cuda",
            )
        )  # fmt: skip
    recompute(unet, kept=kept)
    # After the UNet is where it stays: the optimizer lays parameters and gradients into its own memory.
    optimizer = make_optimizer(
        parameters, kind=choices.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm, seed=seed,
    )  # fmt: skip
    return Trainee(unet, parameters, optimizer, units, kept)


def _own_unet(model: SdxlModel) -> tuple[Any, torch.device]:
    """The pristine UNet, and where it shall go."""
    if model.resident:
        return pristine_unet(model), model.device
    model.rest()
    return model.source.load("unet", torch.device("cpu"), model.dtype), model.device
