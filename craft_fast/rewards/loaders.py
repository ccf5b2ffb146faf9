"""From settings to a reward network: which files it is made of, what digests they have, and the network itself.

A family's folder holds ``reward.json``, ``config.json``, ``model.safetensors`` (aesthetic: ``head.safetensors`` too)
and a tokenizer; weights there are safetensors only. A published model's files are what its authors publish, found by
``craft_fast.rewards.shelf`` or in a folder of the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES, RewardSettings
from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError
from craft_fast.quiet import quiet_third_party
from craft_fast.records import Provenance
from craft_fast.rewards.base import REWARD_FILE, Preprocessing, read_preprocessing
from craft_fast.rewards.network_reward import Need, NetworkReward
from craft_fast.rewards.pixels import preprocessing_id
from craft_fast.sdxl.hub import fetch
from craft_fast.store.digest import digest_json, sha256_once
from craft_fast.store.run import resolve_uri
from craft_fast.store.safe_load import conversion_command

if TYPE_CHECKING:
    from craft_fast.progress import Progress
    from craft_fast.rewards.texts import Texts

_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
_TOKENIZER_PATTERNS = ["tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json"]
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt",
)  # fmt: skip
# Of how pictures and texts are prepared and scores are computed, where the same files and settings give other scores.
_VERSION = 2
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WEIGHTS = ("weights", "head")


@dataclass(frozen=True)
class RewardSource:
    """The files of a reward network and how it is used.

    Attributes:
        spec: preprocessing.
        files: by role: weights, and config and head where there are such files.
        tokenizer: folder of the tokenizer's files; None where text is not looked at.
        origin: what it is, for people: a published model's name, or the folder.
        tokenizer_files: those of the folder that count.
    """

    spec: Preprocessing
    files: Mapping[str, Path]
    tokenizer: Path | None
    origin: str
    tokenizer_files: tuple[Path, ...] = field(default=())


# ---- which files


def open_source(
    name: str, settings: RewardSettings, *, offline: bool = False, progress: Progress | None = None
) -> RewardSource:
    """Find a network's files; what is missing is fetched.

    Args:
        name: short name, told in errors.
        settings: kind, a published model's name or a family, and path.
        offline: ask no network.
        progress: told of what is fetched.

    Raises:
        EnvironmentProblem: files are missing and not to be had. ConfigError: path or reward.json is not right.
        IntegrityError: the folder holds pickles and no safetensors, or a file is not the published one.
    """
    if is_published(settings):
        return _open_published(name, settings, offline, progress)
    folder = reward_folder(settings.path, offline=offline, name=name)
    spec = read_preprocessing(folder, settings.kind)
    names = {"weights": "model.safetensors", "config": "config.json", "head": "head.safetensors"}
    files = {role: folder / file for role, file in names.items() if (folder / file).is_file()}
    if spec.family == "aesthetic":
        return RewardSource(spec, files, None, str(folder))
    words = tokenizer_folder(folder, spec, offline=offline)
    known = tuple(words / file for file in _TOKENIZER_FILES if (words / file).is_file())
    return RewardSource(spec, files, words, str(folder), known)


def is_published(settings: RewardSettings) -> bool:
    """Whether the settings mean a published model's own files; ``mps`` with a ``reward.json`` is a family's folder."""
    if settings.kind not in OFFICIAL_REWARDS:
        return False
    if settings.kind not in REWARD_FAMILIES or not settings.path:
        return True
    folder = resolve_uri(settings.path)
    return not (isinstance(folder, Path) and (folder / REWARD_FILE).is_file())


def _open_published(name: str, settings: RewardSettings, offline: bool, progress: Progress | None) -> RewardSource:
    from craft_fast.rewards.catalog import get
    from craft_fast.rewards.shelf import ensure

    official = get(settings.kind)
    folder = resolve_uri(settings.path) if settings.path else None
    if folder is not None and not (isinstance(folder, Path) and folder.is_dir()):
        raise ConfigError(
            "A published reward model's path is not a folder.",
            where=f"rewards.{name}.path: {settings.path}",
            why=f"it is where the files of {official.title} are, under the names that they were published by",
            hint=f"leave it out, and craft-fast rewards fetch {official.name} gets them",
        )
    found = ensure(official, folder=folder, offline=offline, progress=progress)
    return RewardSource(
        official.spec, {str(role): path for role, path in found.found.items()}, found.tokenizer_folder, official.name,
        tuple(found.tokenizer),
    )  # fmt: skip


def reward_folder(where: str, *, offline: bool = False, name: str = "NAME") -> Path:
    """The local folder of a family's reward: path, ``package:NAME/FOLDER``, or hub id, fetched without pickles.

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
                hint=f"a published model's own files are read by its name, --set rewards.{name}.kind="
                f"{'|'.join(OFFICIAL_REWARDS)}; others are converted: {conversion_command(pickles[0])}",
            )
        raise EnvironmentProblem(
            "A reward's folder has no weights.",
            where=str(folder),
            why="there is no model.safetensors",
            hint=f"put the reward's files there, or take it out: --set rewards.{name}=null",
        )
    return folder


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


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))


