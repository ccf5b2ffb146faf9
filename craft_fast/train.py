"""Advantage-weighted training of an adapter on cached samples, design.md section 1 item 6.

Nothing random is carried from step to step. The order of the samples is f(seed, epoch); timestep, noise and prompt
dropout of a sample are f(seed, "train", sample_id, step). A run that resumes from a checkpoint is therefore
bit-identical to one that was never stopped, on the same device, library versions and micro-batch.

Shapes: N samples, B samples of a step (the global batch), C x h x w latents, T training timesteps.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from craft_fast import checkpoint
from craft_fast.config import TrainSettings
from craft_fast.errors import CraftError, IntegrityError, ResourceError
from craft_fast.losses import Batch, draw_batch, min_snr_weight, normalise_weights
from craft_fast.progress import Progress, Silent
from craft_fast.qlora.adapt import prepare_unet, repeatable_kernels
from craft_fast.qlora.lora import load_parameters
from craft_fast.qlora.optim import apply_update, load_optimizer_tensors, make_optimizer, optimizer_tensors
from craft_fast.sdxl.load import SdxlModel, free_memory
from craft_fast.sdxl.schedule import alphas_cumprod
from craft_fast.sdxl.text import add_time_ids
from craft_fast.sdxl.unet import pristine_unet
from craft_fast.store.run import Run, read_log
from craft_kernels.dispatch import choose
from craft_kernels.noise_and_target import noise_and_target
from craft_kernels.weighted_noise_loss import weighted_noise_loss

if TYPE_CHECKING:
    from craft_fast.cache import CachedSet  # the type alone: stages do not import one another

MAX_SKIPS_IN_A_ROW = 3
# Small gradients underflow in float16; a fixed power of two brings them into range and is divided out exactly.
FLOAT16_LOSS_SCALE = 1024.0
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
) -> TrainResult:
    """Train until ``settings.steps``, continuing from the newest good checkpoint of ``key``.

    Args:
        run: the open run; gets checkpoints and ``train_step`` events.
        model: the SDXL. Its UNet is changed in place and left as trained; ``sdxl.unet.pristine_unet`` undoes that.
        cached: the training set.
        settings: the ``train`` section.
        seed: root of all randomness.
        key: the train stage's key; only its own checkpoints are continued.
        progress: told about each step, with loss.
        should_stop: asked before every step; True saves a checkpoint and returns.
        samples: ``samples(step, unet)`` draws sample images every ``settings.sample_every`` steps, without gradients.

    Raises:
        IntegrityError: a cached value that is not finite.
        ResourceError: out of memory with a micro-batch of one, or out of disk.
        CraftError: three steps in a row were not finite.
    """
    progress = progress or Silent()
    _refuse_non_finite(cached)
    found = checkpoint.latest(run, key, progress=progress)
    if found is not None:
        checkpoint.settle(run, key, found, keep=settings.keep_checkpoints)
    state = _State(settings.micro_batch_size) if found is None else _restored_state(found)
    log = _StepLog(run, key, state, settings)
    if found is not None and found.step >= settings.steps:
        return TrainResult(found.adapter, state.losses, found.step, True, state.micro_batch_size)
    unet, parameters, optimizer = _prepare(model, settings, seed)
    if found is not None:
        _restore(found, model, parameters, optimizer, progress)
    objective = _Objective(model, unet, cached, settings)
    global_batch = settings.micro_batch_size * settings.grad_accum_steps
    saved_at = state.step

    def save() -> None:
        nonlocal saved_at
        if state.step > saved_at:
            meta = {name: value for name, value in vars(state).items() if name != "step"}
            checkpoint.save(
                run, key=key, step=state.step, adapter=_to_cpu(parameters), optimizer=optimizer_tensors(optimizer),
                meta={**meta, **_environment(model)}, keep=settings.keep_checkpoints,
            )  # fmt: skip
            saved_at = state.step

    with log, repeatable_kernels(model.device), progress.task("train", settings.steps, "steps") as task:
        task.advance(state.step)
        while state.step < settings.steps and not should_stop():
            batch = draw_batch(
                cached.sample_ids, seed=seed, step=state.step, timesteps=objective.timesteps, batch_size=global_batch,
                prompt_dropout=settings.prompt_dropout,
            )  # fmt: skip
            loss, grad_norm = _optimizer_step(objective, batch, parameters, optimizer, state, settings, run, progress)
            state.step += 1
            state.losses.append(loss)
            state.grad_norms.append(grad_norm)
            log.write(state.step)
            task.advance(1, **({"loss": loss} if loss is not None else {}))
            # Before the checkpoint: a kill in between draws them again, the other way round it would lose them.
            if settings.sample_every and state.step % settings.sample_every == 0:
                _draw_samples(samples, state.step, unet, progress)
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                save()
        save()
    finished = state.step >= settings.steps
    return TrainResult(_to_cpu(parameters), state.losses, state.step, finished, state.micro_batch_size)


# ---- one step


def _optimizer_step(
    objective: _Objective, batch: Batch, parameters: dict[str, Any], optimizer: Any, state: _State,
    settings: TrainSettings, run: Run, progress: Progress,
) -> tuple[float | None, float | None]:  # fmt: skip
    """Loss and gradient norm of one step; both None when either was not finite and nothing was updated."""

    def halve() -> None:
        _halve_micro_batch(state, run, progress)

    loss, per_sample = _gradients(objective, batch, optimizer, state, halve)
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
    loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for the device
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        optimizer.zero_grad(set_to_none=True)
        _skipped(objective, batch, per_sample, state, run, progress)
        return None, None
    state.skips_in_a_row = 0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * _warmup(state.step, settings)
    apply_update(optimizer, on_out_of_memory=halve)
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


def _warmup(step: int, settings: TrainSettings) -> float:
    """Share of the learning rate in the step after ``step`` steps: linear to 1."""
    return min(1.0, (step + 1) / max(settings.warmup_steps, 1))


def _gradients(
    objective: _Objective, batch: Batch, optimizer: Any, state: _State, halve: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Gradients of the whole batch; when memory runs out, all of it again in smaller pieces: none is skipped."""
    while True:
        try:
            parts = [objective(batch, rows) for rows in torch.arange(len(batch.rows)).split(state.micro_batch_size)]
            objective.unscale(optimizer)
            return torch.stack([loss for loss, _ in parts]).sum(), torch.cat([errors for _, errors in parts])
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
        # Outside of `except`, whose traceback would keep the activations alive.
        halve()


