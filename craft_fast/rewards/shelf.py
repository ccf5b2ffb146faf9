"""Where the files of published reward models are on this machine, and where missing ones go. No torch here.

Every file has one place, ``SHELF/owner--name/FILE``, so two models that share a file find one copy. A model's files are
looked for in the folder that the settings name, on the shelf, and in the hub's cache, in that order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.progress import Progress
from craft_fast.rewards.catalog import OFFICIALS, Asset, Official, Role
from craft_fast.store.digest import sha256_once

KNOWN = "known.json"
# Names that a repository had before, or has now; a hub's cache keeps each under the name it was asked for.
_OTHER_NAMES = {
    "THUDM/ImageReward": ("zai-org/ImageReward",),
    "google-bert/bert-base-uncased": ("bert-base-uncased",),
}
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True, slots=True)
class Shelved:
    """The files of one published model.

    Attributes:
        found: the file of each role but the tokenizer's.
        tokenizer: the tokenizer's files, in one folder; empty where they are missing or the model reads no text.
        missing: files that are nowhere on this machine.
        problems: files that are there but cannot be right, and why.
    """

    found: dict[Role, Path] = field(default_factory=dict)
    tokenizer: tuple[Path, ...] = ()
    missing: tuple[Asset, ...] = ()
    problems: dict[Path, str] = field(default_factory=dict)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer's files, or None where there are none."""
        return self.tokenizer[0].parent if self.tokenizer else None

    @property
    def paths(self) -> list[Path]:
        """All files that are there."""
        return [*self.found.values(), *self.tokenizer]


def shelf() -> Path:
    """The folder of all fetched reward files: ``$CRAFT_FAST_REWARDS``, else in the user's cache folder."""
    chosen = os.environ.get("CRAFT_FAST_REWARDS")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft-fast" / "rewards"


def place(asset: Asset) -> Path:
    """Where a file goes: ``SHELF/owner--name/FILE``."""
    return shelf() / asset.key


def find(official: Official, *, folder: Path | None = None) -> Shelved:
    """Look for a model's files; nothing is read but their first bytes, and no network is asked.

    Args:
        official: the model.
        folder: looked in first; files lie in it by their own names, or as on the shelf.
    """
    found: dict[Role, Path] = {}
    missing: list[Asset] = []
    problems: dict[Path, str] = {}
    for asset in (asset for asset in official.assets if asset.role != "tokenizer"):
        path = next(filter(Path.is_file, _candidates(asset, folder)), None)
        if path is None:
            missing.append(asset)
        else:
            found[asset.role] = path
            problems |= {path: why} if (why := fault(path, asset)) else {}
    parts = [asset for asset in official.assets if asset.role == "tokenizer"]
    tokenizer = _together(parts, folder)
    if len(tokenizer) < len(parts):
        missing += [asset for asset in parts if not place(asset).is_file()]
        tokenizer = ()
    problems |= {p: why for p, a in zip(tokenizer, parts, strict=False) if (why := fault(p, a))}
    return Shelved(found, tokenizer, tuple(missing), problems)


def _together(parts: list[Asset], folder: Path | None) -> tuple[Path, ...]:
    """The tokenizer's files from the first folder that has all of them: they must be of one tokenizer."""
    if not parts:
        return ()
    for first in _candidates(parts[0], folder):
        paths = tuple(first.with_name(asset.name) for asset in parts)
        if all(path.is_file() for path in paths):
            return paths
    return ()


