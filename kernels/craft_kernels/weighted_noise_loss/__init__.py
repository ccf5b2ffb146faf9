"""Weighted noise-prediction loss with per-sample weights of any sign and optional weights by timestep."""

from craft_kernels.weighted_noise_loss.op import weighted_noise_loss

__all__ = ["weighted_noise_loss"]
