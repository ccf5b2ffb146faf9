"""What the training loss needs besides the network: the draws of a step, weights by timestep, weights by sample.

The loss itself is ``craft_kernels.weighted_noise_loss``, design.md section 1 item 6. How an advantage becomes a
weight (phi) is the filter's matter; here weights are only normalised.

Shapes: T training timesteps, N training samples, B samples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from craft_fast.errors import ConfigError, CraftError
from craft_fast.rng import derive_seed, generator, permutation


@dataclass(frozen=True)
class Batch:
    """The draws of one step, on the CPU. Noise is not among them: it is a function of what names it.

    Attributes:
        rows: int64 [B], which samples of the set.
        timesteps: int64 [B], in [0, T).
        dropped: bool [B], trained with the empty prompt.
        noise_ids: int64 [B], the samples' numbers for ``craft_kernels.noise_and_target``.
        noise_seed: its seed.
        step: optimizer steps done before.
    """

    rows: Tensor
    timesteps: Tensor
    dropped: Tensor
    noise_ids: Tensor
    noise_seed: int
    step: int

    def take(self, index: Tensor) -> Batch:
        """Some of the batch's samples with their draws.

        Args:
            index: int64, positions in the batch.
        """
        columns = {name: getattr(self, name)[index] for name in ("rows", "timesteps", "dropped", "noise_ids")}
        return replace(self, **columns)


def sample_rows(n: int, batch_size: int, *, seed: int, step: int) -> list[tuple[int, int]]:
    """Rows of a step's samples: the stream of shuffled epochs, order = f(seed, epoch), cut into batches.

    Args:
        n: samples in the set.
        batch_size: B; may be larger than ``n``.
        seed: root seed.
        step: optimizer steps done before.

    Returns:
        B pairs (row, how often the row came before in this step).
    """
    seen: dict[int, int] = {}
    found = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        row = _epoch_order(n, derive_seed(seed, "train", "order", position // n))[position % n]
        found.append((row, seen.get(row, 0)))
        seen[row] = seen.get(row, 0) + 1
    return found


@lru_cache(maxsize=8)
def _epoch_order(n: int, seed: int) -> list[int]:
    return permutation(n, seed)


def draw_batch(
    sample_ids: Sequence[str],
    *,
    seed: int,
    step: int,
    timesteps: int,
    batch_size: int,
    prompt_dropout: float,
) -> Batch:
    """The draws of one step: each sample's own, f(seed, "train", sample_id, step), whatever batch is around it.

    A sample that comes more than once in a step (a small set, or the seam of two epochs) gets other draws each time.

    Args:
        sample_ids: ids of the N samples of the set.
        seed: root seed.
        step: optimizer steps done before.
        timesteps: T; drawn uniformly from [0, T).
        batch_size: B, the global batch.
        prompt_dropout: chance of the empty prompt.
    """
    rows = sample_rows(len(sample_ids), batch_size, seed=seed, step=step)
    drawn_t, dropped = [], []
    for row, repeat in rows:
        parts = (sample_ids[row], step, repeat) if repeat else (sample_ids[row], step)
        draw = generator(derive_seed(seed, "train", *parts))
        dropped.append(float(torch.rand((), generator=draw)) < prompt_dropout)
        drawn_t.append(int(torch.randint(timesteps, (), generator=draw)))
    return Batch(
        rows=torch.tensor([row for row, _ in rows]),
        timesteps=torch.tensor(drawn_t),
        dropped=torch.tensor(dropped),
        noise_ids=torch.tensor([derive_seed(0, "noise", sample_ids[row], repeat) for row, repeat in rows]),
        noise_seed=derive_seed(seed, "train", "noise"),
        step=step,
    )


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio ``a_t / (1 - a_t)`` by timestep, float64 [T]."""
    a_t = alphas_cumprod.to(torch.float64)
    return a_t / (1 - a_t)


def min_snr_weight(alphas_cumprod: Tensor, gamma: float | None, prediction_type: str) -> Tensor | None:
    """The min-SNR weight lambda of each timestep, arXiv 2303.09556 section 3.4.

    Predicting noise: ``min(SNR, gamma) / SNR``; predicting v: ``min(SNR, gamma) / (SNR + 1)``. At SNR 0 (zero
    terminal SNR) the first takes its limit, 1.

    Args:
        alphas_cumprod: [T], in [0, 1).
        gamma: where the ratio is cut; None turns the weight off.
        prediction_type: ``epsilon`` or ``v_prediction``.

    Returns:
        float32 [T] on the device of ``alphas_cumprod``, or None when ``gamma`` is None.

    Raises:
        ConfigError: another prediction type.
    """
    if gamma is None:
        return None
    ratio = snr(alphas_cumprod)
    if prediction_type == "epsilon":
        weight = (gamma / ratio).clamp(max=1.0)
    elif prediction_type == "v_prediction":
        weight = ratio.clamp(max=gamma) / (ratio + 1)
    else:
        raise ConfigError(
            "min-SNR has no form for this prediction type.",
            where="model.prediction_type",
            why=f"found {prediction_type!r}; allowed: epsilon, v_prediction",
        )
    return weight.to(torch.float32)


def normalise_weights(weights: Tensor) -> Tensor:
    """Sample weights over their mean size, ``w / mean |w|``, so that the learning rate means the same for every phi.

    For weights of one sign this is design.md's ``w / mean(w)``. With both signs a plain mean can be zero or negative,
    which would blow the loss up or turn it round; the mean size can not.

    Args:
        weights: [N], any sign.

    Returns:
        float32 [N].

    Raises:
        CraftError: no samples, a weight that is not finite, or all weights zero.
    """
    hint = "Look at the weights with `craft-fast status`, or try train.weighting: uniform."
    if weights.numel() == 0:
        raise CraftError("There is nothing to train on.", where="train", why="no sample passed the filter", hint=hint)
    if not bool(torch.isfinite(weights).all()):
        bad = torch.nonzero(~torch.isfinite(weights)).flatten().tolist()
        raise CraftError("A sample weight is not finite.", where=f"training samples {bad[:5]}", hint=hint)
    size = weights.to(torch.float64).abs().mean()
    if float(size) == 0.0:
        raise CraftError(
            "All sample weights are zero.",
            where="train.weighting",
            why="the weighting gives no accepted sample a weight, so there is no loss to follow",
            hint=hint,
        )
    return (weights.to(torch.float64) / size).to(torch.float32)
