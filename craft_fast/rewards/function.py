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
from craft_fast.errors import CraftError, EnvironmentProblem, ResourceError
from craft_fast.records import Provenance
from craft_fast.store.digest import digest_json, sha256_file


class FunctionReward:
    """See the module's docstring.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        function: called with a batch.
        provenance: see ``Reward``.
    """

    def __init__(
        self, name: str, held_out: bool, key: str, function: Callable[..., Any], provenance: Provenance
    ) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self.provenance = provenance
        self._function = function

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU.

        Raises:
            CraftError: the function failed, or did not give B finite numbers. ResourceError: it ran out of memory.
        """
        return ask(self._function, images, prompts, name=self.name, what="A reward's function")

    def memory_bytes(self, images: int) -> int:
        """Not known: 0."""
        return 0

    def cost(self) -> float:
        """Not known: 0."""
        return 0.0

    def rest(self) -> None:
        """Nothing to move."""

    def close(self) -> None:
        """Nothing to free."""


def ask(function: Callable[..., Any], images: Tensor, prompts: Sequence[str], *, name: str, what: str) -> Tensor:
    """Scores from code that is not ours, checked.

    Args:
        function: called with the pictures and the prompts.
        images: uint8 [B, 3, H, W].
        prompts: B texts.
        name: of the reward, told in errors.
        what: what is called, told in errors.

    Returns:
        float32 [B] on the CPU.

    Raises:
        CraftError: it failed, or did not give B finite numbers. ResourceError: it ran out of memory.
    """
    where = f"reward {name}"
    try:
        with torch.inference_mode():
            scores = torch.as_tensor(function(images, prompts), dtype=torch.float32).cpu()
    except CraftError:
        raise
    except torch.OutOfMemoryError as err:
        raise ResourceError(
            f"{what} ran out of memory.",
            where=where,
            why=str(err).splitlines()[0],
            hint=f"fewer pictures at once: --set score.batch_size={max(1, len(prompts) // 2)}",
        ) from err
    except Exception as err:  # whatever a user's code raises
        raise CraftError(f"{what} failed.", where=where, why=f"{type(err).__name__}: {err}") from err
    if scores.shape != (images.shape[0],):
        why = f"{images.shape[0]} numbers are wanted, it gave a shape of {tuple(scores.shape)}"
        raise CraftError(f"{what} gave the wrong number of scores.", where=where, why=why)
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise CraftError(
            "A reward gave a score that is not a number.",
            where=f"{where}, prompt {prompts[bad[0]][:200]!r}",
            why=f"{scores[bad[0]].item()} for {len(bad)} of {len(scores)} pictures",
        )
    return scores


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
    return function, digest_json(
        ["function", source_digest(module) or module_name, getattr(function, "__qualname__", attribute)]
    )


def source_digest(made_of: Any) -> str:
    """Sha256 of the source file of a module, class or function; empty where it has none."""
    try:
        source = inspect.getsourcefile(made_of)
    except TypeError:  # built in
        return ""
    return sha256_file(Path(source)) if source and Path(source).is_file() else ""


def function_provenance(path: str) -> Provenance:
    """How a function's scores come about: by its source. Errors as ``find_function``."""
    return Provenance("function", find_function(path)[1], note=path)


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
    return FunctionReward(name, settings.held_out, key, function, function_provenance(settings.path))
