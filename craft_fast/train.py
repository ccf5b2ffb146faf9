"""Advantage-weighted training of an adapter on cached samples, design.md section 1 item 6.

Nothing random is carried from step to step. The order of the samples is f(seed, epoch); timestep, noise and prompt
dropout of a sample are f(seed, "train", sample_id, step). A run that resumes from a checkpoint is therefore
bit-identical to one that was never stopped, on the same device, library versions and micro-batch.

Samples may be of several sizes: a global batch is drawn as ever, then cut into micro-batches of one size each.
Shapes: N samples, B samples of a step (the global batch), C x h x w latents, T training timesteps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from craft_fast import checkpoint
from craft_fast.config import TrainSettings
from craft_fast.errors import CraftError, ResourceError
from craft_fast.guards import StepWatch, memory_warning
from craft_fast.losses import draw_batch, min_snr_weight, normalise_weights
from craft_fast.progress import Progress, Silent
from craft_fast.qlora.adapt import repeatable_kernels
from craft_fast.qlora.engine import Choices, Trainee, decide, environment, make_trainee
from craft_fast.qlora.inputs import Inputs, MicroBatch, refuse_non_finite, sizes
from craft_fast.qlora.lora import load_parameters
from craft_fast.qlora.step import Stepper
from craft_fast.rng import derive_seed
from craft_fast.sdxl.load import SdxlModel, free_memory
from craft_fast.sdxl.schedule import alphas_cumprod
from craft_fast.sdxl.text import add_time_ids
from craft_fast.store.run import Run
from craft_fast.store.step_log import StepLog

if TYPE_CHECKING:
    from craft_fast.cache import CachedSet  # the type alone: stages do not import one another

MAX_SKIPS_IN_A_ROW = 3
Samples = Callable[[int, Any], None]


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind.

    Attributes:
        adapter: trained tensors on the CPU: ``<layer>.lora_A.weight`` and ``lora_B``, or the UNet's state dict.
        losses: loss of each step done; None where the step was skipped because it was not finite.
        step: optimizer steps done.
        finished: False when ``should_stop`` ended training early; the state is in a checkpoint then.
        micro_batch_size: at the end; smaller than asked for when memory ran out on the way.
    """

    adapter: dict[str, Tensor]
    losses: list[float | None]
    step: int
    finished: bool
    micro_batch_size: int


@dataclass
class _State:
    """What a checkpoint holds besides tensors."""

    micro_batch_size: int
    step: int = 0
    skips_in_a_row: int = 0
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)


