"""Published reward models' files onto the shelf: resumed, checked while they come, there whole or not at all.

The standard library alone: proxies are obeyed as urllib does (``HTTPS_PROXY``, ``NO_PROXY``), the hub's address and
token as huggingface_hub does (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). A file grows under ``NAME.part``
beside its place; a stop or a broken connection leaves it there and the same command goes on with it. Its sha256 is
taken as it comes and compared with the pinned one, else with the one that the hub tells (``X-Linked-ETag``); only then
is it renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

from craft_fast.errors import ConfigError, EnvironmentProblem, Interrupted, ResourceError
from craft_fast.progress import Progress, Silent
from craft_fast.rewards import shelf
from craft_fast.rewards.catalog import Asset
from craft_fast.rewards.http_file import Again, Gone
from craft_fast.rewards.transfer import Transfer, part_of, receive
from craft_fast.store import atomic

_HUB = "https://huggingface.co"
_GITHUB = "https://raw.githubusercontent.com"
TRIES = 4
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# An attempt that brought this much was worth it: the count of failed ones begins anew.
_WORTH_BYTES = 1024**2
# Room that is left free beside the files: the disk is other programs' too.
_SPARE_BYTES = 64 * 1024**2
_YES = {"1", "on", "yes", "true"}


def hub_endpoint() -> str:
    """The hub's address: ``$HF_ENDPOINT``, else huggingface.co.

    Raises:
        ConfigError: it is no http address.
    """
    found = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or _HUB
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "The hub's address is not one.",
            where="HF_ENDPOINT",
            why=f"it is {found}",
            hint=f"export HF_ENDPOINT={_HUB}",
        )
    return found


def address(asset: Asset, endpoint: str | None = None) -> str:
    """Where a file is fetched from."""
    file, revision = quote(asset.file), quote(asset.revision, safe="")
    if asset.source.startswith("github:"):
        return f"{_GITHUB}/{asset.repository}/{revision}/{file}"
    return f"{(endpoint or hub_endpoint()).rstrip('/')}/{asset.repository}/resolve/{revision}/{file}"


def is_offline() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it."""
    return any(os.environ.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def fetch(
    assets: Sequence[Asset],
    *,
    progress: Progress | None = None,
    offline: bool = False,
    endpoint: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Fetch files onto the shelf; one that is there already is left as it is.

    Args:
        assets: the files.
        progress: told of each file's bytes.
        offline: ask no network; the environment's ``HF_HUB_OFFLINE=1`` means the same.
        endpoint: of the hub; None: ``$HF_ENDPOINT``, else huggingface.co.
        should_stop: asked at every piece.
        sleep: waits between tries.

    Returns:
        The files' places, in the given order.

    Raises:
        EnvironmentProblem: offline, no network, or the server refuses; lists every missing file with its address and
            the exact path to put it at.
        ResourceError: no room on the disk.
        IntegrityError: another sha256 or size than the published file has; what came is removed.
        Interrupted: told to stop; what came is kept.
    """
    told = progress or Silent()
    missing = [asset for asset in dict.fromkeys(assets) if not shelf.place(asset).is_file()]
    if missing and (offline or is_offline()):
        raise absent(missing, "the network may not be asked", endpoint)
    _check_room(missing)
    for count, asset in enumerate(missing):
        path = shelf.place(asset)
        atomic.make_folder(path.parent)
        with held(path, told, should_stop):
            # Another process may have fetched it while this one waited.
            if path.is_file():
                continue
            found = _persist(asset, missing[count:], endpoint, told, should_stop, sleep)
        shelf.remember(asset, found.sha256, found.size, url=found.url, revision=found.revision, checked=found.checked)
    return [shelf.place(asset) for asset in assets]


def _persist(
    asset: Asset,
    missing: Sequence[Asset],
    endpoint: str | None,
    told: Progress,
    should_stop: Callable[[], bool],
    sleep: Callable[[float], None],
) -> Transfer:
    """One file, tried again while it makes sense."""
    url, failed = address(asset, endpoint), 0
    token = None if asset.source.startswith("github:") else hub_token(url)
    while True:
        try:
            return receive(asset, url, shelf.place(asset), token=token, progress=told, should_stop=should_stop)
        except Gone as error:
            raise absent(missing, str(error), endpoint, error.hint) from error
        except Again as error:
            failed = 1 if error.received >= _WORTH_BYTES else failed + 1
            if failed >= TRIES:
                raise absent(missing, f"{error}, {TRIES} times in a row", endpoint) from error
            pause = min(_LONGEST_PAUSE_S, error.wait_s or _FIRST_PAUSE_S * 2 ** (failed - 1))
            told.info(f"{asset.name}: {error}; trying again in {pause:.0f} s")
            if should_stop():
                raise Interrupted("Stopped", hint="what came is kept; the same command continues") from error
            sleep(pause)


def hub_token(url: str) -> str | None:
    """``$HF_TOKEN`` where it may be sent: over TLS, or to this machine itself.

    Raises:
        ConfigError: it holds what no header may.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    parts = urlsplit(url)
    if not token or (parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1")):
        return None
    if not token.isascii() or not token.isprintable():
        raise ConfigError("HF_TOKEN holds characters that no token has.", where="HF_TOKEN")
    return token


def absent(missing: Sequence[Asset], why: str, endpoint: str | None = None, hint: str = "") -> EnvironmentProblem:
    """The error that says exactly which file to put where."""
    names = shelf.names_with(missing)
    lines = [
        f"{shelf.size_text(asset.size)}  {address(asset, endpoint)}\n      put it at {shelf.place(asset)}"
        for asset in missing
    ]
    files = "A file" if len(missing) == 1 else f"{len(missing)} files"
    return EnvironmentProblem(
        f"{files} of published reward models {'is' if len(missing) == 1 else 'are'} not on this machine",
        where=f"{shelf.shelf()} (CRAFT_FAST_REWARDS names another folder)",
        why="\n    ".join([why + "; missing:", *lines]),
        hint=hint or f"where there is a network: craft-fast rewards fetch {' '.join(names) or 'NAME'}",
    )


def _check_room(missing: Sequence[Asset]) -> None:
    """Refuse before the first byte what cannot end well."""
    need = sum(max(0, asset.size - _size(part_of(shelf.place(asset)))) for asset in missing)
    root = next(folder for folder in (shelf.shelf(), *shelf.shelf().parents) if folder.is_dir())
    free = shutil.disk_usage(root).free
    if need and need + _SPARE_BYTES > free:
        raise ResourceError(
            "There is no room for the reward files",
            where=str(shelf.shelf()),
            why=f"{shelf.size_text(need)} are to be fetched, {shelf.size_text(free)} are free",
            hint="free some space, or name a folder on another disk: export CRAFT_FAST_REWARDS=DIR",
        )


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


@contextmanager
def held(
    path: Path, told: Progress | None = None, should_stop: Callable[[], bool] = lambda: False, every_s: float = 0.2
) -> Iterator[None]:
    """Hold the lock of one file, across processes; wait for whoever has it.

    The lock is the kernel's and ends with the process, however it ends.

    Raises:
        Interrupted: told to stop while waiting.
    """
    atomic.make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise atomic.disk_error(error, lock) from error
    try:
        waiting = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waiting and told is not None:
                    told.info(f"another process is at {path.name}; waiting for it")
                waiting = True
                if should_stop():
                    raise Interrupted("Stopped while waiting for another process", hint="run it again") from None
                time.sleep(every_s)
        yield
    finally:
        os.close(fd)