def _halve_micro_batch(state: _State, run: Run, progress: Progress) -> None:
    free_memory()
    if state.micro_batch_size == 1:
        raise ResourceError(
            "Out of memory with a micro-batch of one sample.",
            where=f"training step {state.step + 1}",
            why="the gradients of a single sample do not fit beside the model",
            hint="Set train.gradient_checkpointing: true, then train.method: qlora, then a smaller train.rank.",
        )
    state.micro_batch_size = (state.micro_batch_size + 1) // 2
    progress.warn(f"Out of memory: micro-batch is {state.micro_batch_size} from here on, the global batch stays.")
    run.log("train_out_of_memory", at_step=state.step + 1, micro_batch_size=state.micro_batch_size)


def _skipped(
    objective: _Objective, batch: Batch, per_sample: Tensor, state: _State, run: Run, progress: Progress
) -> None:
    state.skips_in_a_row += 1
    bad = [objective.sample_ids[row] for row in batch.rows[~torch.isfinite(per_sample).cpu()].tolist()]
    named = f" (samples {', '.join(bad[:3])})" if bad else ""
    progress.warn(f"Step {state.step + 1}: loss or gradient is not finite{named}; nothing was updated.")
    run.log("train_skipped", at_step=state.step + 1, samples=bad)
    if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise CraftError(
            f"{MAX_SKIPS_IN_A_ROW} training steps in a row gave no finite loss or gradient.",
            where=f"training step {state.step + 1}",
            why="training has diverged, or a weight or value in use is not finite",
            hint="The last checkpoint is kept. Lower train.learning_rate, or set train.weighting: positive.",
        )


