"""Noised latents and the training target, epsilon or v, in one call."""

from craft_kernels.noise_and_target.naive import PredictionType, noise_and_target

__all__ = ["PredictionType", "noise_and_target"]
