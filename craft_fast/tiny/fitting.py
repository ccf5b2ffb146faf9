"""Fitting of the small networks: one loop for all, resumable, replayed as a CUDA graph where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from craft_fast.progress import Progress
from craft_fast.store.atomic import write_safetensors
from craft_fast.store.safe_load import load_safetensors

Batch = tuple[Tensor, ...]


def cosine_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Fitter:
    """AdamW on ``loss(*batch)`` with averaged weights; ``fit`` returns when ``steps`` are done.

    Args:
        module: what is trained, on its device.
        loss: batch tensors to a scalar; must not wait for the device, so that it can be captured.
        draw: step to the batch tensors on the device, a pure function of the step.
        average: decay of the weight average that is kept and returned.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        draw: Callable[[int], Batch],
        *,
        rate: float,
        average: float = 0.999,
    ) -> None:
        self.module, self.loss, self.draw, self.peak, self.average = module, loss, draw, rate, average
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.weights]
        self.device = self.weights[0].device
        self.rate = torch.tensor(rate, device=self.device)
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate if cuda else rate, weight_decay=0.01, capturable=cuda, foreach=True
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Batch = ()
        self.last = torch.zeros((), device=self.device)

    def _step(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss = self.loss(*batch)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.weights], 1 - self.average)
        self.last.lerp_(loss.detach().float(), 0.01)

    def _set_rate(self, value: float) -> None:
        self.rate.fill_(value)
        if self.device.type != "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = value

    def _capture(self, batch: Batch, progress: Progress, label: str) -> None:
        self.inputs = tuple(t.clone() for t in batch)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._step(self.inputs)
            self.graph = graph
        except RuntimeError as error:  # something in the network waits for the device: go on step by step
            progress.warn(f"{label}: no CUDA graph ({str(error).splitlines()[0]})")

    def _save(self, path: Path, step: int) -> None:
        tensors = {f"weight.{i}": p.detach() for i, p in enumerate(self.weights)}
        tensors |= {f"mean.{i}": m for i, m in enumerate(self.mean)}
        for i, p in enumerate(self.weights):
            tensors |= {f"{name}.{i}": self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step")}
        write_safetensors(
            path, {k: v.cpu().contiguous().clone() for k, v in tensors.items()}, metadata={"step": str(step)}
        )

    def _restore(self, path: Path) -> int:
        from safetensors import safe_open

        tensors = load_safetensors(path)
        for i, p in enumerate(self.weights):
            p.data.copy_(tensors[f"weight.{i}"])
            self.mean[i].copy_(tensors[f"mean.{i}"])
            self.optimizer.state[p] = {
                name: tensors[f"{name}.{i}"].to("cpu" if name == "step" and self.device.type != "cuda" else self.device)
                for name in ("exp_avg", "exp_avg_sq", "step")
            }
        with safe_open(str(path), "pt") as file:
            return int(file.metadata()["step"])

    def fit(self, steps: int, checkpoint: Path, progress: Progress, label: str) -> None:
        """Train to ``steps``, from the checkpoint where there is one; leaves the averaged weights in the module."""
        first = self._restore(checkpoint) if checkpoint.exists() else 0
        every = max(1, min(1000, steps // 4))
        with progress.task(label, steps, "steps") as task:
            task.advance(first)
            for step in range(first, steps):
                self._set_rate(cosine_rate(step, steps, self.peak))
                batch = self.draw(step)
                if self.device.type == "cuda" and step - first == 3:
                    self._capture(batch, progress, label)  # after three eager steps, when the optimizer's state exists
                if self.graph is not None:
                    for mine, new in zip(self.inputs, batch, strict=True):
                        mine.copy_(new)
                    self.graph.replay()
                else:
                    self._step(batch)
                if (step + 1) % every == 0:
                    self._save(checkpoint, step + 1)
                    task.advance(every, loss=float(self.last))
        for p, m in zip(self.weights, self.mean, strict=True):
            p.data.copy_(m)
