"""A small SDXL UNet whose weights are all trained, and what tests of updates in backward ask about it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.qlora.optim import make_optimizer

LR = 1e-3
NO_CLIP = 1e9


def load(folder: Path, dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype).train().requires_grad_(True)
    if recompute:
        unet.enable_gradient_checkpointing()
    return unet


def trained(unet: Any, *, kind: Any = "fused_backward", max_grad_norm: float = NO_CLIP, seed: int = 0) -> Any:
    parameters = dict(sorted(unet.named_parameters()))
    return make_optimizer(
        parameters, kind=kind, lr=LR, weight_decay=0.01, max_grad_norm=max_grad_norm, seed=seed
    )  # fmt: skip


def loss_of(unet: Any, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    conditions = {"text_embeds": normal(1, 32).to(unet.dtype), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    found = unet(
        normal(1, 4, 16, 16).to(unet.dtype), torch.tensor([500]), normal(1, 32, 64).to(unet.dtype),
        added_cond_kwargs=conditions, return_dict=False,
    )[0]  # fmt: skip
    return (found.float() - normal(1, 4, 16, 16)).square().mean()


def train(unet: Any, optimizer: Any, steps: range, *, micro_batches: int = 1) -> list[Tensor]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro_batches):
            loss = loss_of(unet, step * 10 + part) / micro_batches
            if part == micro_batches - 1:
                optimizer.arm(LR, loss=loss)
            loss.backward()
        norms.append(optimizer.step(LR).clone())
    return norms


def weights(unet: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def changed(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, two[name])}


def large_names(unet: Any) -> list[str]:
    return [name for name, p in unet.named_parameters() if p.numel() % 4096 == 0]


class Watch:
    """Counts the gradients that are alive whenever backward has finished one; made before the optimizer."""

    def __init__(self, unet: Any) -> None:
        self.alive: dict[str, weakref.ref[Tensor]] = {}
        self.most = self.most_bytes = self.seen = 0
        for name, p in unet.named_parameters():
            if p.numel() % 4096 == 0:
                p.register_post_accumulate_grad_hook(lambda p, name=name: self.finished(name, p))

    def finished(self, name: str, p: Tensor) -> None:
        assert p.grad is not None
        self.seen += 1
        self.alive[name] = weakref.ref(p.grad.untyped_storage())
        sizes = [storage.nbytes() for ref in self.alive.values() if (storage := ref()) is not None]
        self.most, self.most_bytes = max(self.most, len(sizes)), max(self.most_bytes, sum(sizes))
