"""Pictures on their way to rewards: hashed once, decoded in threads, their small forms shared by several rewards.

Shapes: H, W picture, S a network's image side in pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.errors import ConfigError, CraftError, IntegrityError
from craft_fast.rewards.memory import Pair
from craft_fast.rewards.pixels import Pictures, PixelForm, shape
from craft_fast.store.digest import sha256_once
from craft_fast.store.safe_load import read_image

MAX_FILE_BYTES = 512 * 1024 * 1024  # 64 megapixels of 16-bit RGBA, uncompressed
KEPT_BYTES = 1024**3  # about 7,000 pictures of 224 x 224 bytes
# A decoded picture takes up to 192 MB; so many are in memory at once.
_THREADS = 4


@dataclass(frozen=True, slots=True)
class File:
    """A picture's file as it was when it was hashed.

    Attributes:
        path: where.
        sha256: of its content, hex.
        stamp: size, times and inode.
    """

    path: Path
    sha256: str
    stamp: tuple[int, ...]


def hash_picture(path: Path) -> File:
    """Hash a picture's file.

    Raises:
        IntegrityError: it is not a file, empty, larger than ``MAX_FILE_BYTES``, or cannot be read.
    """
    try:
        if not path.is_file():
            why = "it is a folder or a device" if path.exists() else "there is no such file"
            raise _unusable(path, why)
        size = path.stat().st_size
        if size == 0:
            raise _unusable(path, "it is empty")
        if size > MAX_FILE_BYTES:
            raise _unusable(path, f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        stamp = _stamp(path)
        return File(path, sha256_once(path), stamp)
    except (OSError, ValueError) as error:
        raise _unusable(path, getattr(error, "strerror", None) or str(error)) from error


def _unusable(path: Path, why: str) -> IntegrityError:
    return IntegrityError("A picture cannot be read", where=str(path), why=why, hint="PNG, JPEG, WebP")


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def decode(file: File) -> Tensor:
    """The picture, uint8 [3, H, W].

    Raises:
        CraftError: damaged, too large, gone, or another file than was hashed.
    """
    image = read_image(file.path)
    try:
        same = _stamp(file.path) == file.stamp
    except OSError:
        same = False
    if not same:
        raise IntegrityError(
            "A picture changed while it was rated", where=str(file.path), hint="the same command again rates it anew"
        )
    return image


@dataclass(slots=True)
class Batch:
    """Pairs of picture and text that go to a reward together.

    Attributes:
        pairs: those whose picture could be read.
        pictures: theirs, as network rewards take them.
        failed: sha256 of the others, and why.
    """

    pairs: list[Pair]
    pictures: Pictures
    failed: dict[str, CraftError] = field(default_factory=dict)


class Shaped(Pictures):
    """Pictures of which only the form that a network looks at is in memory.

    Args:
        form: of ``pixels``.
        pixels: one [3, S, S] for each.
        load: reads the pictures themselves, should they be asked for.
    """

    def __init__(self, form: PixelForm, pixels: Sequence[Tensor], load: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__(load)
        self._form = form
        self._made = list(pixels)

    def __len__(self) -> int:
        return len(self._made)

    def pixels(self, form: PixelForm, device: torch.device | str = "cpu") -> Tensor:
        """The pictures in a form, [B, 3, S, S] on the device."""
        return torch.stack(self._made).to(device) if form == self._form else super().pixels(form, device)

    def one(self, at: int) -> Shaped:
        """The picture at a position, by itself."""
        return Shaped(self._form, [self._made[at]], lambda: [self.images()[at]])


def one_of(pictures: Pictures, at: int) -> Pictures:
    """The picture at a position, by itself."""
    return pictures.one(at) if isinstance(pictures, Shaped) else Pictures.of([pictures.images()[at]])


class Darkroom:
    """Decodes pictures in threads, one batch ahead of the reward, and keeps small forms for the rewards to come.

    Args:
        files: by sha256.
        kept_bytes: of forms in memory at most; what has no room is decoded again.
    """

    def __init__(self, files: dict[str, File], *, kept_bytes: int = KEPT_BYTES) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        """Width and height in pixels of every picture that was decoded."""
        self.decoded = 0
        self._files = files
        self._kept: dict[tuple[str, PixelForm], Tensor] = {}
        self._room = kept_bytes
        self._pool = ThreadPoolExecutor(max_workers=min(_THREADS, len(os.sched_getaffinity(0))))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()

    def keep_only(self, forms: set[PixelForm]) -> None:
        """Forget forms that no later reward looks at."""
        for key in [key for key in self._kept if key[1] not in forms]:
            self._room += self._kept.pop(key).nbytes

    def images(self, hashes: Sequence[str]) -> Iterator[tuple[str, Tensor | CraftError]]:
        """Each picture, uint8 [3, H, W], or why it cannot be had; at most two for each thread are in memory."""
        waiting: deque[tuple[str, Future[Tensor]]] = deque()
        for sha in hashes:
            waiting.append((sha, self._pool.submit(decode, self._files[sha])))
            if len(waiting) >= 2 * _THREADS:
                yield self._image(*waiting.popleft())
        while waiting:
            yield self._image(*waiting.popleft())

    def _image(self, sha: str, coming: Future[Tensor]) -> tuple[str, Tensor | CraftError]:
        try:
            image = coming.result()
        except CraftError as error:
            return sha, error
        self.decoded += 1
        self.sizes[sha] = (image.shape[2], image.shape[1])
        return sha, image

    def batches(
        self, batches: Iterable[list[Pair]], form: PixelForm, later: dict[PixelForm, set[str]]
    ) -> Iterator[Batch]:
        """Batches in a network's form; while one is scored, the next is decoded.

        Args:
            batches: pairs.
            form: wanted now.
            later: forms that rewards to come want, and of which pictures (sha256).
        """
        waiting: deque[tuple[list[Pair], dict[str, Future[_Made]]]] = deque()
        for batch in batches:
            waiting.append((batch, self._begin(batch, form, later)))
            if len(waiting) > 1:
                yield self._finish(*waiting.popleft(), form, later)
        while waiting:
            yield self._finish(*waiting.popleft(), form, later)

    def _begin(self, batch: list[Pair], form: PixelForm, later: dict[PixelForm, set[str]]) -> dict[str, Future[_Made]]:
        new = dict.fromkeys(sha for sha, _ in batch if (sha, form) not in self._kept)
        wanted = {sha: [form, *(f for f, shas in later.items() if f != form and sha in shas)] for sha in new}
        return {sha: self._pool.submit(_make, self._files[sha], forms) for sha, forms in wanted.items()}

    def _finish(
        self, batch: list[Pair], coming: dict[str, Future[_Made]], form: PixelForm, later: dict[PixelForm, set[str]]
    ) -> Batch:
        made: dict[str, Tensor] = {}
        failed: dict[str, CraftError] = {}
        for sha in dict.fromkeys(sha for sha, _ in batch):
            if sha not in coming:
                made[sha] = self._kept[sha, form]
                continue
            try:
                found = coming[sha].result()
            except CraftError as error:
                failed[sha] = error
                continue
            self.decoded += 1
            self.sizes[sha] = found.size
            made[sha] = found.forms[form]
            self._keep(sha, {f: pixels for f, pixels in found.forms.items() if sha in later.get(f, ())})
        pairs = [pair for pair in batch if pair[0] in made]
        load = lambda: [decode(self._files[sha]) for sha, _ in pairs]  # noqa: E731
        return Batch(pairs, Shaped(form, [made[sha] for sha, _ in pairs], load), failed)

    def _keep(self, sha: str, forms: dict[PixelForm, Tensor]) -> None:
        for form, pixels in forms.items():
            if (sha, form) not in self._kept and pixels.nbytes <= self._room:
                self._kept[sha, form] = pixels
                self._room -= pixels.nbytes


@dataclass(slots=True)
class _Made:
    size: tuple[int, int]
    forms: dict[PixelForm, Tensor]


def _make(file: File, forms: list[PixelForm]) -> _Made:
    """One picture in the forms asked for; only the first of them must succeed."""
    image = decode(file)
    made: dict[PixelForm, Tensor] = {}
    for form in forms:
        try:
            # A clone: a form of the picture's own size is the picture, and slices would keep all of it alive.
            made[form] = shape(image[None], form)[0].clone()
        except ConfigError:
            if form == forms[0]:
                raise
    return _Made((image.shape[2], image.shape[1]), made)
