"""Noised latents and the training target, epsilon or v, in one call; the noise is a function of three numbers."""

from craft_kernels.noise_and_target.naive import PredictionType, counter_noise
from craft_kernels.noise_and_target.op import noise_and_target

__all__ = ["PredictionType", "counter_noise", "noise_and_target"]
