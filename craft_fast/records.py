"""The records that stages hand to one another through the run's manifest. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One base prompt ``c_i``. ``prompt_id`` is a digest of the cleaned text, so order never matters."""

    prompt_id: str
    text: str
    split: Split = "train"
    line: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Variant:
    """Member ``j`` of a group; member 0 is the base prompt itself, 1..K are expansions ``e_ij``."""

    prompt_id: str
    member: int
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """A base prompt with its members, ``variants[0].text == prompt.text``."""

    prompt: Prompt
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the run folder: POSIX path relative to it, sha256 hex digest, size in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One generated image ``x_ij`` with its final latents (UNet space, scaled)."""

    candidate_id: str
    prompt_id: str
    member: int
    base_prompt: str
    prompt: str
    noise_seed: int
    latents: FileRef
    image: FileRef


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a reward's scores come about; scores may be compared when all of it is equal.

    Attributes:
        backend: ``native``, ``package hpsv2x 1.2.0``, ``function``, ``plug-in NAME VERSION``.
        checkpoint: sha256 of the weights; of several files, the digest of their names and sha256.
        preprocessing: how pictures become pixels, such as ``pil-bicubic/crop/224``.
        tokenizer: how text becomes tokens, with a digest of the vocabulary; empty where text is not looked at.
        precision: dtype of the network, such as ``float16``.
        note: what else decides a score, such as a threshold or a scale.
    """

    backend: str
    checkpoint: str
    preprocessing: str = ""
    tokenizer: str = ""
    precision: str = ""
    note: str = ""

    def differences(self, other: Provenance) -> list[str]:
        """Fields in which two provenances differ, each as ``field: this, that``."""
        pairs = [(item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self)]
        return [f"{name}: {mine or '-'}, {theirs or '-'}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """``r_m,ij``: one reward of one candidate. ``reward_key`` digests weights and preprocessing."""

    candidate_id: str
    reward: str
    reward_key: str
    value: float
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Filter verdict on one candidate: design.md section 1, items 2 to 5."""

    candidate_id: str
    prompt_id: str
    member: int
    accepted: bool
    passed: Mapping[str, bool]
    r_total: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One accepted training sample: which latents, conditioned on which text, with which weight."""

    sample_id: str
    candidate_id: str
    prompt: str
    weight: float


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One metric, tuned against base on the same prompts and seeds (report.json's ``evaluation``)."""

    metric: str
    held_out: bool
    base_mean: float
    tuned_mean: float
    win_rate: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True, slots=True)
class StageRow:
    """State of one stage in a run: ``running`` or ``done``, under which key, at what cost."""

    name: str
    key: str
    state: Literal["running", "done"]
    seconds: float = 0.0
    peak_gib: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
