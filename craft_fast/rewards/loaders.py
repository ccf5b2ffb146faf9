"""Reward folders to rewards: the three network families behind one class.

Shapes: B batch, S image side in pixels, T tokens.
A reward folder holds ``reward.json``, ``config.json``, ``model.safetensors`` (aesthetic: ``head.safetensors`` too)
and a tokenizer. Weights are safetensors only, and their keys must fit exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.quiet import quiet_progress_bars, quiet_third_party
from craft_fast.rewards.base import REWARD_FILE, Preprocessing, read_preprocessing
from craft_fast.rewards.pixels import prepare
from craft_fast.sdxl.hub import fetch
from craft_fast.sdxl.weights import free_memory
from craft_fast.store.digest import digest_folder, digest_json
from craft_fast.store.run import resolve_uri
from craft_fast.store.safe_load import conversion_command

_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
_TOKENIZER_PATTERNS = ["tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json"]
_VERSION = 1
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class NetworkReward:
    """A reward network with its preprocessing.

    Scores do not depend on what was scored before: a text is tokenised once and, in the clip family, embedded once,
    by itself.

    Args:
        name: short name.
        held_out: see ``Reward``.
        key: see ``Reward``.
        load: reads the network, one of the families of ``networks``.
        spec: preprocessing.
        tokenizer: of transformers; None for the aesthetic family.
        device: to score on; elsewhere than on a CPU the network is there only between ``score`` and ``rest``.
        resident: the network is read now and rests in the machine's memory; otherwise it is read by the first
            ``score`` and forgotten by ``rest``, so that one reward at a time takes memory at all.
    """

    def __init__(
        self,
        name: str,
        held_out: bool,
        key: str,
        load: Callable[[], Any],
        spec: Preprocessing,
        tokenizer: Any | None,
        device: torch.device,
        *,
        resident: bool = True,
    ) -> None:
        self.name = name
        self.held_out = held_out
        self.key = key
        self.spec = spec
        self.device = device
        self._load: Callable[[], Any] | None = load
        self._resident = resident
        self._network: Any = None
        self._tokenizer = tokenizer
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self._texts: dict[str, Tensor] = {}
        if resident:
            self._ready()

    def _ready(self) -> None:
        """Have the network in memory."""
        if self._load is None:
            raise CraftError("A closed reward cannot score.", where=self.name)
        if self._network is None:
            self._network = self._load().eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge pictures uint8 [B, 3, H, W] against B prompts; float32 [B] on the CPU.

        Raises:
            CraftError: closed before, numbers of pictures and prompts differ, or a score is not finite.
        """
        self._ready()
        if len(prompts) != images.shape[0]:
            raise CraftError("Pictures and prompts differ in number.", where=self.name)
        self._network.to(self.device)
        with torch.inference_mode(), self._precision():
            pixels = prepare(images.to(self.device), self.spec)
            if self.spec.family == "aesthetic":
                scores = self._network(pixels)
            elif self.spec.family == "clip":
                texts = torch.stack([self._text(prompt) for prompt in prompts])
                scores = (self._network.image_embedding(pixels).float() * texts).sum(-1) * self._network.score_scale
            else:
                pairs = [self._tokenise(prompt) for prompt in prompts]
                ids, mask = (torch.stack(part).to(self.device) for part in zip(*pairs, strict=True))
                scores = self._network(pixels, ids, mask)
        found: Tensor = scores.float().cpu()
        if not bool(torch.isfinite(found).all()):
            raise CraftError("A reward gave a score that is not a number.", where=f"reward {self.name}")
        return found

    def rest(self) -> None:
        """Move the network off the accelerator, or forget it."""
        if self._network is None:
            return
        if not self._resident:
            self._network = None
            free_memory()
        elif self.device.type != "cpu":
            self._network.to("cpu")

    def close(self) -> None:
        """Free the network."""
        self._network = self._load = None
        self._tokens.clear()
        self._texts.clear()

    def _precision(self) -> AbstractContextManager[Any]:
        # Published scores are made in half precision on a GPU; on a CPU float32 is as fast.
        return torch.autocast("cuda", torch.float16) if self.device.type == "cuda" else nullcontext()

    def _tokenise(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [T] each, of fixed length; a special token written in a prompt stays text."""
        if prompt not in self._tokens:
            assert self._tokenizer is not None
            found = self._tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=self.spec.max_tokens,
                split_special_tokens=True,
                return_tensors="pt",
            )
            self._tokens[prompt] = (found["input_ids"][0], found["attention_mask"][0])
        return self._tokens[prompt]

    def _text(self, prompt: str) -> Tensor:
        """Unit text embedding, float32 [D]."""
        if prompt not in self._texts:
            ids, mask = (part[None].to(self.device) for part in self._tokenise(prompt))
            self._texts[prompt] = self._network.text_embedding(ids, mask)[0].float()
        return self._texts[prompt]


def reward_folder(where: str, *, offline: bool = False, name: str = "NAME") -> Path:
    """The local folder of a reward: path, ``package:NAME/FOLDER``, or hub id, fetched without pickles.

    Args:
        where: one of these.
        offline: a hub id must be in the hub's cache; no network is asked.
        name: the reward's, told in errors.

    Raises:
        EnvironmentProblem: it is not there.
        IntegrityError: it holds pickles and no safetensors.
    """
    found = resolve_uri(where)
    folder = found if isinstance(found, Path) else _fetch(found, f"rewards.{name}.path", _PATTERNS, offline)
    if not folder.is_dir():
        raise EnvironmentProblem("A reward's path is not a folder.", where=str(folder))
    if not (folder / "model.safetensors").is_file():
        pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise IntegrityError(
                "A reward's weights are a pickle, which can run code when loaded; it is not opened.",
                where=str(pickles[0]),
                why="there is no model.safetensors in its folder",
                hint=conversion_command(pickles[0]),
            )
        raise EnvironmentProblem(
            "A reward's folder has no weights.",
            where=str(folder),
            why="there is no model.safetensors",
            hint=f"put the reward's files there, or take it out: --set rewards.{name}=null",
        )
    return folder


def folder_key(folder: Path, spec: Preprocessing) -> str:
    """Digest of a reward folder's files and of how its inputs are made."""
    return digest_json(["network", _VERSION, digest_folder(folder), spec.model_dump(mode="json")])


def load_network(
    name: str, settings: RewardSettings, device: torch.device, *, offline: bool = False, resident: bool = True
) -> NetworkReward:
    """Load a reward network.

    Args:
        name: short name.
        settings: kind and path.
        device: to score on.
        offline: as for ``reward_folder``.
        resident: see ``NetworkReward``.

    Raises:
        EnvironmentProblem: files are missing; ConfigError: reward.json is not right;
        IntegrityError: pickled or damaged weights, or keys that do not fit.
    """
    quiet_third_party()
    folder = reward_folder(settings.path, offline=offline, name=name)
    spec = read_preprocessing(folder, settings.kind)
    tokenizer = None if spec.family == "aesthetic" else _tokenizer(folder, spec, offline)
    return NetworkReward(
        name, settings.held_out, folder_key(folder, spec), lambda: _network(folder, spec), spec, tokenizer, device,
        resident=resident,
    )  # fmt: skip


def _network(folder: Path, spec: Preprocessing) -> Any:
    """The network of a reward's folder, on the CPU."""
    quiet_third_party()
    from craft_fast.rewards.networks import AestheticReward, ClipReward, ImageReward

    quiet_progress_bars()
    try:
        if spec.family == "aesthetic":
            return AestheticReward.from_folder(folder)
        if spec.family == "image_reward":
            return ImageReward.from_folder(folder, spec.score_mean, spec.score_std)
        network = ClipReward.from_folder(folder)
        scale = spec.score_scale
        network.score_scale = float(network.clip.logit_scale.detach().exp()) if scale == "logit_scale" else float(scale)
        return network
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as err:
        raise _unfit(folder, err) from None


def _unfit(folder: Path, err: Exception) -> IntegrityError:
    return IntegrityError(
        "A reward's files do not fit together.",
        where=str(folder),
        why=f"{type(err).__name__}: {' '.join(str(err).split())[:300]}",
        hint="config.json and model.safetensors must be of one model of the reward's family",
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))