def train(
    run: Run,
    model: SdxlModel,
    cached: CachedSet,
    *,
    settings: TrainSettings,
    seed: int,
    key: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    samples: Samples | None = None,
    memory_bytes: float | None = None,
) -> TrainResult:
    """Train until ``settings.steps``, continuing from the newest good checkpoint of ``key``.

    Args:
        run: the open run; gets checkpoints and ``train_step`` events.
        model: the SDXL, whose ``engine`` says how. Where its parts stay on the device, its UNet is changed in place and
            left as trained; ``sdxl.unet.pristine_unet`` undoes that. Where they do not, they are freed.
        cached: the training set.
        settings: the ``train`` section; ``method`` is not ``auto`` any more.
        seed: root of all randomness.
        key: the train stage's key; only its own checkpoints are continued.
        progress: told about each step, with loss.
        should_stop: asked before every step; True saves a checkpoint and returns.
        samples: ``samples(step, unet)`` draws sample images every ``settings.sample_every`` steps, without gradients;
            ``samples.prepare()``, if it has that, is called before the UNet comes.
        memory_bytes: what this process may use of the device, for ``gradient_checkpointing: auto``; None: not known.

    Raises:
        IntegrityError: a cached value that is not finite.
        ResourceError: out of memory with a micro-batch of one, or out of disk.
        CraftError: three steps in a row were not finite.
    """
    progress = progress or Silent()
    refuse_non_finite(cached.latents, cached.prompt_embeds, cached.pooled_prompt_embeds, cached.sample_ids)
    found = checkpoint.latest(run, key, progress=progress)
    if found is not None:
        checkpoint.settle(run, key, found, keep=settings.keep_checkpoints)
    state = _State(settings.micro_batch_size) if found is None else _restored_state(found)
    log = StepLog(run, key, state.losses, state.grad_norms, lambda step: _rate(step, settings))
    if found is not None and found.step >= settings.steps:
        return TrainResult(found.adapter, state.losses, found.step, True, state.micro_batch_size)
    if settings.sample_every and hasattr(samples, "prepare"):
        samples.prepare()  # type: ignore[union-attr]
    work = _Training(run, model, cached, settings, seed, state, progress, memory_bytes)
    if found is not None:
        work.restore(found)
    saved_at = state.step

    def save() -> None:
        nonlocal saved_at
        if state.step > saved_at:
            meta = {name: value for name, value in vars(state).items() if name != "step"}
            checkpoint.save(
                run, key=key, step=state.step, adapter=_to_cpu(work.parameters),
                optimizer=work.optimizer.state_tensors(), meta={**meta, **work.environment},
                keep=settings.keep_checkpoints,
            )  # fmt: skip
            saved_at = state.step

    with closing(work), log, repeatable_kernels(model.device), progress.task("train", settings.steps, "steps") as task:
        task.advance(state.step)
        while state.step < settings.steps and not should_stop():
            loss, grad_norm = work.step()
            state.step += 1
            state.losses.append(loss)
            state.grad_norms.append(grad_norm)
            log.write(state.step)
            task.advance(1, **({"loss": loss} if loss is not None else {}))
            # Before the checkpoint: a kill in between draws them again, the other way round it would lose them.
            if samples is not None and settings.sample_every and state.step % settings.sample_every == 0:
                work.draw(samples)
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                save()
        save()
        adapter = _to_cpu(work.parameters)
    return TrainResult(adapter, state.losses, state.step, state.step >= settings.steps, state.micro_batch_size)


