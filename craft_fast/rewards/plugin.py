"""Rewards of installed packages: one class, named by an entry point of the group ``craft_fast.rewards``.

In the package's pyproject.toml::

    [project.entry-points."craft_fast.rewards"]
    sharp = "sharp_reward:Sharpness"

and in the settings ``rewards.NAME.kind: sharp``. The class is called with ``device`` and the settings' ``options``;
what it makes has ``score(images uint8 [B, 3, H, W], prompts)``, which gives B numbers. It may have ``rest()``,
``close()``, ``memory_bytes(images)`` and ``cost()``; and the class may have ``digest``, a text that changes with its
weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem
from craft_fast.records import Provenance
from craft_fast.rewards.function import ask, source_digest
from craft_fast.settings_checks import PLUGIN_GROUP as GROUP
from craft_fast.store.digest import digest_json


class PluginReward:
    """A judge that a plug-in made.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        judge: the plug-in's object.
        provenance: see ``Reward``.
    """

    def __init__(self, name: str, held_out: bool, key: str, judge: Any, provenance: Provenance) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self.provenance = provenance
        self._judge = judge

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU.

        Raises:
            CraftError: closed before, it failed, or did not give B finite numbers. ResourceError: out of memory.
        """
        if self._judge is None:
            raise CraftError("A closed reward cannot score.", where=f"reward {self.name}")
        return ask(self._judge.score, images, prompts, name=self.name, what="A reward's plug-in")

    def memory_bytes(self, images: int) -> int:
        """What the plug-in says; 0 where it says nothing."""
        return int(self._call("memory_bytes", images) or 0)

    def cost(self) -> float:
        """What the plug-in says; 0 where it says nothing."""
        return float(self._call("cost") or 0.0)

    def rest(self) -> None:
        """The plug-in's ``rest``, where it has one."""
        self._call("rest")

    def close(self) -> None:
        """The plug-in's ``close``, where it has one."""
        self._call("close")
        self._judge = None

    def _call(self, method: str, *values: Any) -> Any:
        found = getattr(self._judge, method, None)
        if not callable(found):
            return found
        try:
            return found(*values)
        except CraftError:
            raise
        except Exception as err:  # whatever a plug-in raises
            raise _failed(self.name, f"its {method}", err) from err


def find_plugin(kind: str) -> EntryPoint:
    """The entry point of that name.

    Raises:
        EnvironmentProblem: none is installed, or two packages have one.
    """
    # A package that is found twice on the path is one package.
    found = {(point.dist.name if point.dist else "", point.value): point for point in entry_points(group=GROUP)
             if point.name == kind}  # fmt: skip
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise EnvironmentProblem(
            "A reward's plug-in is not installed.",
            where=f"kind: {kind}",
            why=f"no installed package has an entry point {kind} in the group {GROUP}",
            hint="install its package into this environment",
        )
    raise EnvironmentProblem(
        "Two packages have a reward plug-in of the same name.",
        where=f"kind: {kind}",
        why=", ".join(sorted(f"{dist} has {value}" for dist, value in found)),
        hint="uninstall one of them",
    )


def plugin_key(settings: RewardSettings) -> str:
    """Digest of the plug-in's package, version, source, options and own ``digest``; no judge is made.

    The source counts beside the version, as a plug-in that is being written keeps its version.
    """
    point = find_plugin(settings.kind)
    make = _load(point)
    return digest_json(["plug-in", *_package(point), point.value, source_digest(make), settings.options, _digest(make)])


def plugin_provenance(settings: RewardSettings) -> Provenance:
    """How a plug-in's scores come about; no judge is made."""
    point = find_plugin(settings.kind)
    options = json.dumps(settings.options, sort_keys=True) if settings.options else ""
    package, version = _package(point)
    return Provenance(f"plug-in {package} {version}", _digest(_load(point)) or plugin_key(settings), note=options)


def load_plugin(name: str, settings: RewardSettings, device: torch.device) -> PluginReward:
    """Make a plug-in's judge.

    Args:
        name: short name.
        settings: kind and options.
        device: told to the plug-in.

    Raises:
        EnvironmentProblem: not installed, or it cannot be imported. ConfigError: its options do not fit.
        CraftError: it cannot be made, or has no ``score``.
    """
    make = _load(find_plugin(settings.kind))
    try:
        judge = make(device=device, **settings.options)
    except CraftError:
        raise
    except TypeError as err:
        raise ConfigError(
            "A reward's plug-in does not take its options.",
            where=f"rewards.{name}.options",
            why=f"{type(err).__name__}: {err}; it was given device and {', '.join(settings.options) or 'no options'}",
        ) from err
    except Exception as err:  # whatever a plug-in raises
        raise _failed(name, "making it", err) from err
    if not callable(getattr(judge, "score", None)):
        raise CraftError(
            "A reward's plug-in cannot score.",
            where=f"reward {name}, kind: {settings.kind}",
            why=f"a {type(judge).__name__} has no score(images, prompts)",
        )
    return PluginReward(name, settings.held_out, plugin_key(settings), judge, plugin_provenance(settings))


def _load(point: EntryPoint) -> Callable[..., Any]:
    try:
        make = point.load()
    except Exception as err:  # importing runs the package: anything may come
        raise EnvironmentProblem(
            "A reward's plug-in cannot be imported.",
            where=f"kind: {point.name}, {point.value}",
            why=f"{type(err).__name__}: {err}",
            hint="install what it needs, or another version of it",
        ) from err
    if not callable(make):
        raise EnvironmentProblem(
            "A reward's plug-in is nothing that can be called.", where=f"kind: {point.name}, {point.value}"
        )
    found: Callable[..., Any] = make
    return found


def _package(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("", "")


def _digest(make: Callable[..., Any]) -> str:
    """A plug-in's own ``digest``, of the class and not of what it makes, so that it is known without weights."""
    found = getattr(make, "digest", "")
    return found if isinstance(found, str) else ""


def _failed(name: str, doing: str, err: Exception) -> CraftError:
    return CraftError(
        f"A reward's plug-in failed: {doing}.", where=f"reward {name}", why=f"{type(err).__name__}: {err}"
    )