def tokenizer_folder(folder: Path, spec: Preprocessing, *, offline: bool = False) -> Path:
    """The local folder of a reward's tokenizer: the reward's own, else the one that its ``reward.json`` names.

    Raises:
        EnvironmentProblem: there is none, or it is not there.
    """
    if _has_tokenizer(folder):
        return folder
    if spec.tokenizer is None:
        raise EnvironmentProblem(
            "A reward's folder has no tokenizer.",
            where=str(folder),
            why="found none of tokenizer.json, vocab.json, vocab.txt",
            hint='copy the tokenizer\'s files there, or name one in reward.json: "tokenizer": "FOLDER or hub id"',
        )
    found = resolve_uri(spec.tokenizer)
    if isinstance(found, Path):
        return found
    return _fetch(found, f"{REWARD_FILE}: tokenizer", _TOKENIZER_PATTERNS, offline)


def _fetch(hub_id: str, setting: str, patterns: list[str], offline: bool) -> Path:
    def missing(folder: Path) -> str:
        whole = (folder / "model.safetensors").is_file() if patterns is _PATTERNS else _has_tokenizer(folder)
        return "" if whole else f"{folder} lacks {'model.safetensors' if patterns is _PATTERNS else 'a tokenizer'}"

    return fetch(hub_id, setting=setting, patterns=patterns, missing=missing, offline=offline)


def _tokenizer(folder: Path, spec: Preprocessing, offline: bool) -> Any:
    from transformers import AutoTokenizer

    where = tokenizer_folder(folder, spec, offline=offline)
    try:
        tokenizer = _read_tokenizer(AutoTokenizer, where)
    except (OSError, ValueError, KeyError) as err:
        raise _unfit(where, err) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(auto: Any, where: Path) -> Any:
    if (where / "tokenizer_config.json").is_file() or (where / "tokenizer.json").is_file():
        return auto.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    from transformers import BertTokenizer, CLIPTokenizer

    kind = CLIPTokenizer if (where / "merges.txt").is_file() else BertTokenizer
    return kind.from_pretrained(where, local_files_only=True)
