"""Randomness is a function, not a state (design.md section 4).

Every random draw is named by the parts it depends on, so nothing has to be saved but the run's seed:
order = f(seed, epoch); noise, timestep and dropout of a sample = f(seed, stage, sample_id, step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Part = str | int


def derive_seed(root: int, *parts: Part) -> int:
    """A 63-bit seed, a pure function of ``root`` and the named parts (blake2b of their JSON)."""
    text = json.dumps([root, *parts], ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int) -> torch.Generator:
    """A CPU generator; draws are made on the CPU so that they are equal on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal noise, float32 on the CPU, a pure function of ``seed``."""
    import torch

    return torch.randn(tuple(shape), generator=generator(seed))


def permutation(n: int, seed: int) -> list[int]:
    """A permutation of ``range(n)``, a pure function of ``seed``."""
    import torch

    order: list[int] = torch.randperm(n, generator=generator(seed)).tolist()
    return order