def _candidates(asset: Asset, folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield from (folder / asset.file, folder / asset.name, folder / asset.key)
    yield place(asset)
    if not asset.source.startswith("github:"):
        yield from _in_hub_cache(asset)


def hub_cache() -> Path:
    """The hub's cache folder, as huggingface_hub finds it from the environment."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home).expanduser() if home else cache / "huggingface") / "hub"


def _in_hub_cache(asset: Asset) -> Iterator[Path]:
    """The asset's revision, then what the main branch is there; of pinned files any revision, for they are checked."""
    for repository in (asset.repository, *_OTHER_NAMES.get(asset.repository, ())):
        model = hub_cache() / f"models--{repository.replace('/', '--')}"
        revisions = [asset.revision]
        ref = model / "refs" / "main"
        if ref.is_file():
            revisions.append(ref.read_text(encoding="utf-8", errors="replace").strip()[:100])
        if asset.sha256 and (model / "snapshots").is_dir():
            revisions += sorted(path.name for path in (model / "snapshots").iterdir())
        yield from (model / "snapshots" / revision / asset.file for revision in dict.fromkeys(revisions) if revision)


def fault(path: Path, asset: Asset) -> str:
    """What a file cannot be, from its size and first bytes; empty when it may be right."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            why = not_a_file(file.read(512))
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    if why:
        return why
    if asset.exact and not asset.also and size != asset.size:
        return f"it has {size:,} bytes, the published file {asset.size:,}"
    # Sizes of weights that are not exact are right within a percent or two; half of a file is none of them.
    if size < asset.size // 2 and asset.size > 10**6 and not asset.also:
        return f"it has {size:,} bytes, about {asset.size:,} are expected"
    return ""


def not_a_file(head: bytes) -> str:
    """What the first bytes show that something else came in a file's place; empty when they do not."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_LFS):
        return "it is a pointer of Git LFS (text that stands for the file); the file itself was not fetched"
    if start.startswith(_PAGES):
        return "it is a web page, not the file"
    return "" if head else "it is empty"


def ensure(
    official: Official,
    *,
    folder: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Shelved:
    """A model's files, checked; what is missing is fetched onto the shelf.

    Args:
        official: the model.
        folder: looked in first.
        offline: ask no network; the environment's ``HF_HUB_OFFLINE=1`` means the same.
        progress: told of bytes as they come.
        should_stop: asked between pieces.

    Raises:
        EnvironmentProblem: files are missing and cannot be had; all are listed with address and place.
        IntegrityError: a file is not the published one, or not the one that was here before.
        ResourceError: no room on the disk. Interrupted: told to stop; the same command continues.
    """
    if folder is not None and not folder.is_dir():
        raise EnvironmentProblem(
            "There is no such folder of a reward's files",
            where=str(folder),
            hint="leave the reward's path empty: its files are then fetched, or looked for on the shelf",
        )
    have = find(official, folder=folder)
    refuse(have.problems)
    if have.missing:
        from craft_fast.rewards.fetching import fetch

        fetch(have.missing, progress=progress, offline=offline, should_stop=should_stop)
        have = find(official, folder=folder)
        refuse(have.problems)
    verify(official, have)
    return have


def pairs(official: Official, have: Shelved) -> list[tuple[Asset, Path | None]]:
    """Every file of a model with where it is; None where it is missing."""
    tokenizer = iter(have.tokenizer)
    found: list[tuple[Asset, Path | None]] = []
    for asset in official.assets:
        path = next(tokenizer, None) if asset.role == "tokenizer" else have.found.get(asset.role)
        # Half a tokenizer may lie on the shelf: it is no tokenizer yet, but that file need not come again.
        found.append((asset, path or (place(asset) if place(asset).is_file() else None)))
    return found


def verify(official: Official, have: Shelved) -> None:
    """Check every file against its pinned sha256, and unpinned ones on the shelf against what was here first.

    Files are hashed once, about a second per GB; see ``store.digest.sha256_once``.

    Raises:
        IntegrityError: a file differs.
    """
    for asset, path in pairs(official, have):
        if path is None:
            continue
        digest = sha256_once(path)
        if asset.sha256 is not None:
            if digest not in (asset.sha256, *asset.also):
                raise wrong_digest(path, digest, asset.sha256, "the published file")
        elif path == place(asset):
            before = known().get(asset.key)
            if before is None:
                remember(asset, digest, path.stat().st_size)
            elif before != digest:
                raise wrong_digest(path, digest, before, f"the file that was here first ({shelf() / KNOWN})")


def refuse(problems: dict[Path, str]) -> None:
    """Stop at a file that cannot be right.

    Raises:
        IntegrityError: names the first of them.
    """
    for path, why in problems.items():
        raise IntegrityError(
            "A reward's file is not what its name says.",
            where=str(path),
            why=why,
            hint=f"remove it, then craft-fast rewards fetch NAME: rm {str(path)!r}",
        )


def wrong_digest(path: Path, found: str, wanted: str, of: str) -> IntegrityError:
    """The error of a file with another sha256 than it must have."""
    return IntegrityError(
        "A reward's file has the wrong sha256.",
        where=str(path),
        why=f"it is {found}, {of} has {wanted}",
        hint="remove it and fetch it again: craft-fast rewards fetch NAME; weights of your own go by a family, such as "
        "kind: clip with a folder that holds a reward.json",
    )


def known() -> dict[str, str]:
    """Sha256 of the shelf's files that no one pinned, as they were when they came, by the assets' keys."""
    return {key: entry["sha256"] for key, entry in _read_known().items()}


def _read_known() -> dict[str, dict[str, Any]]:
    path = shelf() / KNOWN
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry["sha256"], str) for entry in entries.values()):
            return dict(entries)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    # Forgetting what was here first would hide the change that it is for.
    raise IntegrityError(
        "The record of the reward files' sha256 cannot be read.",
        where=str(path),
        why="it is not what craft-fast wrote there",
        hint=f"remove it; the files that are there then count as the first: rm {str(path)!r}",
    )


def remember(asset: Asset, sha256: str, size: int, **more: str) -> None:
    """Record a file of the shelf."""
    from craft_fast.rewards.fetching import held
    from craft_fast.store import atomic

    with held(shelf() / KNOWN):
        entries = _read_known()
        entries[asset.key] = {"sha256": sha256, "size": size, "source": asset.source, **more}
        atomic.write_json(shelf() / KNOWN, entries)


def where_to_put(asset: Asset) -> str:
    """One line for a person: the file's size, address and the path to put it at."""
    from craft_fast.rewards.fetching import address

    return f"{size_text(asset.size)}  {address(asset)}  ->  {place(asset)}"


def size_text(count: int) -> str:
    """``1.97 GB``, ``524 kB``: decimal, as hubs and disks count."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def names_with(assets: Iterable[Asset]) -> list[str]:
    """Published models that together need all of some files: as few as a simple choice finds."""
    wanted = {asset.key for asset in assets}
    needs = {name: wanted & {asset.key for asset in official.assets} for name, official in OFFICIALS.items()}
    left, names = set(wanted), list[str]()
    while left:
        name = max(needs, key=lambda name: len(left & needs[name]))
        if not left & needs[name]:
            break
        names.append(name)
        left -= needs[name]
    # The largest share comes first, and may be of files that the others need anyway.
    for name in list(names):
        others = [needs[other] for other in names if other != name]
        if needs[name] <= set().union(*others):
            names.remove(name)
    return names
