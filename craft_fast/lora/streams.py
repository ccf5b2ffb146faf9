"""A safetensors file written from others tensor by tensor: what is not changed is copied as bytes.

A whole SDXL is 7 to 14 GB; no more than the tensor at hand is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.sdxl.identify import read_header
from craft_fast.store import atomic
from craft_fast.store.atomic import Written

_CHUNK = 16 * 1024 * 1024
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a safetensors file.

    Attributes:
        path: the file.
        name: its name there.
        dtype: as the format writes it, such as ``BF16``.
        shape: any.
        begin: first byte in the file.
        size: in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own, as stored.

        Raises:
            IntegrityError: its dtype is no floating-point one, or the file is shorter than it was.
        """
        if self.dtype not in FLOATS:
            raise IntegrityError(
                "A weight is stored in a number format that is not known here",
                where=f"{self.path} ({self.name})",
                why=f"{self.dtype}; known are {', '.join(FLOATS)}",
            )
        if not self.size:
            return torch.zeros(self.shape, dtype=FLOATS[self.dtype])
        data = bytearray().join(self.chunks())
        return torch.frombuffer(data, dtype=FLOATS[self.dtype]).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, at most 16 MiB at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            left = self.size
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise IntegrityError("A model file changed while it was read", where=f"{self.path} ({self.name})")
                left -= len(chunk)
                yield chunk


def read_table(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """All tensors of a file in the order of their bytes, and its metadata; nothing is loaded.

    Raises:
        EnvironmentProblem, IntegrityError: as ``read_header``.
    """
    header = read_header(path)  # the format's own reader has looked at offsets and sizes
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table: dict[str, Any] = json.loads(file.read(length))
    table.pop("__metadata__", None)
    found = [
        Stored(path, name, one["dtype"], tuple(one["shape"]), 8 + length + begin, end - begin)
        for name, one in table.items()
        for begin, end in [one["data_offsets"]]
    ]
    return {one.name: one for one in sorted(found, key=lambda one: (one.begin, one.name))}, header.metadata


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file that will be written.

    Attributes:
        name: its name.
        dtype: as the format writes it.
        shape: any.
        size: in bytes.
        source: a stored tensor whose bytes are copied, or a function that makes the tensor in this dtype and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: Stored | Callable[[], Tensor]

    @classmethod
    def made(cls, name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> Entry:
        """A tensor that is computed when its turn comes."""
        return cls(name, _NAMES[dtype], tuple(shape), torch.Size(shape).numel() * dtype.itemsize, make)

    @classmethod
    def copied(cls, stored: Stored, name: str | None = None) -> Entry:
        """A tensor that stays as it is, under its own or another name."""
        return cls(name or stored.name, stored.dtype, stored.shape, stored.size, stored)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes."""
        if isinstance(self.source, Stored):
            yield from self.source.chunks()
            return
        value = self.source().contiguous()
        if (tuple(value.shape), _NAMES[value.dtype]) != (self.shape, self.dtype):
            raise ValueError(f"{self.name}: {value.dtype} {tuple(value.shape)}, not {self.dtype} {self.shape}")
        if self.size:
            yield value.reshape(-1).view(torch.uint8).numpy().data


def aligned(entries: Sequence[Entry]) -> list[Entry]:
    """Entries in the order of the format's own writer: widest elements first, so that each starts at its own size."""

    def width(entry: Entry) -> int:
        return entry.size // max(1, torch.Size(entry.shape).numel())

    return sorted(entries, key=lambda entry: (-width(entry), entry.name))


def write_entries(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], advance: Callable[[], None]
) -> Written:
    """Write a file atomically; equal entries give equal bytes.

    Args:
        path: the file.
        entries: in the order of their bytes.
        metadata: text to text.
        advance: called after each tensor.

    Raises:
        ResourceError: the disk is full.
    """
    return atomic.write_chunks(path, _chunks(entries, metadata, advance))


def _chunks(
    entries: Sequence[Entry], metadata: Mapping[str, str], advance: Callable[[], None]
) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in entries:
        yield from entry.chunks()
        advance()