def _fetch(hub_id: str, setting: str, patterns: list[str], offline: bool) -> Path:
    def missing(folder: Path) -> str:
        whole = (folder / "model.safetensors").is_file() if patterns is _PATTERNS else _has_tokenizer(folder)
        return "" if whole else f"{folder} lacks {'model.safetensors' if patterns is _PATTERNS else 'a tokenizer'}"

    return fetch(hub_id, setting=setting, patterns=patterns, missing=missing, offline=offline)


# ---- what they are


def checkpoint_digest(source: RewardSource) -> str:
    """Sha256 of the weights' file; of several, the digest of their names and sha256."""
    files = [source.files[role] for role in _WEIGHTS if role in source.files]
    if len(files) == 1:
        return sha256_once(files[0])
    return digest_json([[file.name, sha256_once(file)] for file in files])


def source_key(source: RewardSource, dtype: str) -> str:
    """Digest of a network's files, of how its inputs are made, and of the settings that change its scores.

    Args:
        source: the files.
        dtype: ``score.dtype`` as it is written; auto stays auto, so that a key does not depend on the machine.
    """
    files = {role: sha256_once(path) for role, path in source.files.items()}
    words = [[path.name, sha256_once(path)] for path in sorted(source.tokenizer_files)]
    spec = source.spec.model_dump(mode="json")
    return digest_json(["network", _VERSION, files, words, spec, dtype])


def source_provenance(source: RewardSource, dtype: torch.dtype) -> Provenance:
    """How the native network's scores come about; its weights are hashed, not read.

    Args:
        source: the files.
        dtype: that it computes in.
    """
    return _provenance(source, dtype, _texts(source))


def _provenance(source: RewardSource, dtype: torch.dtype, texts: Texts | None) -> Provenance:
    return Provenance(
        backend="native",
        checkpoint=checkpoint_digest(source),
        preprocessing=preprocessing_id(source.spec),
        tokenizer=texts.id if texts is not None else "",
        precision=str(dtype).removeprefix("torch."),
        note=_note(source.spec),
    )


def _note(spec: Preprocessing) -> str:
    """What else decides a score, where it is not nothing."""
    plain = Preprocessing(family=spec.family)
    told = {
        "prefix": repr(spec.prefix), "condition": digest_json(spec.condition)[:12], "threshold": f"{spec.threshold:g}",
        "score_scale": f"{spec.score_scale}", "score_floor": f"{spec.score_floor}", "score_mean": f"{spec.score_mean}",
        "score_std": f"{spec.score_std}",
    }  # fmt: skip
    parts = [spec.note] if spec.note else []
    parts += [f"{key} {text}" for key, text in told.items() if getattr(spec, key) != getattr(plain, key)]
    return "; ".join(parts)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``score.dtype`` on a device; auto: float16 on a GPU, where published scores are made in it, else float32."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, name)
    return found