class _Objective:
    """The loss of some rows of a batch, design.md section 1 item 6, and its gradient."""

    def __init__(self, model: SdxlModel, unet: Any, cached: CachedSet, settings: TrainSettings) -> None:
        self.unet, self.cached, self.device, self.dtype = unet, cached, model.device, model.dtype
        self.prediction_type: Any = model.prediction_type
        self.sample_ids = cached.sample_ids
        schedule = alphas_cumprod(model)
        self.timesteps = len(schedule)
        self.alphas_cumprod = schedule.to(self.device)
        lambdas = min_snr_weight(schedule, settings.min_snr_gamma, model.prediction_type)
        self.timestep_weight = None if lambdas is None else lambdas.to(self.device)
        self.weights = normalise_weights(cached.weights)
        h, w = (side * model.vae_scale_factor for side in cached.latents.shape[-2:])
        self.add_time_ids = add_time_ids(h, w, device=self.device, dtype=self.dtype)
        self.scale = FLOAT16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    def __call__(self, batch: Batch, part: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient of ``part`` (positions in the batch) and return its share of the loss and its errors."""
        rows, timesteps = batch.rows[part], batch.timesteps[part].to(self.device)
        noised, target = noise_and_target(
            self.cached.latents[rows].to(self.device), batch.noise_ids[part].to(self.device), self.alphas_cumprod,
            timesteps, seed=batch.noise_seed, step=batch.step, prediction_type=self.prediction_type,
        )  # fmt: skip
        text = torch.where(batch.dropped[part], self.cached.empty_index, self.cached.prompt_index[rows])
        conditions = {
            "text_embeds": self.cached.pooled_prompt_embeds[text].to(self.device, self.dtype),
            "time_ids": self.add_time_ids.expand(len(rows), -1),
        }
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            noise_pred = self.unet(
                noised.to(self.dtype), timesteps, self.cached.prompt_embeds[text].to(self.device, self.dtype),
                added_cond_kwargs=conditions, return_dict=False,
            )[0]  # fmt: skip
        loss, per_sample = weighted_noise_loss(
            noise_pred, target, self.weights[rows].to(self.device), divisor=len(batch.rows),
            timesteps=None if self.timestep_weight is None else timesteps, timestep_weight=self.timestep_weight,
        )  # fmt: skip
        (loss * self.scale).backward()
        return loss.detach(), per_sample

    def unscale(self, optimizer: Any) -> None:
        """Divide the loss scale out of the gradients."""
        if self.scale != 1.0:
            for group in optimizer.param_groups:
                torch._foreach_div_([p.grad for p in group["params"] if p.grad is not None], self.scale)


# ---- state, log and samples


def _prepare(model: SdxlModel, settings: TrainSettings, seed: int) -> tuple[Any, dict[str, Any], Any]:
    try:
        unet = pristine_unet(model)
        parameters = prepare_unet(
            unet, method=settings.method, dtype=model.dtype, rank=settings.rank, lora_alpha=settings.lora_alpha,
            target_modules=settings.target_modules, seed=seed, gradient_checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
        optimizer = make_optimizer(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "Out of memory before the first training step.",
            where=f"train.method: {settings.method}",
            why=str(error).splitlines()[0],
            hint="Set train.method: qlora, or a smaller train.rank, or close other programs on this device.",
        ) from error
    return unet, parameters, optimizer


def _restored_state(found: checkpoint.Checkpoint) -> _State:
    names = ("micro_batch_size", "skips_in_a_row", "losses", "grad_norms")
    return _State(step=found.step, **{name: found.meta[name] for name in names})


def _restore(
    found: checkpoint.Checkpoint, model: SdxlModel, parameters: dict[str, Any], optimizer: Any, progress: Progress
) -> None:
    load_parameters(parameters, found.adapter, where=str(found.folder))
    load_optimizer_tensors(optimizer, found.optimizer, where=str(found.folder))
    progress.info(f"Training continues after step {found.step}.")
    changed = {name: now for name, now in _environment(model).items() if found.meta.get(name) != now}
    if changed:
        progress.warn(f"Not bit-identical to an unbroken run, since these are new: {changed}")


def _environment(model: SdxlModel) -> dict[str, str]:
    """What bit-identity depends on besides the settings."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    names = ["torch", "bitsandbytes", "peft", "diffusers"]
    # The form that craft_kernels' ops take, and what compiles them: their last bits depend on both.
    kernels = choose("auto", torch.empty(0, device=model.device))
    if kernels == "triton":
        names.append("triton")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": device, "threads": str(torch.get_num_threads()), "kernels": kernels, **versions}


def _to_cpu(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def _refuse_non_finite(cached: CachedSet) -> None:
    latents = [name for name, row in zip(cached.sample_ids, cached.latents, strict=True) if not row.isfinite().all()]
    texts = cached.prompt_embeds.isfinite().flatten(1).all(1) & cached.pooled_prompt_embeds.isfinite().all(1)
    if latents or not bool(texts.all()):
        raise IntegrityError(
            "A cached training value is NaN or infinite.",
            where=f"latents of {latents[:3]}"
            if latents
            else f"text rows {torch.nonzero(~texts).flatten().tolist()[:3]}",
            hint="Type `craft-fast verify`, then `craft-fast cache`: damaged entries are made again.",
        )


def _draw_samples(samples: Samples | None, step: int, unet: Any, progress: Progress) -> None:
    if samples is None:
        return
    unet.eval()
    try:
        with torch.no_grad():
            samples(step, unet)
    except torch.OutOfMemoryError:
        progress.warn(f"Out of memory while drawing sample images at step {step}; training goes on without them.")
    finally:
        unet.train()


class _StepLog:
    """Writes each step once to ``log.jsonl``, and to TensorBoard where that is installed.

    Steps that a killed process had logged after its last checkpoint are done again, bit-identically, and not logged
    again; steps that a checkpoint knows and the log lost are logged from the checkpoint.
    """

    def __init__(self, run: Run, key: str, state: _State, settings: TrainSettings) -> None:
        self.run, self.key, self.state, self.settings = run, key[:16], state, settings
        self.logged = {
            e.get("step") for e in read_log(run) if e.get("event") == "train_step" and e.get("key") == self.key
        }
        self.board: Any = None
        for step in range(1, state.step + 1):
            self.write(step)

    def write(self, step: int) -> None:
        loss, grad_norm = self.state.losses[step - 1], self.state.grad_norms[step - 1]
        rate = self.settings.learning_rate * _warmup(step - 1, self.settings)
        if step not in self.logged:
            self.run.log("train_step", key=self.key, step=step, loss=loss, grad_norm=grad_norm, learning_rate=rate)
            self.logged.add(step)
        if self.board is not None and loss is not None:
            for name, value in (("loss", loss), ("grad_norm", grad_norm), ("learning_rate", rate)):
                self.board.add_scalar(f"train/{name}", value, step)

    def __enter__(self) -> None:
        self.board = _tensorboard(self.run, purge_step=self.state.step + 1)

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()


def _tensorboard(run: Run, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path("tensorboard")), purge_step=purge_step)
