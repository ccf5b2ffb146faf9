"""A reward that is a Python function: ``module:callable(images uint8 [B, 3, H, W], prompts)`` to B numbers."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import CraftError, EnvironmentProblem
from craft_fast.store.digest import digest_json, sha256_file


class FunctionReward:
    """See the module's docstring.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        function: called with a batch.
    """

    def __init__(self, name: str, held_out: bool, key: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self._function = function

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU.

        Raises:
            CraftError: the function failed, or did not give B finite numbers.
        """
        try:
            with torch.inference_mode():
                scores = torch.as_tensor(self._function(images, prompts), dtype=torch.float32).cpu()
        except CraftError:
            raise
        except Exception as err:  # whatever a user's function raises
            raise CraftError(
                "A reward's function failed.", where=f"reward {self.name}", why=f"{type(err).__name__}: {err}"
            ) from err
        if scores.shape != (images.shape[0],):
            why = f"{images.shape[0]} numbers are wanted, it gave a shape of {tuple(scores.shape)}"
            raise CraftError(
                "A reward's function gave the wrong number of scores.", where=f"reward {self.name}", why=why
            )
        if not bool(torch.isfinite(scores).all()):
            raise CraftError("A reward gave a score that is not a number.", where=f"reward {self.name}")
        return scores

    def rest(self) -> None:
        """Nothing to move."""

    def close(self) -> None:
        """Nothing to free."""


def find_function(path: str) -> tuple[Callable[..., Any], str]:
    """Import ``module:callable``; a module in the working folder is found, installed ones come first.

    Returns:
        The callable, and the digest of its module's source and its name.

    Raises:
        EnvironmentProblem: the module or the callable is not there.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = _import(module_name)
    except Exception as err:  # importing runs the module: anything may come
        raise EnvironmentProblem(
            "A reward's module cannot be imported.",
            where=path,
            why=f"{type(err).__name__}: {err}",
            hint="install its package, or run where MODULE.py lies",
        ) from err
    function = getattr(module, attribute, None)
    if not callable(function):
        raise EnvironmentProblem(
            "A reward's function is not there.", where=path, why=f"{module_name} has no callable {attribute!r}"
        )
    source = inspect.getsourcefile(module)
    content = sha256_file(Path(source)) if source else module_name
    return function, digest_json(["function", content, getattr(function, "__qualname__", attribute)])


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name != name.partition(".")[0]:
            raise
    # Last on the path: a file of the working folder can never stand in for an installed module.
    here = os.getcwd()
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def load_function(name: str, settings: RewardSettings) -> FunctionReward:
    """The reward of ``settings.path``; see ``find_function``."""
    function, key = find_function(settings.path)
    return FunctionReward(name, settings.held_out, key, function)
