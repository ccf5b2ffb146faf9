"""The accepted set as an ordinary dataset: pictures, captions beside them, weights and scores in ``metadata.jsonl``.

The layout is that of Hugging Face's imagefolder and of kohya's trainers (NAME.txt), so that other trainers can use it;
``images.folder`` reads it back with the same selection and weights. Of several settings and a run this is a view:
nothing is computed but what the run has recorded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from craft_fast import __version__
from craft_fast.errors import IntegrityError, ResourceError, UsageError
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, Sample, Selection
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_bytes
from craft_fast.store.run import Run

METADATA = "metadata.jsonl"
CAPTIONS = ("base", "expanded")


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


def write_dataset(
    run: Run,
    out: Path,
    *,
    generate_key: str,
    filter_key: str,
    cache_key: str,
    reward_keys: Mapping[str, str],
    caption: str = "base",
    everything: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the accepted pictures of a run as a folder; the same run gives the same bytes.

    Args:
        run: the open run; read only.
        out: the folder, written beside itself as ``.tmp`` and renamed when it is whole.
        generate_key: of the candidates.
        filter_key: of the verdicts.
        cache_key: of the weights.
        reward_keys: reward name to the key of its scores.
        caption: ``base`` prompt or ``expanded`` text, for NAME.txt and ``text``.
        everything: the rejected and member 0, too, so that verdicts can be made again; they carry no weight.
        force: replace a folder that is there.
        progress: counts pictures.

    Raises:
        UsageError: the folder is there, or nothing was accepted; ResourceError: not enough room on the disk;
            IntegrityError: a picture of the run is not what was written.
    """
    manifest = run.manifest
    candidates = {row.candidate_id: row for row in manifest.candidates(generate_key)}
    verdicts = {row.candidate_id: row for row in manifest.selections(filter_key)}
    weights = {sample.candidate_id: sample for sample in manifest.samples(cache_key)}
    # A sample of weight 0 takes part in no gradient; it is in no training set, so it is not in this one either.
    chosen = [row for key, row in candidates.items() if key in weights or (everything and key in verdicts)]
    if not weights:
        raise UsageError("Nothing was accepted yet", where=str(run.root), hint=f"craft-fast run --name {run.root.name}")
    out = out.expanduser().absolute()
    _check_out(out, run, chosen, force=force)
    scores = manifest.scores(reward_keys, list(candidates))
    ways = manifest.scored_by(reward_keys, list(candidates))
    bases = {row.prompt_id: row.candidate_id for row in candidates.values() if row.member == 0}
    temp = out.with_name(out.name + ".tmp")
    if temp.exists():
        shutil.rmtree(temp)
    lines, size = [], 0
    with (progress or Silent()).task("dataset", len(chosen), "pictures") as task, atomic.batch(temp) as files:
        for number, row in enumerate(chosen, 1):
            data = _picture(run, row)
            name = f"{number:05d}_{row.candidate_id[:8]}"
            text = row.base_prompt if caption == "base" else row.prompt
            files.write_bytes(f"{name}.png", data)
            files.write_bytes(f"{name}.txt", (text + "\n").encode())
            size += len(data)
            base = scores.get(bases.get(row.prompt_id, ""), {})
            lines.append(
                {
                    "file_name": f"{name}.png",
                    "text": text,
                    **_facts(row, verdicts.get(row.candidate_id), weights.get(row.candidate_id)),
                    "scores": scores.get(row.candidate_id, {}),
                    "base_scores": base,
                    "scored_by": {
                        reward: asdict(way) for reward, way in ways.get(row.candidate_id, {}).items() if way is not None
                    },
                    "sha256": row.image.sha256,
                    "craft_fast": __version__,
                }
            )
            task.advance()
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        files.write_bytes(METADATA, text.encode())
    if out.exists():
        shutil.rmtree(out)
    temp.rename(out)
    atomic.sync_folder(out.parent)
    return Written(out, len(chosen), sum(row.candidate_id in weights for row in chosen), size)


def _facts(row: Candidate, verdict: Selection | None, sample: Sample | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "prompt": row.base_prompt,
        "variant": row.prompt,
        "prompt_id": row.prompt_id,
        "member": row.member,
        "accepted": sample is not None,
        # The image's latents, not the seed's picture, are what was trained on; the seed tells how it was drawn.
        "noise_seed": row.noise_seed,
    }
    if sample is not None:
        facts["weight"] = sample.weight
    if verdict is not None:
        facts |= {"advantage": verdict.advantage, "r_total": verdict.r_total, "passed": dict(verdict.passed)}
    return facts


def _picture(run: Run, row: Candidate) -> bytes:
    path = run.path(row.image.path)
    data = path.read_bytes() if path.is_file() else b""
    if sha256_bytes(data) != row.image.sha256:
        raise IntegrityError(
            "A picture of the run is not what was written",
            where=str(path),
            hint=f"craft-fast generate --name {run.root.name} makes it again",
        )
    return data


def _check_out(out: Path, run: Run, chosen: Sequence[Candidate], *, force: bool) -> None:
    if out == run.root.resolve() or out in run.root.resolve().parents:
        raise UsageError("The dataset would take the place of the run", where=str(out), hint="give another folder")
    if out.exists() and (not out.is_dir() or not force):
        raise UsageError("This is there already", where=str(out), hint="--force replaces a folder; or give another one")
    if out.is_dir() and any(out.iterdir()) and not (out / METADATA).is_file():
        raise UsageError("This folder holds something else", where=str(out), hint="give another folder")
    atomic.make_folder(out.parent)
    needed = sum(row.image.size + 8192 for row in chosen)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ResourceError(
            "Not enough room on the disk", where=str(out), why=f"{needed:,} bytes are needed, {free:,} are free"
        )
