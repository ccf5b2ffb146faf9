"""One training-step case, from an empty device to its figures: the reference loop's, or ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from craft_bench.baselines.diffusers_lora import DiffusersLora
from craft_bench.rows import Row
from craft_bench.sdxl import measure
from craft_bench.sdxl.cases import StepCase
from craft_bench.sdxl.ours import Ours, planned_costs
from craft_bench.sdxl.planned import planned_step, probed
from craft_bench.sdxl.problem import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RANK,
    SEED,
    TARGET_MODULES,
    WEIGHT_DECAY,
    Cached,
    Size,
    clean,
    random_unet,
)
from craft_fast.qlora.adapt import repeatable_kernels
from craft_kernels.noise_and_target import noise_and_target

OUT_OF_MEMORY = "out of memory"
# How far our losses may be from the reference's on the same noise. In float32 only the order of sums differs; in
# bfloat16 the reference's autocast keeps norms in float32, where ours stays in bfloat16. NF4 is another base: no bound.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# A first step of Adam moves every weight by its learning rate whatever the gradient's size, so only where gradients
# are nearly exact do two adapters stay near one another. Losses of few small steps hardly show an update.
ADAPTER_TOLERANCE = {torch.float32: 1e-2}


@dataclass(frozen=True)
class Work:
    """What all cases of a run share.

    Attributes:
        size: how large.
        device, dtype: where and in what.
        effort: how long to measure.
        matmul_tflops: the card's rate.
        should_stop: asked between steps, raises to end the run.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype
    effort: measure.Effort
    matmul_tflops: float
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Reference:
    """What ours is held against.

    Attributes:
        losses: of the first steps, on our noise.
        p50_ms: of a step on its own noise.
        adapter: its LoRA after those first steps, on the CPU.
    """

    losses: list[float]
    p50_ms: float
    adapter: Mapping[str, Tensor]


def measure_reference(case: StepCase, work: Work) -> tuple[Row, Reference]:
    """The reference loop: its first losses on our noise, its time with its own.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    clean(work.device)
    cached = Cached(work.size, work.device, work.dtype)
    loop = DiffusersLora(
        random_unet(work.size, work.device, work.dtype), dtype=work.dtype, rank=RANK, target_modules=TARGET_MODULES,
        learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM, seed=SEED,
    )  # fmt: skip
    adapter: dict[str, Tensor] = {}

    def step(number: int, *, ours: bool) -> float:
        x = cached.step(case.batch, number)
        noise = None
        if ours:
            # Predicting noise, the target is the noise.
            _, noise = noise_and_target(
                x.latents, x.noise_ids, cached.alphas_cumprod, x.timesteps, seed=x.noise_seed, step=x.step,
                prediction_type="epsilon",
            )  # fmt: skip
        loss = loop.step(
            x.latents, x.prompt_embeds, x.pooled_prompt_embeds, x.timesteps, cached.time_ids, noise
        )  # fmt: skip
        if number == work.effort.losses - 1:
            adapter.update({name: p.detach().to("cpu", copy=True) for name, p in loop.parameters.items()})
        return loss

    figures = measure.steps(
        lambda number: step(number, ours=True), work.device, work.effort, timed=lambda number: step(number, ours=False),
        check=work.check,
    )  # fmt: skip
    fields = {"method": "lora", "optimizer": "bitsandbytes", "lora": "peft", **_figures(case, figures)}
    return fields, Reference(figures.losses, figures.p50_ms, adapter)


def measure_ours(case: StepCase, work: Work, reference: Reference | None) -> Row:
    """Our engine on the same work; beside the reference where one was measured.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    clean(work.device)
    costs, _ = planned_costs(case, work.size, work.device, work.dtype)
    probe = probed(costs, wanted=case.probe, deadline_s=work.effort.probe_s)
    clean(work.device)
    engine = Ours(case, work.size, work.device, work.dtype)
    adapter: dict[str, Tensor] = {}

    def step(number: int) -> float:
        loss = engine.step(number)
        if number == work.effort.losses - 1 and reference is not None:
            adapter.update({name: p.detach().to("cpu", copy=True) for name, p in engine.parameters.items()})
        return loss

    # As in training: the same bits each time, whatever that costs. The reference is not held to it.
    with repeatable_kernels(work.device):
        figures = measure.steps(step, work.device, work.effort, check=work.check)
    fields = engine.fields() | _figures(case, figures) | engine.utilisation(figures.p50_ms, work.matmul_tflops)
    fields["planned"] = planned_step(engine.costs, len(engine.kept), probe, figures)
    engine.close()
    if reference is not None and fields["method"] != "full":
        fields |= compare(figures.losses, reference, exact_base=fields["method"] == "lora", dtype=work.dtype)
        fields["adapter_difference"] = apart = adapter_difference(adapter, reference.adapter)
        if fields["same"] and (apart is None or apart > ADAPTER_TOLERANCE.get(work.dtype, math.inf)):
            fields["same"] = False
        if fields["same"] is not False:
            fields["versus"] = {"reference": reference.p50_ms / figures.p50_ms}
    return fields


def compare(losses: list[float], reference: Reference, *, exact_base: bool, dtype: torch.dtype) -> Row:
    """Losses side by side: ``reference_losses``, ``loss_difference``, ``same`` (None where no bound applies)."""
    difference = measure.largest_relative_difference(losses, reference.losses)
    same = difference <= TOLERANCE[dtype] if exact_base else None
    return {"reference_losses": reference.losses, "loss_difference": difference, "same": same}


def adapter_difference(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float | None:
    """``|B - B'| / |B'|`` over all LoRA B, which begin at zero: how differently the two loops have moved them."""
    names = [name for name in theirs if ".lora_B." in name]
    apart = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in names)
    size = sum(float(theirs[name].double().square().sum()) for name in names)
    return float((apart / size) ** 0.5) if size else None


def _figures(case: StepCase, figures: measure.StepFigures) -> Row:
    found = asdict(figures)
    return found | {
        "s_per_step": figures.p50_ms / 1e3,
        "images_per_s": case.batch / (figures.p50_ms / 1e3),
    }


def reason(error: BaseException) -> str:
    """Why a case failed, in a line; being short of memory reads the same whatever said it."""
    if is_missing_memory(error):
        return OUT_OF_MEMORY
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def is_missing_memory(error: BaseException) -> bool:
    """Whether it, or what it came from, is a shortage of memory."""
    from craft_fast.errors import ResourceError

    seen: Any = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError | ResourceError):
            return True
        seen = seen.__cause__
    return False
