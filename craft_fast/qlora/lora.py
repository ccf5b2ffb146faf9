"""LoRA adapters (arXiv 2106.09685) on a UNet, by PEFT or as one op, initialised by a function of the seed."""

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


def add_lora(
    unet: Any, *, rank: int, lora_alpha: float, target_modules: Sequence[str], seed: int, fused: bool = False
) -> list[str]:
    """Freeze ``unet`` and add ``W x + (lora_alpha / rank) B A x`` to its target layers.

    ``A`` [rank, in] is drawn from U(-1/sqrt(in), 1/sqrt(in)) by f(seed, layer name); ``B`` [out, rank] is zero, so
    the first forward equals the base. Both are float32 whatever the dtype of the base. Names and values are the same
    in both forms.

    Args:
        unet: a diffusers UNet, plain or quantised by ``quantize_nf4``; changed in place.
        rank: inner size of the adapter.
        lora_alpha: the scale is ``lora_alpha / rank``.
        target_modules: name endings of the linear layers to adapt, as in PEFT.
        seed: root seed of the initialisation.
        fused: as ``FusedLoraLinear``, which takes plain layers and ``NF4Linear``; else as PEFT's modules, which take
            plain layers and bitsandbytes'.

    Returns:
        Names of the adapted layers, sorted.

    Raises:
        ConfigError: no layer carries one of the names, or one that does cannot be adapted.
    """
    unet.requires_grad_(False)
    if fused:
        return _add_fused(unet, rank, lora_alpha / rank, target_modules, seed)
    import_bitsandbytes()  # before PEFT, which would import it with its request to a hub
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=list(target_modules), bias="none")
    try:
        with torch.random.fork_rng(devices=[]):
            unet.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise _unfit(target_modules, str(error).splitlines()[0]) from error
    adapted = sorted(name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A"))
    for name in adapted:
        layer = unet.get_submodule(name)
        lora_a, lora_b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        device = lora_a.weight.device
        first, second = _initial(lora_a.weight.shape, lora_b.weight.shape, derive_seed(seed, "lora", name))
        lora_a.weight, lora_b.weight = nn.Parameter(first.to(device)), nn.Parameter(second.to(device))
    return adapted


def _add_fused(unet: Any, rank: int, scaling: float, target_modules: Sequence[str], seed: int) -> list[str]:
    from craft_fast.qlora.layers import fuse, target_names  # imports bitsandbytes, which takes a second or more

    names = target_names(unet, target_modules)
    if not names:
        raise _unfit(target_modules, "no layer carries one of these names")
    for name in names:
        try:
            layer = fuse(unet, name, rank=rank, scaling=scaling)
        except TypeError as error:
            raise _unfit(target_modules, f"{error}, which the fused adapter does not take") from error
        first, second = _initial(layer.lora_A.shape, layer.lora_B.shape, derive_seed(seed, "lora", name))
        with torch.no_grad():
            layer.lora_A.copy_(first)
            layer.lora_B.copy_(second)
    return names


def _unfit(target_modules: Sequence[str], why: str) -> ConfigError:
    return ConfigError(
        "No layer of the UNet gets an adapter.",
        where="train.target_modules",
        why=f"found {list(target_modules)}; {why}",
        hint="Use names of linear layers such as to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2.",
    )


def _initial(shape_a: Sequence[int], shape_b: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """A and B at the start, float32 on the CPU: the same on every device."""
    bound = 1 / math.sqrt(shape_a[1])
    drawn = torch.rand(tuple(shape_a), generator=generator(seed)).mul_(2 * bound).sub_(bound)
    return drawn, torch.zeros(tuple(shape_b))


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by state-dict name (``<layer>.lora_A.weight``), sorted; float32."""
    infix = f".{ADAPTER}."
    found = {}
    for name, p in unet.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            found[name.replace(infix, ".")] = p
        elif name.endswith((".lora_A", ".lora_B")):
            found[f"{name}.weight"] = p
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
