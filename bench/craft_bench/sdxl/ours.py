"""Our engine on the work that is measured: the very parts that ``craft-fast train`` puts together."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from craft_bench.measure import synchronize
from craft_bench.rows import Row
from craft_bench.sdxl.cases import StepCase
from craft_bench.sdxl.model import random_model, shape_of
from craft_bench.sdxl.problem import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RANK,
    SEED,
    TARGET_MODULES,
    WEIGHT_DECAY,
    Cached,
    Size,
    peaks,
)
from craft_fast import budget
from craft_fast.config import EngineSettings, GenerateSettings, ModelSettings, Settings, TrainSettings
from craft_fast.plan.stages import Costs
from craft_fast.qlora.engine import make_trainee
from craft_fast.qlora.inputs import MicroBatch
from craft_fast.qlora.step import Stepper
from craft_fast.sdxl import costs as formulas
from craft_fast.sdxl.load import free_memory

MFU_MEANS = (
    "mfu: floating-point operations of forward and backward without recomputation, over time and matrix rate; "
    "hfu: with the recomputation that was done"
)


def settings_of(case: StepCase, size: Size, device: torch.device, dtype: torch.dtype) -> Settings:
    """A case as the settings of a run, whose phases have the device for themselves."""
    return Settings(
        model=ModelSettings(device=device.type, dtype=str(dtype).removeprefix("torch.")),  # type: ignore[arg-type]
        generate=GenerateSettings(height_px=size.side_px, width_px=size.side_px),
        train=TrainSettings(
            method=case.method, nf4_convs=case.nf4_convs, rank=RANK, lora_alpha=float(RANK),
            target_modules=list(TARGET_MODULES), learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM, micro_batch_size=case.batch, gradient_checkpointing=case.recompute,
        ),
        engine=EngineSettings(
            vram_gib=case.cap_gib, resident="never", lora=case.lora, optimizer=case.optimizer, graph=case.graph,
            compile=case.compile,
        ),
    )  # fmt: skip


def planned_costs(case: StepCase, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Costs, list[str]]:
    """Formulas of a case, with what it leaves open decided as the engine decides it, and what is said of that."""
    shape = shape_of(size)
    settings, notes = budget.resolve_auto(settings_of(case, size, device, dtype), shape=shape)
    return Costs.of(settings, budget.machine_of(device), shape), notes


class Ours:
    """The engine with a model in memory, and its steps.

    Args:
        case: how.
        size: how large.
        device: where.
        dtype: in what.

    Attributes:
        costs: formulas of this case.
        prepare_s: seconds from the pristine UNet to the first step; with a cap those of reading it, too.
        parameters: what is trained, by name.
    """

    def __init__(self, case: StepCase, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.size, self.device = case, size, device
        self.costs, self.notes = planned_costs(case, size, device, dtype)
        settings, choices = self.costs.settings, self.costs.choices
        self.notes = self.notes + budget.apply_cap(device, settings.engine)
        model = random_model(size, device, dtype, settings.engine)
        if case.cap_gib is None:
            # Without a cap the dense weights begin on the device; under one they wait in the machine's memory.
            model.resident = True
            model.use("unet")
        synchronize(device)
        began = time.perf_counter()
        limited = device.type == "cuda" or case.cap_gib is not None
        self.trainee = make_trainee(
            model, choices, settings.train, seed=SEED, latent_size=(size.latent_side, size.latent_side),
            tokens=size.tokens, micro_batch_size=case.batch,
            memory_bytes=self.costs.training_budget if limited else None,
        )  # fmt: skip
        self.parameters = self.trainee.parameters
        self.cached = Cached(size, device, dtype)
        self.stepper = Stepper(
            self.trainee.unet, self.trainee.optimizer, alphas_cumprod=self.cached.alphas_cumprod,
            prediction_type="epsilon", timestep_weight=None,
            add_time_ids={(size.latent_side, size.latent_side): self.cached.time_ids}, dtype=dtype,
            device=device, noise_seed=self.cached.noise_seed, record=choices.graph, autocast=choices.autocast,
            on_fallback=self.notes.append,
        )  # fmt: skip
        self.fits = not self.trainee.optimizer.updates_in_backward
        self.weights = torch.ones(case.batch, device=device)
        synchronize(device)
        self.prepare_s, self.prepare_peak_gib = time.perf_counter() - began, peaks(device)[0]

    def step(self, number: int) -> float:
        """One optimizer step; the loss, which waits for the device.

        As in training, a shortage of memory makes all units recompute, which is noted; only then it is an error.

        Raises:
            FloatingPointError: loss or gradient is not finite.
            torch.OutOfMemoryError: not even that fits.
        """
        try:
            return self._step(number)
        except torch.OutOfMemoryError as error:
            if not self.trainee.kept:
                raise
            self.notes.append(f"step {number}: {str(error).splitlines()[0]}; all activations recomputed from here on")
        # Outside of `except`, whose traceback would keep the activations alive.
        self.stepper.zero_grad()
        self.stepper.release()
        free_memory()
        self.trainee.recompute_all()
        return self._step(number)

    def _step(self, number: int) -> float:
        x = self.cached.step(self.case.batch, number)
        micro_batch = MicroBatch(
            x.latents, x.prompt_embeds, x.pooled_prompt_embeds, x.timesteps, x.noise_ids, self.weights
        )
        arguments: dict[str, Any] = {"step": number, "divisor": self.case.batch, "lr": LEARNING_RATE}
        if not self.fits:
            # Updates in backward can not be taken back: a step without them shows first whether it fits.
            with self.trainee.optimizer.dry_run():
                self.stepper.gradients([micro_batch], **arguments)
            self.fits = True
        loss, _ = self.stepper.gradients([micro_batch], **arguments)
        norm = self.stepper.update(LEARNING_RATE)
        value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            raise FloatingPointError(f"step {number}: loss {value}, gradient norm {norm_value}")
        return float(value)

    def close(self) -> None:
        """Give the memory of graphs back."""
        self.stepper.release()

    @property
    def kept(self) -> tuple[str, ...]:
        """Units that keep their activations, in order."""
        return tuple(name for name in self.trainee.units if name in self.trainee.kept)

    def fields(self) -> Row:
        """How it was done, for the row."""
        choices = self.costs.choices
        return {
            "method": choices.method, "chosen": choices.record(), "recorded": self.stepper.record,
            "kept_units": [len(self.kept), len(self.trainee.units)],
            "budget_gib": self.costs.training_budget / 2**30, "prepare_s": self.prepare_s,
            "prepare_peak_gib": self.prepare_peak_gib, "notes": list(self.notes),
        }  # fmt: skip

    def utilisation(self, step_ms: float, matmul_tflops: float) -> Row:
        """Shares of the matrix rate, and the operations they are made of, in TFLOP an image."""
        options = self.costs.training_options()
        batch = options.pop("micro_batch")
        for name in ("grad_accum_steps", "gpu"):
            options.pop(name)
        setup = formulas.unet_setup(batch=batch, **options)
        done, useful = formulas.step_flops(self.size.unet, setup=setup, kept=self.kept)
        available = step_ms * 1e-3 * matmul_tflops * 1e12
        return {
            "model_tflop": useful / batch / 1e12, "hardware_tflop": done / batch / 1e12,
            "mfu": useful / available, "hfu": done / available, "mfu_means": MFU_MEANS,
        }  # fmt: skip
