"""The training set where a step can take from it: its samples by size, selected without waiting for the device.

Shapes: N samples of the set, P distinct prompts, B samples of a global or micro-batch, C x h x w latents. Samples may
be of several sizes (buckets of own pictures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.losses import Batch

Latents = Tensor | Sequence[Tensor]
"""[N, C, h, w], or N of [C, h, w] of several sizes."""

# A set of a hundred samples is some 50 MB; one of thousands stays in the machine's memory.
ON_DEVICE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class MicroBatch:
    """What goes into one forward, on the device.

    Attributes:
        latents: x_0, float32 [B, C, h, w].
        prompt_embeds: [B, 77, D] in the UNet's dtype.
        pooled_prompt_embeds: [B, D2], likewise.
        timesteps: int64 [B], in [0, T).
        noise_ids: int64 [B], see ``craft_kernels.noise_and_target``.
        weights: float32 [B], over their mean size.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    timesteps: Tensor
    noise_ids: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def split(self, size: int) -> list[MicroBatch]:
        """Views of at most ``size`` samples each, in order."""
        columns = [getattr(self, field.name).split(size) for field in fields(self)]
        return [MicroBatch(*parts) for parts in zip(*columns, strict=True)]


class Inputs:
    """The training set where steps can select from it without waiting: on the device if it is small.

    Args:
        latents: float32 [N, C, h, w] on the CPU, or N of [C, h, w] where they are of several sizes.
        prompt_embeds: [P, 77, D] on the CPU, any floating point.
        pooled_prompt_embeds: [P, D2], likewise.
        prompt_index: int64 [N], each sample's row in these two.
        empty_index: row of the empty prompt.
        weights: float32 [N], over their mean size.
        dtype: of the UNet.
        device: where training runs.
    """

    def __init__(
        self,
        *,
        latents: Latents,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        prompt_index: Tensor,
        empty_index: int,
        weights: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device, self.prompt_index, self.empty_index = device, prompt_index, empty_index
        buckets, self._bucket, self._place = in_buckets(latents)
        samples = [*buckets, weights]
        texts = [prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in samples + texts)
        self.home = device if size <= ON_DEVICE_BYTES else torch.device("cpu")
        *self.latents, self.weights = (tensor.to(self.home) for tensor in samples)
        self.prompt_embeds, self.pooled_prompt_embeds = (tensor.to(self.home) for tensor in texts)

    def by_size(self, batch: Batch) -> list[Batch]:
        """A global batch cut into parts of one size each, by the order in which the sizes come in it.

        A sample's draws are its own, so the cut changes nothing but the order in which gradients are summed.
        """
        if len(self.latents) == 1:
            return [batch]
        buckets = self._bucket[batch.rows].tolist()
        rows = {bucket: [i for i, found in enumerate(buckets) if found == bucket] for bucket in dict.fromkeys(buckets)}
        return [batch.take(torch.tensor(found)) for found in rows.values()]

    def select(self, batch: Batch) -> MicroBatch:
        """Samples of one size, on their way to the device: copies are queued, and nothing waits for them."""
        text = torch.where(batch.dropped, self.empty_index, self.prompt_index[batch.rows])
        place, latents = self._place[batch.rows], self.latents[int(self._bucket[batch.rows[0]])]
        # One copy for all numbers; each copy from pinned memory costs more to begin than these bytes.
        numbers = self._send(torch.stack([batch.timesteps, batch.noise_ids, batch.rows, text, place]))
        rows, texts, place = numbers[2:] if self.home == self.device else (batch.rows, text, place)
        return MicroBatch(
            latents=self._send(latents[place]),
            prompt_embeds=self._send(self.prompt_embeds[texts]),
            pooled_prompt_embeds=self._send(self.pooled_prompt_embeds[texts]),
            timesteps=numbers[0],
            noise_ids=numbers[1],
            weights=self._send(self.weights[rows]),
        )

    def _send(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        # The allocator of pinned memory keeps it until the copy is done.
        return tensor.pin_memory().to(self.device, non_blocking=True)


def sizes(latents: Latents) -> list[tuple[int, int]]:
    """The sizes (h, w) among latents, each once, in the order in which they come."""
    if isinstance(latents, Tensor):
        return [(latents.shape[-2], latents.shape[-1])]
    return list(dict.fromkeys((row.shape[-2], row.shape[-1]) for row in latents))


def in_buckets(latents: Latents) -> tuple[list[Tensor], Tensor, Tensor]:
    """Latents stacked by size, and where each sample is.

    Returns:
        One [n, C, h, w] a size; the bucket of each sample and its place in it, int64 [N].
    """
    if isinstance(latents, Tensor):
        return [latents], torch.zeros(len(latents), dtype=torch.int64), torch.arange(len(latents))
    known = {size: number for number, size in enumerate(sizes(latents))}
    buckets: list[list[Tensor]] = [[] for _ in known]
    found = []
    for row in latents:
        bucket = known[row.shape[-2], row.shape[-1]]
        found.append((bucket, len(buckets[bucket])))
        buckets[bucket].append(row)
    where = torch.tensor(found)
    return [torch.stack(rows) for rows in buckets], where[:, 0], where[:, 1]


def refuse_non_finite(
    latents: Latents, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, sample_ids: Sequence[str]
) -> None:
    """See that no value of a training set is NaN or infinite; arguments as for :class:`Inputs`.

    Raises:
        IntegrityError: one is; the first samples or rows are named.
    """
    found = [name for name, row in zip(sample_ids, latents, strict=True) if not row.isfinite().all()]
    texts = prompt_embeds.isfinite().flatten(1).all(1) & pooled_prompt_embeds.isfinite().all(1)
    rows = torch.nonzero(~texts).flatten().tolist()
    if found or rows:
        raise IntegrityError(
            "A cached training value is NaN or infinite.",
            where=f"latents of {found[:3]}" if found else f"text rows {rows[:3]}",
            hint="Type `craft-fast verify`, then `craft-fast cache`: damaged entries are made again.",
        )