# ---- the network


def load_network(
    name: str,
    settings: RewardSettings,
    device: torch.device,
    *,
    offline: bool = False,
    resident: bool = True,
    dtype: str = "auto",
    attention: str = "auto",
    stay: bool = False,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> NetworkReward:
    """Load a reward network; arguments and errors as ``registry.load_reward``."""
    quiet_third_party()
    source = open_source(name, settings, offline=offline, progress=progress)
    return network_reward(
        name, source, device, held_out=settings.held_out, resident=resident, dtype=dtype, attention=attention,
        stay=stay, memory_budget=memory_budget,
    )  # fmt: skip


def network_reward(
    name: str,
    source: RewardSource,
    device: torch.device,
    *,
    held_out: bool = False,
    resident: bool = True,
    dtype: str = "auto",
    attention: str = "auto",
    stay: bool = False,
    memory_budget: int | None = None,
) -> NetworkReward:
    """The reward of files that were found before; arguments and errors as ``registry.load_reward``."""
    chosen, texts = pick_dtype(dtype, device), _texts(source)
    return NetworkReward(
        name, held_out, source_key(source, dtype), lambda: _network(source, chosen, attention, texts, device),
        source.spec, texts, device, provenance=_provenance(source, chosen, texts), dtype=chosen, resident=resident,
        stay=stay, need=network_need(source, chosen), memory_budget=memory_budget,
    )  # fmt: skip


def _network(
    source: RewardSource, dtype: torch.dtype, attention: str, texts: Texts | None, device: torch.device
) -> Any:
    """The network on the CPU; it gives bare scores, of which ``NetworkReward`` makes the published ones."""
    quiet_third_party()
    from craft_fast.rewards.networks.build import read_network

    bare = source.spec.model_copy(update={"score_scale": 1.0, "score_mean": 0.0, "score_std": 1.0})
    network: Any = read_network(bare, source.files, dtype=dtype, attention=attention, device=device)  # type: ignore[arg-type]
    if source.spec.family == "mps" and texts is not None:
        network.set_condition(texts.tokens(source.spec.condition)[0])
    return network


def network_need(source: RewardSource, dtype: torch.dtype) -> Need:
    """What the network takes, from its configuration and the header of its weights.

    Raises:
        EnvironmentProblem: a file is missing. IntegrityError: damaged files, or ones that do not fit.
    """
    from craft_fast.rewards.networks.build import cost_of

    cost = cost_of(source.spec, source.files, dtype)
    return Need(cost.weight_bytes(dtype.itemsize), cost.image_bytes, cost.image_flops / 1e9)


def _unfit(where: Path, err: Exception) -> IntegrityError:
    return IntegrityError(
        "A reward's files do not fit together.",
        where=str(where),
        why=f"{type(err).__name__}: {' '.join(str(err).split())[:300]}",
        hint="configuration and weights must be of one model of the reward's family",
    )


def _texts(source: RewardSource) -> Texts | None:
    """Prompts to tokens, with the source's tokenizer."""
    if source.tokenizer is None:
        return None
    from craft_fast.rewards.texts import Texts

    stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in source.tokenizer_files)
    return Texts(_tokenizer(source.tokenizer, stamps), source.spec)


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> Any:
    """The tokenizer of some files, read once for a provenance and the reward."""
    try:
        tokenizer = _read_tokenizer(folder, {path.name for path, *_ in stamps})
    except Exception as err:  # the tokenizers library raises bare ones
        raise _unfit(folder, err) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(folder: Path, files: set[str]) -> Any:
    """By the given files alone: what else lies in the folder, as in the hub's cache, is not looked at."""
    from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer

    if files & {"tokenizer_config.json", "tokenizer.json"}:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if "merges.txt" in files:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return CLIPTokenizer(vocab=vocabulary, merges=pairs)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return BertTokenizer(vocab={word: index for index, word in enumerate(words) if word or index < len(words) - 1})
