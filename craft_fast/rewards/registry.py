"""From settings to rewards, and to their keys and provenance without loading a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES, RewardSettings
from craft_fast.errors import CraftError
from craft_fast.records import Provenance
from craft_fast.rewards import loaders
from craft_fast.rewards.base import Reward
from craft_fast.rewards.function import find_function, function_provenance, load_function

if TYPE_CHECKING:
    from craft_fast.progress import Progress


def load_reward(
    name: str,
    settings: RewardSettings,
    device: torch.device | str = "cpu",
    *,
    offline: bool = False,
    resident: bool = True,
    dtype: str = "auto",
    attention: str = "auto",
    stay: bool = False,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> Reward:
    """Load a reward.

    Args:
        name: short name, as in the settings.
        settings: kind, path, backend, options, held out or not.
        device: to score on.
        offline: what is not on this machine is not asked for on the network.
        resident: a network is read now and kept; otherwise it is in memory from its first score to its ``rest``.
        dtype: of a network, ``score.dtype``; auto: float16 on a GPU, float32 on a CPU.
        attention: of a network, ``engine.attention``.
        stay: a network stays on the device at ``rest``.
        memory_budget: bytes on the device for a network's weights and activations; None: no limit.
        progress: told of what is fetched.

    Raises:
        EnvironmentProblem: files, a package, a plug-in or a function are missing.
        ConfigError: the reward's own description is not right.
        IntegrityError: pickled or damaged weights, or keys that do not fit.
    """
    device = torch.device(device)
    with _named(name):
        if settings.kind == "function":
            return load_function(name, settings)
        if _is_plugin(settings):
            from craft_fast.rewards.plugin import load_plugin

            return load_plugin(name, settings, device)
        if settings.backend == "package":
            from craft_fast.rewards.packages.client import load_package_reward

            source = loaders.open_source(name, settings, offline=offline, progress=progress)
            return load_package_reward(name, settings, source, device, dtype=dtype)
        return loaders.load_network(
            name, settings, device, offline=offline, resident=resident, dtype=dtype, attention=attention, stay=stay,
            memory_budget=memory_budget, progress=progress,
        )  # fmt: skip


def reward_key(
    name: str,
    settings: RewardSettings,
    *,
    offline: bool = False,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> str:
    """The key that ``load_reward`` would give: a digest of weights, preprocessing and settings, read from the files.

    Args:
        name: short name.
        settings: of the reward.
        offline: as for ``load_reward``.
        dtype: ``score.dtype`` as it is written: auto stays auto, so that a key does not depend on the machine.
        progress: told of what is fetched.

    Raises:
        EnvironmentProblem, ConfigError, IntegrityError: as ``load_reward``, as far as the files' names and
        ``reward.json`` show it.
    """
    with _named(name):
        if settings.kind == "function":
            return find_function(settings.path)[1]
        if _is_plugin(settings):
            from craft_fast.rewards.plugin import plugin_key

            return plugin_key(settings)
        source = loaders.open_source(name, settings, offline=offline, progress=progress)
        if settings.backend == "package":
            from craft_fast.rewards.packages.client import package_key

            return package_key(name, settings, source, dtype=dtype)
        return loaders.source_key(source, dtype)


def reward_provenance(
    name: str,
    settings: RewardSettings,
    device: torch.device | str,
    *,
    offline: bool = False,
    dtype: str = "auto",
) -> Provenance:
    """The provenance that ``load_reward`` would give on that device; no network is read. Errors as ``reward_key``."""
    with _named(name):
        if settings.kind == "function":
            return function_provenance(settings.path)
        if _is_plugin(settings):
            from craft_fast.rewards.plugin import plugin_provenance

            return plugin_provenance(settings)
        source = loaders.open_source(name, settings, offline=offline)
        if settings.backend == "package":
            from craft_fast.rewards.packages.client import package_provenance

            return package_provenance(name, settings, source, device, dtype=dtype)
        return loaders.source_provenance(source, loaders.pick_dtype(dtype, torch.device(device)))


def _is_plugin(settings: RewardSettings) -> bool:
    return settings.kind not in (*OFFICIAL_REWARDS, *REWARD_FAMILIES)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of a reward say which one it is."""
    try:
        yield
    except CraftError as err:
        told: tuple[Any, ...] = (err.what, err.where, err.why, err.hint)
        if not any(f"reward {name}" in part or f"rewards.{name}" in part for part in told):
            err.where = f"reward {name}: {err.where}" if err.where else f"reward {name}"
        raise
