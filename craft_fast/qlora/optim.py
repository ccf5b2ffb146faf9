"""bitsandbytes' 8-bit AdamW (arXiv 2110.02861) with a state that travels through safetensors, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from craft_fast.errors import IntegrityError, ResourceError
from craft_fast.quiet import import_bitsandbytes

_QMAPS = ("qmap1", "qmap2")
_TRIES = 4


def make_optimizer(params: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float) -> Any:
    """``bitsandbytes.optim.AdamW8bit`` over named parameters, its whole state allocated now.

    Tensors of 4,096 elements and more keep their moments in 8 bits with one scale a block of 256; smaller ones
    stay in 32 bits (bitsandbytes' rule).

    Args:
        params: parameters by name, in a stable order; all require a gradient.
        lr: learning rate.
        weight_decay: decoupled weight decay.
    """
    bnb = import_bitsandbytes()
    optimizer = bnb.optim.AdamW8bit(list(params.items()), lr=lr, weight_decay=weight_decay)
    # Allocating here and not in the first step: a shortage of memory shows before any weight has changed.
    for group_index, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            optimizer.init_state(group, p, group_index, index)
    return optimizer


def _named_states(optimizer: Any) -> dict[str, dict[str, Any]]:
    return {
        name: optimizer.state[p]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """The whole state as CPU tensors, ready for safetensors.

    Args:
        optimizer: from :func:`make_optimizer`.

    Returns:
        ``<param>.state1|state2`` (uint8 or float32, the parameter's shape), ``<param>.absmax1|absmax2`` (float32
        [blocks], 8-bit ones only), ``<param>.step`` (int64 []), and the shared maps ``qmap1|qmap2`` (float32 [256]).
    """
    tensors: dict[str, Tensor] = {}
    for name, state in _named_states(optimizer).items():
        for key, value in state.items():
            if key in _QMAPS:
                tensors.setdefault(key, value.detach().to("cpu", copy=True))
            elif isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
            else:
                tensors[f"{name}.{key}"] = torch.tensor(value, dtype=torch.int64)
    return tensors


@torch.no_grad()
def load_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor], *, where: str = "optimizer") -> None:
    """Put a state from :func:`optimizer_tensors` back.

    Raises:
        IntegrityError: when names, shapes, dtypes or the 8-bit code differ; nothing is changed then.
    """
    expected = optimizer_tensors(optimizer)
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    for name, value in expected.items():
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != value.shape or found.dtype != value.dtype:
            problems.append(f"{name} is {tuple(found.shape)} {found.dtype}, not {tuple(value.shape)} {value.dtype}")
        elif name in _QMAPS and not torch.equal(found, value):
            problems.append(f"{name} is another 8-bit code than this bitsandbytes uses")
    if problems:
        raise IntegrityError(
            "The saved optimizer state does not fit.",
            where=where,
            why=f"{len(problems)} differences, first: {problems[0]}",
        )
    for name, state in _named_states(optimizer).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                if key not in _QMAPS:
                    value.copy_(tensors[f"{name}.{key}"])
            else:
                state[key] = int(tensors[f"{name}.{key}"])


@torch.no_grad()
def apply_update(optimizer: Any, *, on_out_of_memory: Callable[[], None]) -> None:
    """One optimizer step that running out of memory can not leave half done.

    Parameters are updated one by one. One that meets ``torch.OutOfMemoryError`` gets its step counter back, memory
    is released by ``on_out_of_memory``, and the walk goes on from there: none is updated twice, none is missed.

    Raises:
        ResourceError: when the same parameter fails four times.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            for attempt in range(_TRIES):
                if _update_one(optimizer, group, p, group_index, index):
                    break
                on_out_of_memory()
                if attempt == _TRIES - 1:
                    raise ResourceError(
                        "Out of memory in the optimizer step.",
                        where=group["param_names"][index],
                        hint="Lower train.rank or train.micro_batch_size, or close other programs on this device.",
                    )


def _update_one(optimizer: Any, group: Any, p: nn.Parameter, group_index: int, index: int) -> bool:
    state = optimizer.state[p]
    step = state["step"]
    try:
        optimizer.update_step(group, p, group_index, index)
    except torch.OutOfMemoryError:
        state["step"] = step
        return False
    return True
