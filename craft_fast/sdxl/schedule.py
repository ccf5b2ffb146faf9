"""The training noise schedule as pure functions.

Shapes: B samples, N training timesteps (1,000 for SDXL). ``alphas_cumprod`` [N] is float32, ``timesteps`` [B] int64.
"""

from __future__ import annotations

import torch

from craft_fast.sdxl.load import SdxlModel


def alphas_cumprod(model: SdxlModel) -> torch.Tensor:
    """The scheduler's cumulative products of alpha, float32 [N] on the CPU; falling, in (0, 1)."""
    values: torch.Tensor = model.scheduler.alphas_cumprod
    return values.detach().to("cpu", torch.float32).clone()


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` (arXiv 2303.09556, section 3.4).

    Returns:
        float32 [B].
    """
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps]
    return alpha_bar / (1 - alpha_bar)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise`` (arXiv 2006.11239, equation 4).

    Args:
        latents: ``x_0``, [B, C, h, w].
        noise: standard normal, like ``latents``.
        timesteps: int64 [B].
        alphas_cumprod: float32 [N].

    Returns:
        ``x_t``, like ``latents``.
    """
    signal, sigma = _roots(alphas_cumprod, timesteps, latents)
    return signal * latents + sigma * noise


def target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """What the UNet must predict: the noise, or ``v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``.

    ``v`` is that of arXiv 2202.00512, appendix D.

    Args:
        latents: ``x_0``, [B, C, h, w].
        noise: like ``latents``.
        timesteps: int64 [B].
        alphas_cumprod: float32 [N].
        prediction_type: ``epsilon`` or ``v_prediction``.

    Returns:
        Like ``latents``.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _roots(alphas_cumprod, timesteps, latents)
        return signal * noise - sigma * latents
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: epsilon, v_prediction")


def _roots(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)
