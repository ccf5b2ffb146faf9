"""The accepted set as an ordinary dataset: pictures, captions beside them, weights and scores in ``metadata.jsonl``.

The layout is that of Hugging Face's imagefolder and of kohya's trainers (NAME.txt), so that other trainers can use it;
``images.folder`` reads it back with the same selection and weights. It is a view of a run: nothing is computed, all of
it is what the run has recorded.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from craft_fast import __version__
from craft_fast.errors import IntegrityError, ResourceError, UsageError
from craft_fast.own_folder import HELD_OUT
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, Provenance, Sample, Selection
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_bytes
from craft_fast.store.run import Run

METADATA = "metadata.jsonl"
CAPTIONS = ("base", "expanded")
_TEMP = ".craft-fast-tmp"
_OURS = re.compile(r"\d{5}_[0-9a-f]{8}\.(png|txt)")
# What a caption and a row take on a disk, besides the picture: ESTIMATE.
_ROW_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Keys:
    """Under which the run keeps what is written.

    Attributes:
        expand: of the held-out prompts.
        generate: of the candidates.
        filter: of the verdicts.
        cache: of the weights.
        rewards: reward name to the key of its scores.
    """

    expand: str
    generate: str
    filter: str
    cache: str
    rewards: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        path: the folder.
        pictures: how many.
        accepted: of them.
        size: bytes of the pictures.
    """

    path: Path
    pictures: int
    accepted: int
    size: int


@dataclass(frozen=True, slots=True)
class _Records:
    """What the run knows of each candidate, by its id."""

    verdicts: Mapping[str, Selection]
    samples: Mapping[str, Sample]
    scores: Mapping[str, Mapping[str, float]]
    ways: Mapping[str, Mapping[str, Provenance | None]]
    bases: Mapping[str, str]

    @classmethod
    def of(cls, run: Run, keys: Keys, candidates: Mapping[str, Candidate]) -> _Records:
        """Read them."""
        manifest, ids = run.manifest, list(candidates)
        return cls(
            {row.candidate_id: row for row in manifest.selections(keys.filter)},
            {sample.candidate_id: sample for sample in manifest.samples(keys.cache)},
            manifest.scores(keys.rewards, ids),
            manifest.scored_by(keys.rewards, ids),
            {row.prompt_id: row.candidate_id for row in candidates.values() if row.member == 0},
        )