def _rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of the step after ``step`` steps: linear to the whole, then constant."""
    return settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup_steps, 1))


class _Training:
    """What is trained, on the device, and its steps. To be closed: graphs hold memory."""

    def __init__(
        self, run: Run, model: SdxlModel, cached: CachedSet, settings: TrainSettings, seed: int, state: _State,
        progress: Progress, memory_bytes: float | None,
    ) -> None:  # fmt: skip
        self.run, self.settings, self.seed, self.state, self.progress = run, settings, seed, state, progress
        self.sample_ids, self.device = cached.sample_ids, model.device
        self.global_batch = settings.micro_batch_size * settings.grad_accum_steps
        # As inference asks for: a picture of the bucket's own size, uncropped.
        scale = model.vae_scale_factor
        time_ids = {
            (h, w): add_time_ids(h * scale, w * scale, device=self.device, dtype=model.dtype)
            for h, w in sizes(cached.latents)
        }
        self.several_sizes = len(time_ids) > 1
        choices = decide(
            model.engine, method=settings.method, device=model.device, dtype=model.dtype,
            several_sizes=self.several_sizes,
        )  # fmt: skip
        if model.engine.compile and not choices.compile:
            progress.warn("Samples are of several sizes: the UNet's blocks are not compiled.")
        self.environment = environment(model.device) | choices.record()
        self.trainee = _make_trainee(model, choices, settings, seed, cached, state, memory_bytes)
        self.parameters, self.optimizer = self.trainee.parameters, self.trainee.optimizer
        schedule = alphas_cumprod(model)
        self.timesteps = len(schedule)
        lambdas = min_snr_weight(schedule, settings.min_snr_gamma, model.prediction_type)
        self.stepper = Stepper(
            self.trainee.unet, self.optimizer, alphas_cumprod=schedule.to(self.device),
            prediction_type=model.prediction_type,
            timestep_weight=None if lambdas is None else lambdas.to(self.device),
            add_time_ids=time_ids, dtype=model.dtype, device=self.device,
            noise_seed=derive_seed(seed, "train", "noise"), record=choices.graph, autocast=choices.autocast,
            on_fallback=partial(_tell_fallback, progress),
        )  # fmt: skip
        self.inputs = Inputs(
            latents=cached.latents, prompt_embeds=cached.prompt_embeds,
            pooled_prompt_embeds=cached.pooled_prompt_embeds, prompt_index=cached.prompt_index,
            empty_index=cached.empty_index, weights=normalise_weights(cached.weights), dtype=model.dtype,
            device=self.device,
        )  # fmt: skip
        self.ahead: tuple[Tensor, list[MicroBatch]] | None = None
        # Elements of the largest micro-batch that is known to fit; none to know where nothing is updated in backward.
        self.fits = 0 if self.optimizer.updates_in_backward else math.inf
        self.longest = state.micro_batch_size  # of the micro-batches that were last tried
        self.watch, self.memory_told = StepWatch(), False

    def close(self) -> None:
        """Give the memory of graphs and prepared inputs back."""
        self.ahead = None
        self.stepper.release()

    # ---- one step

    def step(self) -> tuple[float | None, float | None]:
        """Loss and gradient norm of one step; both None when either was not finite and nothing was updated."""
        began, rate = time.perf_counter(), _rate(self.state.step, self.settings)
        rows, loss, per_sample = self._gradients(rate)
        norm = self.stepper.update(rate, on_out_of_memory=self._relieve)
        # Drawn and sent while the device is busy with what is queued.
        self._look_ahead()
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for it
        self._watch(time.perf_counter() - began)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._skipped(rows, per_sample)
            return None, None
        self.state.skips_in_a_row = 0
        return loss_value, norm_value

    def _draw(self, step: int) -> tuple[Tensor, list[MicroBatch]]:
        """A step's samples by size, and their rows in the same order."""
        batch = draw_batch(
            self.sample_ids, seed=self.seed, step=step, timesteps=self.timesteps, batch_size=self.global_batch,
            prompt_dropout=self.settings.prompt_dropout,
        )  # fmt: skip
        parts = self.inputs.by_size(batch)
        return torch.cat([part.rows for part in parts]), [self.inputs.select(part) for part in parts]

    def _look_ahead(self) -> None:
        # Out of memory here is met again, and dealt with, in the next step.
        with suppress(torch.OutOfMemoryError):
            if self.state.step + 1 < self.settings.steps:
                self.ahead = self._draw(self.state.step + 1)

    def _gradients(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, loss and errors of the whole batch; when memory runs out, all again with less: no sample is skipped."""
        step, ahead = self.state.step, self.ahead
        self.ahead = None
        while True:
            try:
                ahead = ahead or self._draw(step)
                parts = [part for size in ahead[1] for part in size.split(self.state.micro_batch_size)]
                self.longest = max(len(part) for part in parts)
                largest = max(parts, key=lambda part: part.latents.numel())
                if largest.latents.numel() > self.fits:
                    # Updates in backward can not be taken back: a step without them shows first what fits. Of several
                    # sizes any step may have the largest part behind others, where it meets their gradients.
                    dry = [largest, largest] if self.several_sizes else parts[:2]
                    with self.optimizer.dry_run():
                        self.stepper.gradients(dry, step=step, divisor=self.global_batch, lr=rate)
                    self.fits = largest.latents.numel()
                return ahead[0], *self.stepper.gradients(parts, step=step, divisor=self.global_batch, lr=rate)
            except torch.OutOfMemoryError:
                pass
            # Outside of `except`, whose traceback would keep the activations alive.
            self.stepper.zero_grad()
            self._relieve()

    def _relieve(self) -> None:
        """Need less memory from here on: recompute all, else halve the micro-batch, else record no graphs.

        With several sizes no graphs come first: what is not recorded needs memory beside them.
        """
        self.stepper.release()
        free_memory()
        state = self.state
        if self.several_sizes and self.stepper.stop_recording():
            what = "steps run without a CUDA graph"
        elif self.trainee.recompute_all():
            what = "all activations are computed again in backward"
        elif (tried := min(state.micro_batch_size, self.longest)) > 1:
            state.micro_batch_size = (tried + 1) // 2
            what = f"micro-batch is {state.micro_batch_size}, the global batch stays"
        elif self.stepper.stop_recording():
            what = "steps run without a CUDA graph"
        else:
            raise ResourceError(
                "Out of memory with a micro-batch of one sample.",
                where=f"training step {state.step + 1}",
                why="the gradients of a single sample do not fit beside the model, all activations computed again",
                hint="Set train.method: qlora, then train.nf4_convs: true, then a smaller train.rank; "
                "`craft-fast plan` says what fits.",
            )
        self.progress.warn(f"Out of memory: from here on {what}.")
        self.run.log(
            "train_out_of_memory", at_step=state.step + 1, micro_batch_size=state.micro_batch_size, change=what
        )

    def _skipped(self, rows: Tensor, per_sample: Tensor) -> None:
        state = self.state
        state.skips_in_a_row += 1
        bad = [self.sample_ids[row] for row in rows[~torch.isfinite(per_sample).cpu()].tolist()]
        named = f" (samples {', '.join(bad[:3])})" if bad else ""
        self.progress.warn(f"Step {state.step + 1}: loss or gradient is not finite{named}; nothing was updated.")
        self.run.log("train_skipped", at_step=state.step + 1, samples=bad)
        if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise CraftError(
                f"{MAX_SKIPS_IN_A_ROW} training steps in a row gave no finite loss or gradient.",
                where=f"training step {state.step + 1}",
                why="training has diverged, or a weight or value in use is not finite",
                hint="The last checkpoint is kept. Lower train.learning_rate, or set train.weighting: positive.",
            )

    # ---- around the steps

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint: values are copied into the tensors that are there."""
        load_parameters(self.parameters, found.adapter, where=str(found.folder))
        self.optimizer.load_state_tensors(found.optimizer, where=str(found.folder))
        self.progress.info(f"Training continues after step {found.step}.")
        changed = {name: now for name, now in self.environment.items() if found.meta.get(name) != now}
        if changed:
            self.progress.warn(f"Not bit-identical to an unbroken run, since these are new: {changed}")

    def draw(self, samples: Samples) -> None:
        """Sample images of the UNet as it is; training goes on without them where they do not fit."""
        unet, step = self.trainee.unet, self.state.step
        self.stepper.zero_grad()
        for last in (False, True) if self.stepper.record else (True,):
            unet.eval()
            try:
                with torch.no_grad():
                    samples(step, unet)
                return
            except torch.OutOfMemoryError:
                pass
            finally:
                unet.train()
            if last:
                self.progress.warn(f"Out of memory while drawing sample images at step {step}; training goes on.")
            else:
                self.stepper.release()  # graphs keep what their steps need; they are recorded again in some steps

    def _watch(self, seconds: float) -> None:
        """Tell when the driver moves memory out of the card; there is nothing to tell about a CPU."""
        if self.device.type != "cuda" or not self.stepper.settled:
            return
        notes = [self.watch.observe(seconds)]
        if not self.memory_told:
            self.memory_told = True
            notes.append(
                memory_warning(
                    allocated_bytes=torch.cuda.max_memory_allocated(self.device),
                    reserved_bytes=torch.cuda.memory_reserved(self.device),
                    total_bytes=torch.cuda.get_device_properties(self.device).total_memory,
                )
            )
        for note in filter(None, notes):
            self.progress.warn(note)


# ---- before and after


def _make_trainee(
    model: SdxlModel, choices: Choices, settings: TrainSettings, seed: int, cached: CachedSet, state: _State,
    memory_bytes: float | None,
) -> Trainee:  # fmt: skip
    # Memory is decided by the largest size; of equal areas by the longest side, which has the longer rows.
    h, w = max(sizes(cached.latents), key=lambda size: (size[0] * size[1], max(size)))
    try:
        return make_trainee(
            model, choices, settings, seed=seed, latent_size=(h, w), tokens=cached.prompt_embeds.shape[1],
            micro_batch_size=state.micro_batch_size, memory_bytes=memory_bytes,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "Out of memory before the first training step.",
            where=f"train.method: {settings.method}",
            why=str(error).splitlines()[0],
            hint="Set train.method: qlora, or a smaller train.rank, or close other programs on this device.",
        ) from error


def _restored_state(found: checkpoint.Checkpoint) -> _State:
    names = ("micro_batch_size", "skips_in_a_row", "losses", "grad_norms")
    return _State(step=found.step, **{name: found.meta[name] for name in names})


def _tell_fallback(progress: Progress, why: str) -> None:
    progress.warn(f"The training step could not be recorded as a CUDA graph, and runs without: {why}")


def _to_cpu(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
