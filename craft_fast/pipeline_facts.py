"""What a LoRA's header says of how it was made: rewards, filter, training set, scores before and after; its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from craft_fast.config import Settings
from craft_fast.records import EvalRow, FileRef, StageRow
from craft_fast.store.digest import digest_json

if TYPE_CHECKING:
    from craft_fast.pipeline_stream import Work

# Where things are on one machine, and how it does the work: equal runs in other folders give equal files.
_PLACES: dict[str, set[str]] = {
    "model": {"path", "config", "vae", "device", "offline"},
    "prompts": {"file", "heldout_file", "vocabulary"},
    "images": {"folder"},
    "expand": {"file"},
}


def lora_facts(work: Work, *, train_key: str, cache_key: str) -> dict[str, Any]:
    """What is known when the LoRA is exported.

    Args:
        work: the run.
        train_key: of the stage that trained it.
        cache_key: of the stage that weighed the samples.
    """
    settings, manifest = work.settings, work.run.manifest
    chosen = manifest.stage("filter")
    info = chosen.info if chosen is not None else {}
    samples = manifest.samples(cache_key)
    return {
        "rewards": {
            name: {"kind": spec.kind, "key": work.keys.all_rewards[name], "held_out": spec.held_out,
                   "weight": spec.weight}
            for name, spec in settings.rewards.items()
        },
        "filter": settings.filter.model_dump(mode="json", exclude={"block_groups"}),
        "weighting": settings.train.weighting,
        "accepted": info.get("accepted", 0),
        "candidates": info.get("images", 0),
        "weights_digest": digest_json([[sample.sample_id, sample.weight] for sample in samples]),
        "model": work.keys.model,
        "config": _config_digest(settings),
        "train_key": train_key,
        "seed": settings.seed,
    }  # fmt: skip


def score_facts(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """Scores before and after, by reward; nothing where there was no evaluation."""
    scores = {row.metric: {key: value for key, value in asdict(row).items() if key != "metric"} for row in rows}
    return {"scores": scores} if scores else {}


def exported_files(row: StageRow) -> list[FileRef]:
    """The files that the row of ``export`` names, the LoRA first; none of a row that is not done."""
    if "sha256" not in row.info:
        return []
    main = FileRef(str(row.info["path"]), str(row.info["sha256"]), int(row.info["size"]))
    return [main, *(FileRef(**ref) for ref in row.info.get("also", ()))]


def pending_files(row: StageRow) -> list[FileRef]:
    """What these files may be already, where a kill fell between the new file and its record."""
    return [FileRef(**ref) for ref in row.info.get("next", ())]


def _config_digest(settings: Settings) -> str:
    tree: Mapping[str, Any] = settings.model_dump(mode="json", exclude={"engine", "report"})
    plain = {
        name: {key: value for key, value in part.items() if key not in _PLACES.get(name, ())}
        if isinstance(part, dict)
        else part
        for name, part in tree.items()
    }
    plain["rewards"] = {
        name: {key: value for key, value in spec.items() if key != "path"} for name, spec in tree["rewards"].items()
    }
    return digest_json(plain)