def write_dataset(
    run: Run,
    out: Path,
    keys: Keys,
    *,
    caption: str = "base",
    everything: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the accepted pictures of a run as a folder; the same run gives the same bytes.

    Args:
        run: the open run; read only.
        out: the folder; it is written beside itself and gets its name when it is whole.
        keys: of what is written.
        caption: ``base`` prompt or ``expanded`` text, for NAME.txt and ``text``.
        everything: the rejected and member 0, too, so that verdicts can be made again; they carry no weight.
        force: replace a folder that this has written.
        progress: counts pictures.

    Raises:
        UsageError: the folder is there, or nothing was accepted; ResourceError: not enough room on the disk;
            IntegrityError: a picture of the run is not what was written.
    """
    candidates = {row.candidate_id: row for row in run.manifest.candidates(keys.generate)}
    known = _Records.of(run, keys, candidates)
    # A sample of weight 0 takes part in no gradient; it is in no training set, so it is not in this one either.
    chosen = [row for key, row in candidates.items() if key in known.samples or (everything and key in known.verdicts)]
    out = out.expanduser().resolve()
    temp = out.with_name(out.name + _TEMP)
    _check_out(out, temp, run, chosen, force=force)
    size = 0
    lines: list[str] = []
    with _removed(temp), (progress or Silent()).task("dataset", len(chosen), "pictures") as task:
        with atomic.batch(temp) as files:
            for number, row in enumerate(chosen, 1):
                data = _picture(run, row)
                name = f"{number:05d}_{row.candidate_id[:8]}"
                text = row.base_prompt if caption == "base" else row.prompt
                files.write_bytes(f"{name}.png", data)
                files.write_bytes(f"{name}.txt", (text + "\n").encode())
                lines.append(_line({"file_name": f"{name}.png", "text": text, **_facts(row, known)}))
                size += len(data)
                task.advance()
            held_out = [group.prompt.text for group in run.manifest.groups(keys.expand, "heldout")]
            files.write_bytes(HELD_OUT, "".join(_line({"prompt": text}) for text in held_out).encode())
            files.write_bytes(METADATA, "".join(lines).encode())
        _put(temp, out)
    return Written(out, len(chosen), sum(row.candidate_id in known.samples for row in chosen), size)


@contextlib.contextmanager
def _removed(temp: Path) -> Iterator[None]:
    """Whatever happens, nothing is left under the temporary name."""
    try:
        yield
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _facts(row: Candidate, known: _Records) -> dict[str, Any]:
    key = row.candidate_id
    verdict, sample = known.verdicts.get(key), known.samples.get(key)
    facts: dict[str, Any] = {
        "prompt": row.base_prompt,
        "variant": row.prompt,
        "prompt_id": row.prompt_id,
        "member": row.member,
        "accepted": sample is not None,
        "noise_seed": row.noise_seed,
    }
    if sample is not None:
        facts["weight"] = sample.weight
    if verdict is not None:
        facts |= {"advantage": verdict.advantage, "r_total": verdict.r_total, "passed": dict(verdict.passed)}
    ways = known.ways.get(key, {})
    return facts | {
        "scores": known.scores.get(key, {}),
        "base_scores": known.scores.get(known.bases.get(row.prompt_id, ""), {}),
        "scored_by": {reward: asdict(way) for reward, way in ways.items() if way is not None},
        "sha256": row.image.sha256,
        "craft_fast": __version__,
    }


def _picture(run: Run, row: Candidate) -> bytes:
    path = run.path(row.image.path)
    data = path.read_bytes() if path.is_file() else b""
    if sha256_bytes(data) != row.image.sha256:
        raise IntegrityError(
            "A picture of the run is not what was written",
            where=str(path),
            hint=f"craft-fast run --until cache --name {run.root.name} makes it again",
        )
    return data


# ---- the folder


def _check_out(out: Path, temp: Path, run: Run, chosen: Sequence[Candidate], *, force: bool) -> None:
    root = run.root.resolve()
    if out == root or out in root.parents or root in out.parents:
        raise UsageError("The dataset would be in the run's own place", where=str(out), hint="give another folder")
    if out.exists() and not (out.is_dir() and (force or not any(out.iterdir()))):
        raise UsageError("This is there already", where=str(out), hint="--force replaces a folder; or give another one")
    # --force is for what this command wrote, never for a person's own pictures.
    for folder in (out, temp):
        if folder.exists() and (strange := _strange(folder)):
            raise UsageError(
                "This folder holds something else", where=str(folder), why=f"{strange} is not of a dataset from here",
                hint="give another folder",
            )  # fmt: skip
    if temp.exists():  # left by one that was killed
        shutil.rmtree(temp)
    atomic.make_folder(out.parent)
    needed = sum(row.image.size + _ROW_BYTES for row in chosen)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ResourceError(
            "Not enough room on the disk", where=str(out), why=f"{needed:,} bytes are needed, {free:,} are free"
        )


def _strange(folder: Path) -> str:
    """The first thing in it that this module does not write; '' where there is none."""
    if not folder.is_dir():
        return folder.name
    for path in sorted(folder.iterdir()):
        known = _OURS.fullmatch(path.name) or path.name in (METADATA, HELD_OUT)
        half = path.name.startswith(".") and path.name.endswith(atomic.TEMP_SUFFIX)
        if not (path.is_file() and (known or half)):
            return path.name
    return ""


def _put(temp: Path, out: Path) -> None:
    """Give the whole folder its name; one that it replaces is there until then."""
    old = out.with_name(out.name + ".old" + _TEMP)
    try:
        atomic.sync_folder(temp)
        if out.exists():
            if old.exists():
                shutil.rmtree(old)
            out.rename(old)
        temp.rename(out)
        atomic.sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise atomic.disk_error(error, out) from error
