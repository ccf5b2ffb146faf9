"""From settings to rewards, and to their keys without loading a network."""

from __future__ import annotations

import torch

from craft_fast.config import RewardSettings
from craft_fast.rewards.base import Reward, read_preprocessing
from craft_fast.rewards.function import find_function, load_function
from craft_fast.rewards.loaders import folder_key, load_network, reward_folder


def load_reward(
    name: str,
    settings: RewardSettings,
    device: torch.device | str = "cpu",
    *,
    offline: bool = False,
    resident: bool = True,
) -> Reward:
    """Load a reward.

    Args:
        name: short name, as in the settings.
        settings: kind, path, held out or not.
        device: to score on.
        offline: hub ids must be in the hub's cache; no network is asked.
        resident: a network is read now and kept; otherwise it is in memory from its first score to its ``rest``.

    Raises:
        EnvironmentProblem: files, a package or a function are missing.
        ConfigError: the reward's own description is not right.
        IntegrityError: pickled or damaged weights, or keys that do not fit.
    """
    if settings.kind == "function":
        return load_function(name, settings)
    return load_network(name, settings, torch.device(device), offline=offline, resident=resident)


def reward_key(name: str, settings: RewardSettings, *, offline: bool = False) -> str:
    """The key that ``load_reward`` would give: a digest of weights and preprocessing, read from the files.

    Raises:
        EnvironmentProblem, ConfigError, IntegrityError: as ``load_reward``, as far as the files' names and
        ``reward.json`` show it.
    """
    if settings.kind == "function":
        return find_function(settings.path)[1]
    folder = reward_folder(settings.path, offline=offline, name=name)
    return folder_key(folder, read_preprocessing(folder, settings.kind))
