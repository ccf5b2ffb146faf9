"""A reward that the authors' own package computes, in a process of its own.

Shapes: B batch, H, W picture in pixels.
Precision ``auto`` is the package's own: hpsv2 scores under float16 autocast on a GPU, image-reward in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, CraftError, ResourceError
from craft_fast.records import Provenance
from craft_fast.rewards import catalog, loaders
from craft_fast.rewards.network_reward import Need
from craft_fast.rewards.packages import environments
from craft_fast.rewards.packages.connection import Connection
from craft_fast.store.digest import digest_json, sha256_once
from craft_fast.store.official import inspect

if TYPE_CHECKING:
    from craft_fast.rewards.loaders import RewardSource
    from craft_fast.rewards.pixels import Pictures

_VERSION = 1
_PER_MESSAGE = 16  # pictures of one message: 50 MB at 1024 x 1024


class PackageReward:
    """See the module's docstring; a ``Reward``.

    The process starts with the first ``score`` and ends with ``rest``, which gives all of its memory back.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        provenance: see ``Reward``.
        environment: where the package is.
        files: by role; ``weights``, and for image-reward ``config``.
        tokenizer: folder with BERT's vocabulary, for image-reward.
        device: of torch, such as ``cpu``, ``cuda``, ``cuda:0``.
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        hps_version: ``v2.1`` or ``v2.0``; hpsv2 alone.
        architecture: sizes of a small network of the same kind; None: the published one.
        need: memory and operations of the same network in float32.
    """

    pixel_form = None  # the package prepares its own pixels

    def __init__(
        self,
        name: str,
        held_out: bool,
        key: str,
        provenance: Provenance,
        *,
        environment: environments.Environment,
        files: Mapping[str, Path],
        tokenizer: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "auto",
        hps_version: str = "v2.1",
        architecture: Mapping[str, Any] | None = None,
        need: Need | None = None,
    ) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self.provenance = provenance
        self.cut: dict[str, int] = {}  # what a package cuts off, it does not tell
        self.seconds = 0.0
        self.peak_bytes = 0
        self._environment = environment
        self._need = need or Need()
        self._connection: Connection | None = None
        self._closed = False
        self._chunk = _PER_MESSAGE
        self._load: dict[str, Any] = {
            "files": {role: str(path) for role, path in files.items()},
            "tokenizer": str(tokenizer) if tokenizer is not None else None,
            "device": str(device),
            "dtype": dtype,
            "hps_version": hps_version,
            "architecture": architecture,
        }

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU.

        Raises:
            CraftError: closed before, numbers of pictures and prompts differ, the process died, the package failed,
                or a score is not finite.
        """
        return self._score("score", list(images), prompts)

    def score_pictures(self, pictures: Pictures, prompts: Sequence[str]) -> Tensor:
        """As ``score``, of pictures that may differ in size."""
        return self._score("score", pictures.images(), prompts)

    def score_own(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """As ``score``, through the package's own ``score()``, one picture [3, H, W] a call: the reference."""
        return self._score("score_own", list(images), prompts)

    def _score(self, operation: str, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        if self._closed:
            raise CraftError("A closed reward cannot score.", where=self.name)
        if len(prompts) != len(images):
            raise CraftError("Pictures and prompts differ in number.", where=self.name)
        scores: list[float] = []
        while len(scores) < len(images):
            part = slice(len(scores), len(scores) + self._chunk)
            try:
                scores += self._ask(operation, images[part], prompts[part])
            except ResourceError:
                if self._chunk == 1 or self._connection is None:
                    raise
                self._chunk = max(1, min(self._chunk, len(images[part])) // 2)
        for score, prompt in zip(scores, prompts, strict=True):
            if not math.isfinite(score):
                raise CraftError(
                    "A reward gave a score that is not a number.",
                    where=f"reward {self.name}, prompt {prompt[:100]!r}",
                    why=f"{score} from the {self.provenance.backend}",
                    hint="score.dtype=float32",
                )
        return torch.tensor(scores, dtype=torch.float32)

    def _ask(self, operation: str, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        # A tensor may be a view of another's memory, which safetensors refuses to write.
        data = {str(index): image.detach().to("cpu", copy=True).contiguous() for index, image in enumerate(images)}
        connection = self._ready()
        try:
            answer = connection.ask(operation, safetensors.torch.save(data), prompts=list(prompts))
        except CraftError:
            if not connection.alive:
                self._drop()
            raise
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(images):
            raise CraftError(
                "A package gave the wrong number of scores.",
                where=f"reward {self.name}",
                why=f"{len(images)} numbers are wanted, it gave {scores!r:.200}",
            )
        self.seconds += float(answer.get("seconds", 0))
        self.peak_bytes = max(self.peak_bytes, int(answer.get("peak_bytes", 0)))
        return [float(score) for score in scores]

    def _ready(self) -> Connection:
        if self._connection is None:
            package = self._environment.package
            # The package opens a pickle: that it holds tensors and nothing else is checked here, without running it.
            inspect(self._load["files"]["weights"])
            self._connection = Connection(package, self._environment.python, where=f"reward {self.name}")
            try:
                self._connection.ask("load", **self._load)
            except BaseException:
                self._drop()
                raise
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def memory_bytes(self, images: int) -> int:
        """Weights in float32, as the package holds them, and activations of what goes through at once."""
        return self._need.weight_bytes + min(images, self._chunk) * self._need.image_bytes

    def cost(self) -> float:
        """GFLOP for one picture."""
        return self._need.image_gflop

    def rest(self) -> None:
        """End the process, and with it all memory that it holds."""
        self._drop()

    def close(self) -> None:
        """End the process for good."""
        self._drop()
        self._closed = True


def package_of(name: str, kind: str) -> str:
    """The package that computes a published reward.

    Raises:
        ConfigError: none does.
    """
    package = catalog.OFFICIALS[kind].package if kind in catalog.OFFICIALS else None
    if package is None:
        there = ", ".join(one.name for one in catalog.OFFICIALS.values() if one.package)
        raise ConfigError(
            f"No package computes {kind}.",
            where=f"rewards.{name}.backend",
            why=f"backend: package is there for {there}",
            hint=f"--set rewards.{name}.backend=native",
        )
    return package


def package_provenance(
    name: str,
    settings: RewardSettings,
    source: RewardSource,
    device: torch.device | str = "cpu",
    *,
    dtype: str = "auto",
) -> Provenance:
    """How a package's scores come about, without its process being started.

    Raises:
        EnvironmentProblem: its environment is not there; ConfigError: there is no such package.
    """
    package = package_of(name, settings.kind)
    return _provenance(environments.need(package), settings.kind, source, device, dtype)


def _provenance(
    environment: environments.Environment, kind: str, source: RewardSource, device: torch.device | str, dtype: str
) -> Provenance:
    versions, hps = environment.versions, environment.package == "hpsv2"
    words = [file for file in source.tokenizer_files if file.name == "vocab.txt"]
    bert = f"transformers {versions.get('transformers')}, bert {sha256_once(words[0])[:12]}" if words else ""
    return Provenance(
        backend=environment.label,
        checkpoint=loaders.checkpoint_digest(source),
        preprocessing=f"torchvision {versions.get('torchvision')}, pillow {versions.get('pillow')}",
        tokenizer=f"hpsv2x's own, ftfy {versions.get('ftfy')}" if hps else bert,
        precision=_precision(environment.package, torch.device(device), dtype),
        note=f"hps_version {hps_version(kind)}" if hps else "",
    )


def _precision(package: str, device: torch.device, dtype: str) -> str:
    if dtype == "auto":
        return "autocast float16" if package == "hpsv2" and device.type == "cuda" else "float32"
    return dtype if dtype == "float32" else f"autocast {dtype}"


def hps_version(kind: str) -> str:
    """``hpsv2.1`` to ``v2.1``: said at every call, since hpsv2's own default is v2.0."""
    return kind.replace("hpsv", "v")


def package_key(name: str, settings: RewardSettings, source: RewardSource, *, dtype: str = "auto") -> str:
    """The key that ``load_package_reward`` would give; ``dtype`` as it is written.

    Raises:
        EnvironmentProblem: the package's environment is not there; ConfigError: there is no such package.
    """
    return _key(environments.need(package_of(name, settings.kind)), source, dtype)


def _key(environment: environments.Environment, source: RewardSource, dtype: str) -> str:
    versions = sorted(environment.versions.items())
    return digest_json(["package", _VERSION, environment.package, versions, loaders.source_key(source, dtype)])


def load_package_reward(
    name: str,
    settings: RewardSettings,
    source: RewardSource,
    device: torch.device | str = "cpu",
    *,
    dtype: str = "auto",
    environment: environments.Environment | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> PackageReward:
    """The reward of ``backend: package``; its process starts with the first ``score``.

    Args:
        name: short name.
        settings: its kind names the published model.
        source: its files.
        device: to score on.
        dtype: ``auto``: the package's own precision.
        environment: where the package is; None: where ``craft-fast rewards install`` put it.
        architecture: see ``PackageReward``.

    Raises:
        EnvironmentProblem: the package's environment is not there.
        ConfigError: no package computes this reward.
    """
    package = package_of(name, settings.kind)
    environment = environment or environments.need(package)
    return PackageReward(
        name, settings.held_out, _key(environment, source, dtype),
        _provenance(environment, settings.kind, source, device, dtype), environment=environment, files=source.files,
        tokenizer=source.tokenizer, device=device, dtype=dtype, hps_version=hps_version(settings.kind),
        architecture=architecture, need=_need(source),
    )  # fmt: skip


def _need(source: RewardSource) -> Need:
    try:
        return loaders.network_need(source, torch.float32)
    except CraftError:  # what is wrong with the files is told when they are read
        return Need()
