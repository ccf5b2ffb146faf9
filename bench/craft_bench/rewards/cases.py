"""What ``craft-fast bench rewards`` measures, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from craft_fast.config import OFFICIAL_REWARDS
from craft_fast.errors import UsageError, closest

OURS, PLAIN, PACKAGE = "ours", "transformers", "package"
Mode = Literal["score", "network"]
# The three that judge candidates in the sdxl presets: figures are asked of these.
TRAINING = ("hpsv2.1", "pickscore", "aesthetic-v2")
# hpsv2.0 costs what hpsv2.1 does, to the byte.
REWARDS = tuple(name for name in OFFICIAL_REWARDS if name != "hpsv2.0")
# The figures are asked of the middle one, so it is measured first.
BATCHES = (16, 64, 1)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Case:
    """One figure.

    Args:
        reward: name of the published model.
        impl: who does it: ``ours``, ``transformers`` (its plain CLIPModel in float32) or ``package`` (the authors').
        batch: pictures in a call.
        dtype: of weights and arithmetic.
        mode: ``score``: from uint8 pictures in memory and prompts not seen before to scores; ``network``: from pixels
            on the device to embeddings, where there is no text, else to scores.
        attention: kernel of the towers.
    """

    reward: str
    impl: str
    batch: int
    dtype: str
    mode: Mode = "score"
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        """Of the case, without who and what in."""
        return f"B={self.batch} {self.mode}" + (f" {self.attention}" if self.attention != "sdpa" else "")

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.reward} {self.impl} {self.dtype} {self.name}"


def choose_rewards(names: Sequence[str]) -> list[str]:
    """The rewards named, in this module's order; all without names.

    Raises:
        UsageError: one is not known.
    """
    unknown = [name for name in names if name not in OFFICIAL_REWARDS]
    if unknown:
        raise UsageError(
            f"There is no published reward {unknown[0]}",
            where="NAME",
            why=f"it is one of {', '.join(OFFICIAL_REWARDS)}",
            hint=f"{closest(unknown[0], OFFICIAL_REWARDS)}craft-fast bench rewards {' '.join(TRAINING)}",
        )
    return [name for name in OFFICIAL_REWARDS if name in names] if names else list(REWARDS)


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,16,64`` as numbers, each once; the order is that of measuring.

    Raises:
        UsageError: it is no list of positive whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(
            f"--batch {text!r} is no list of batch sizes", where="--batch", why="whole numbers from 1, with commas",
            hint="--batch 1,16,64",
        )  # fmt: skip
    return tuple(dict.fromkeys(int(word) for word in words))


def cases_of(
    reward: str, *, batches: Sequence[int], dtypes: Sequence[str], plain: bool, package: bool, xformers: bool,
    quick: bool = False,
) -> list[Case]:  # fmt: skip
    """Cases of one reward, each rival's before ours of the same batch, that ours can be held against it.

    Args:
        reward: its name.
        batches: pictures in a call.
        dtypes: of ours.
        plain: transformers' CLIPModel can do it.
        package: the authors' package is there.
        xformers: works here; timed at the largest batch.
        quick: the first dtype alone, the network alone at the largest batch.
    """
    cases: list[Case] = []
    largest = max(batches)
    for batch in batches:
        if package:
            cases.append(Case(reward, PACKAGE, batch, "amp"))
        if plain:
            cases.append(Case(reward, PLAIN, batch, "float32"))
        for dtype in dtypes[:1] if quick else dtypes:
            cases.append(Case(reward, OURS, batch, dtype))
            if batch == largest or not quick:
                cases.append(Case(reward, OURS, batch, dtype, "network"))
            if xformers and batch == largest and dtype != "float32":
                cases.append(Case(reward, OURS, batch, dtype, "network", "xformers"))
    return cases
