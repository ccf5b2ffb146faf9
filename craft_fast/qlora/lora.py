"""LoRA adapters (arXiv 2106.09685) on a UNet, by PEFT, with an initialisation that is a function of the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.errors import ConfigError, IntegrityError
from craft_fast.quiet import import_bitsandbytes
from craft_fast.rng import derive_seed, generator

ADAPTER = "default"


def add_lora(unet: Any, *, rank: int, lora_alpha: float, target_modules: Sequence[str], seed: int) -> list[str]:
    """Freeze ``unet`` and add ``W x + (lora_alpha / rank) B A x`` to its target layers.

    ``A`` [rank, in] is drawn from U(-1/sqrt(in), 1/sqrt(in)) by f(seed, layer name); ``B`` [out, rank] is zero, so
    the first forward equals the base. Both are float32 whatever the dtype of the base.

    Args:
        unet: a diffusers UNet, plain or quantised by ``quantize_nf4``; changed in place.
        rank: inner size of the adapter.
        lora_alpha: the scale is ``lora_alpha / rank``.
        target_modules: name endings of the linear layers to adapt, as in PEFT.
        seed: root seed of the initialisation.

    Returns:
        Names of the adapted layers, sorted.

    Raises:
        ConfigError: when no layer carries one of the names.
    """
    import_bitsandbytes()  # before PEFT, which would import it with its request to a hub
    from peft import LoraConfig

    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=list(target_modules), bias="none")
    try:
        with torch.random.fork_rng(devices=[]):
            unet.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(
            "No layer of the UNet gets an adapter.",
            where="train.target_modules",
            why=f"found {list(target_modules)}; {str(error).splitlines()[0]}",
            hint="Use names of linear layers such as to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2.",
        ) from error
    adapted = sorted(name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A"))
    for name in adapted:
        layer = unet.get_submodule(name)
        _initialise(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], derive_seed(seed, "lora", name))
    return adapted


def _initialise(lora_a: nn.Linear, lora_b: nn.Linear, seed: int) -> None:
    bound = 1 / math.sqrt(lora_a.in_features)
    drawn = torch.rand(lora_a.weight.shape, generator=generator(seed)).mul_(2 * bound).sub_(bound)
    device = lora_a.weight.device
    lora_a.weight = nn.Parameter(drawn.to(device))
    lora_b.weight = nn.Parameter(torch.zeros(lora_b.weight.shape, device=device))


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by state-dict name (``<layer>.lora_A.weight``), sorted; float32."""
    infix = f".{ADAPTER}."
    found = {
        name.replace(infix, "."): p for name, p in unet.named_parameters() if ".lora_A." in name or ".lora_B." in name
    }
    return dict(sorted(found.items()))


def lora_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter on the CPU: ``<layer>.lora_A.weight`` [rank, in], ``<layer>.lora_B.weight`` [out, rank]."""
    return {name: p.detach().to("cpu", copy=True) for name, p in lora_parameters(unet).items()}


@torch.no_grad()
def load_parameters(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str = "adapter") -> None:
    """Copy ``state`` into ``parameters``; names, shapes and dtypes must agree exactly.

    Raises:
        IntegrityError: when they do not; nothing is changed then.
    """
    problems = [f"missing {name}" for name in parameters if name not in state]
    problems += [f"unknown {name}" for name in state if name not in parameters]
    for name, p in parameters.items():
        if name in state and (state[name].shape != p.shape or state[name].dtype != p.dtype):
            found = state[name]
            problems.append(f"{name} is {tuple(found.shape)} {found.dtype}, not {tuple(p.shape)} {p.dtype}")
    if problems:
        raise IntegrityError(
            "The saved weights do not fit the model.",
            where=where,
            why=f"{len(problems)} differences, first: {problems[0]}",
        )
    for name, p in parameters.items():
        p.copy_(state[name])


def load_lora_state_dict(unet: nn.Module, state: Mapping[str, Tensor], *, where: str = "adapter") -> None:
    """Put a state from :func:`lora_state_dict` back into the adapter of ``unet``.

    Raises:
        IntegrityError: when names or shapes differ.
    """
    load_parameters(lora_parameters(unet), state, where=where)
