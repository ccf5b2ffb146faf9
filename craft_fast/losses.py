"""What the training loss needs besides the network: weights by timestep and weights by sample.

The loss itself is ``craft_kernels.weighted_noise_loss``, design.md section 1 item 6. How an advantage becomes a
weight (phi) is the filter's matter; here weights are only normalised.

Shapes: T training timesteps, N training samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from craft_fast.errors import ConfigError, CraftError


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
