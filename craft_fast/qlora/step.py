"""One training step on the device, in which nothing waits for it: loss and gradients, update.

Shapes: B samples of a global or micro-batch, C x h x w latents, T training timesteps. Samples may be of several sizes
(buckets of own pictures); what goes through the UNet together is of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from craft_fast.qlora.inputs import MicroBatch
from craft_fast.qlora.optim import Optimizer, nothing_to_free, persist
from craft_fast.sdxl.graph import Replay
from craft_kernels.noise_and_target import noise_and_target
from craft_kernels.weighted_noise_loss import weighted_noise_loss

# Small gradients underflow in float16; a fixed power of two brings them into range and is divided out exactly.
FLOAT16_LOSS_SCALE = 1024.0
# A recorded pass keeps its inputs, 3 MB for four samples of SDXL, and its place in the graphs' memory. Five sizes in
# batches of four make twenty shapes; those met first are mostly the frequent ones.
MAX_RECORDED = 8
# Of a step: one that makes buffers, two that warm up, one that records. Of a pass: two that warm up, one that records.
_UNSETTLED_STEPS, _UNSETTLED_PASSES = 4, 3


def _silent(message: str) -> None:
    """What is told about a recording that fails, by default."""


class Stepper:
    """Loss, gradients and update of a step, each recorded once for each shape and replayed where that is wanted.

    One micro-batch's forward, loss and backward are one recorded function, the update is another. Noise is made outside
    of them: its step is a number of the CPU's.

    The first ``MAX_RECORDED`` shapes of micro-batches are recorded. Others run as they are, with the same bits, and in
    memory besides that of the graphs: where this is short, :meth:`stop_recording`.

    Args:
        unet: ready to train, in training mode.
        optimizer: over its trained parameters.
        alphas_cumprod: float32 [T] on the device.
        prediction_type: ``epsilon`` or ``v_prediction``.
        timestep_weight: lambda by timestep, float32 [T] on the device, or None for 1.
        add_time_ids: size of the latents (h, w) to [1, 6] on the device in ``dtype``: size and crop of the pictures.
        dtype: what the UNet takes.
        device: where it is.
        noise_seed: see ``craft_kernels.noise_and_target``.
        record: replay CUDA graphs; without effect where there is no CUDA, or where updates are made in backward.
        autocast: run the UNet under autocast to ``dtype``, for layers of another dtype; else ``dtype`` is all there is.
        on_fallback: told once why, when recording fails and training goes on without.

    Attributes:
        record: whether steps are recorded.
        scale: what losses are multiplied with before backward, in float16.
    """

    def __init__(
        self,
        unet: Any,
        optimizer: Optimizer,
        *,
        alphas_cumprod: Tensor,
        prediction_type: str,
        timestep_weight: Tensor | None,
        add_time_ids: Mapping[tuple[int, int], Tensor],
        dtype: torch.dtype,
        device: torch.device,
        noise_seed: int,
        record: bool,
        autocast: bool,
        on_fallback: Callable[[str], None] = _silent,
    ) -> None:
        self.unet, self.optimizer = unet, optimizer
        self.alphas_cumprod, self.timestep_weight = alphas_cumprod, timestep_weight
        self.prediction_type: Any = prediction_type
        self.add_time_ids = add_time_ids
        self.dtype, self.device, self.noise_seed, self.autocast = dtype, device, noise_seed, autocast
        self.record = record and device.type == "cuda" and not optimizer.updates_in_backward
        self.on_fallback = on_fallback
        self.scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._passes: dict[tuple[int, ...], Replay[tuple[Tensor, Tensor]]] = {}
        self._update: Replay[Tensor] | None = None
        self._pool: Any = None
        self._loss: Tensor | None = None
        self._armed = False
        self._relieve: Callable[[], None] = nothing_to_free
        self._steps, self._met, self._new = 0, Counter[tuple[int, ...]](), False
        self._grads = self._static_gradients()

    def _static_gradients(self) -> list[Tensor]:
        """Gradients that stay where they are, for a recorded backward, where the optimizer has none of that kind."""
        if not self.record or self.optimizer.capturable:
            return []
        parameters = [p for p in self.unet.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        return [p.grad for p in parameters]

    # ---- the two halves of a step

    def gradients(
        self, micro_batches: Sequence[MicroBatch], *, step: int, divisor: int, lr: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradients of a global batch, design.md section 1 item 6; gradients of an earlier call are dropped.

        Running out of memory changes nothing: once some is free, the call can be made again.

        Args:
            micro_batches: its parts.
            step: optimizer steps done before.
            divisor: size of the global batch.
            lr: rate of this step. An optimizer that updates in backward does so here if it is given, and holds the
                gradients of all parameters until :meth:`update` if it is not.

        Returns:
            The loss, float32 [], and each sample's unweighted error, float32 [B].

        Raises:
            torch.OutOfMemoryError: see above.
            ResourceError: the last call ran out of memory after parameters had changed in backward.
        """
        self.zero_grad()
        self._steps, self._new = self._steps + 1, False
        self._armed = self.optimizer.updates_in_backward and lr is not None
        losses: list[Tensor] = []
        errors: list[Tensor] = []
        for part in micro_batches:
            last = len(losses) == len(micro_batches) - 1

            def arm(loss: Tensor) -> None:
                assert lr is not None
                self.optimizer.arm(lr, loss=torch.stack([*losses, loss]).sum(), grad_scale=self.scale)

            loss, per_sample = self._pass(part, step, divisor, arm if last and self._armed else None)
            losses.append(loss)
            errors.append(per_sample)
        self._loss = torch.stack(losses).sum()
        return self._loss, torch.cat(errors)

    def update(self, lr: float, *, on_out_of_memory: Callable[[], None] = nothing_to_free) -> Tensor:
        """Update by the gradients of the last :meth:`gradients`; not where these or its loss are not finite.

        Args:
            lr: rate of this step.
            on_out_of_memory: frees memory, before another try; may call :meth:`release`.

        Returns:
            Norm of all gradients before the clip, float32 []; valid until the next call. See ``Optimizer.step``.

        Raises:
            ResourceError: memory does not suffice, four times in a row.
        """
        assert self._loss is not None
        optimizer: Any = self.optimizer
        if not optimizer.capturable:
            # What was armed has been told of the loss.
            loss = None if self._armed else self._loss
            return optimizer.step(lr, loss=loss, grad_scale=self.scale, on_out_of_memory=on_out_of_memory)  # type: ignore[no-any-return]
        self._relieve = on_out_of_memory
        optimizer.set_lr(lr)
        return persist(partial(self._replay_update, self._loss), on_out_of_memory, "recording of the optimizer step")

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self._grads:
            torch._foreach_zero_(self._grads)
        else:
            self.optimizer.zero_grad()

    @property
    def settled(self) -> bool:
        """Whether the last step was like most that follow: no shape was new in it, nothing compiled or recorded."""
        return self._steps > _UNSETTLED_STEPS and not self._new

    def stop_recording(self) -> bool:
        """Run without graphs from here on, with the same bits; False where there are none."""
        if not self.record:
            return False
        self.release()
        self.record = False
        return True

    def release(self) -> None:
        """Give the memory of all graphs and their buffers back; the next step makes them anew."""
        for replay in (*self._passes.values(), self._update):
            if replay is not None:
                replay.release()
        self._passes.clear()
        self._update = self._pool = None
        self._steps = 0
        self._met.clear()

    # ---- what is recorded

    def _pass(
        self, part: MicroBatch, step: int, divisor: int, arm: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one micro-batch; its share of the loss and its errors."""
        noised, target = noise_and_target(
            part.latents, part.noise_ids, self.alphas_cumprod, part.timesteps, seed=self.noise_seed, step=step,
            prediction_type=self.prediction_type,
        )  # fmt: skip
        tensors = {
            "noised": noised, "target": target, "timesteps": part.timesteps, "prompt_embeds": part.prompt_embeds,
            "pooled_prompt_embeds": part.pooled_prompt_embeds, "weights": part.weights,
        }  # fmt: skip
        key = (divisor, *noised.shape)
        self._met[key] += 1
        self._new |= self._met[key] <= _UNSETTLED_PASSES
        if arm is not None or (key not in self._passes and len(self._passes) >= MAX_RECORDED):
            return self._forward_backward(divisor, arm, **tensors)
        if key not in self._passes:
            self._passes[key] = self._replay(partial(self._forward_backward, divisor, None))
        replay = self._passes[key]
        loss, per_sample = replay(**tensors)
        # The next micro-batch of this shape writes into the same tensors.
        return (loss.clone(), per_sample.clone()) if replay.recorded else (loss, per_sample)

    def _forward_backward(
        self,
        divisor: int,
        arm: Callable[[Tensor], None] | None,
        *,
        noised: Tensor,
        target: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        time_ids = self.add_time_ids[noised.shape[-2], noised.shape[-1]]
        conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.expand(len(noised), -1)}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast):
            noise_pred = self.unet(
                noised.to(self.dtype), timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False
            )[0]
        loss, per_sample = weighted_noise_loss(
            noise_pred, target, weights, divisor=divisor,
            timesteps=None if self.timestep_weight is None else timesteps, timestep_weight=self.timestep_weight,
        )  # fmt: skip
        if arm is not None:
            arm(loss.detach())
        (loss * self.scale).backward()
        return loss.detach(), per_sample

    def _replay_update(self, loss: Tensor) -> Tensor:
        if self._update is None:
            self._update = self._replay(self._apply)
        return self._update(loss=loss)

    def _apply(self, *, loss: Tensor) -> Tensor:
        # A recording can not free memory on its way: it fails as a whole, and the whole is tried again.
        recording = self.record and torch.cuda.is_current_stream_capturing()
        relieve = nothing_to_free if recording else self._relieve
        optimizer: Any = self.optimizer
        return optimizer.apply(loss=loss, grad_scale=self.scale, on_out_of_memory=relieve)  # type: ignore[no-any-return]

    def _replay(self, fn: Callable[..., Any]) -> Replay[Any]:
        # One memory for all: no result is read after the next one of them has run.
        if self.record and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return Replay(fn, record=self.record, pool=self._pool, on_fallback=self._tell)

    def _tell(self, why: str) -> None:
        tell, self.on_fallback = self.on_fallback, _silent
        tell(why)
