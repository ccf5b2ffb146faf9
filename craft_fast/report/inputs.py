"""What a report shows, read from the manifest, ``log.jsonl`` and the files of a run."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import craft_fast
from craft_fast.errors import CraftError
from craft_fast.records import Candidate, EvalRow, FileRef, Provenance, Selection, StageRow
from craft_fast.rng import derive_seed
from craft_fast.store.run import read_log

if TYPE_CHECKING:
    from craft_fast.config import ModelSettings, Settings
    from craft_fast.store.manifest import Manifest
    from craft_fast.store.run import Run

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "triton")
SIDES = ("base", "tuned")


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Under which keys of the manifest the report's parts are; an empty key means that the part is not there."""

    expand: str = ""
    generate: str = ""
    filter: str = ""
    train: str = ""
    evaluate: str = ""
    reward_keys: Mapping[str, str] = field(default_factory=dict)
    """Reward name to the key under which it scored."""
    images: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Side (``base``, ``tuned``) to kind and key of the evaluation's images, by prompt_id."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out prompt before and after, same noise.

    Attributes:
        prompt_id: of the prompt.
        prompt: its text.
        noise_seed: of both pictures.
        base: picture; None where there is no such file any more.
        tuned: likewise.
        base_scores: by reward.
        tuned_scores: by reward.
    """

    prompt_id: str
    prompt: str
    noise_seed: int
    base: Path | None
    tuned: Path | None
    base_scores: Mapping[str, float]
    tuned_scores: Mapping[str, float]

    @property
    def pictures(self) -> tuple[Path, Path] | None:
        """Both pictures, or None where one is not there."""
        return (self.base, self.tuned) if self.base is not None and self.tuned is not None else None


@dataclass(frozen=True, slots=True)
class Strip:
    """One held-out prompt as it was drawn during training, same seed: (what drew it, image), in order of time."""

    prompt: str
    images: Sequence[tuple[str, Path]]


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page and the JSON are made of."""

    title: str
    name: str
    made: str
    seed: int
    settings_text: str
    settings: Mapping[str, Any]
    reward_notes: Mapping[str, str]
    provenances: Mapping[str, Sequence[Provenance | None]]
    """By reward, how its scores came about, of candidates and of the evaluation; None: not recorded."""
    filter_rewards: Sequence[str]
    stages: Sequence[StageRow]
    candidates: Sequence[Candidate]
    scores: Mapping[str, Mapping[str, float]]
    selections: Sequence[Selection]
    evaluation: Sequence[EvalRow]
    pairs: Sequence[Pair]
    grid_prompts: int
    total_of: Sequence[str] | None
    """The rewards that r_total was made of; None: not recorded."""
    strips: Sequence[Strip]
    losses: Sequence[tuple[int, float]]
    versions: Mapping[str, str]
    reward_keys: Mapping[str, str]
    model_digest: str | None
    loras: Sequence[FileRef]


def find_inputs(manifest: Manifest) -> ReportInputs:
    """The keys of the stages that began, from their rows; the score stage's row tells its rewards' keys."""
    stages = {row.name: row for row in manifest.stages()}

    def key(name: str) -> str:
        return stages[name].key if name in stages else ""

    info = stages["score"].info if "score" in stages else {}
    reward_keys = info.get("reward_keys", {})
    return ReportInputs(
        expand=key("expand"),
        generate=key("generate"),
        filter=key("filter"),
        train=key("train"),
        evaluate=key("evaluate"),
        reward_keys=reward_keys if isinstance(reward_keys, dict) else {},
        images={side: (f"eval_{side}", key("evaluate")) for side in SIDES},
    )


def gather(run: Run, settings: Settings, inputs: ReportInputs) -> ReportData:
    """Read a run.

    Args:
        run: the open run; read only.
        settings: its resolved settings.
        inputs: the keys to read under.
    """
    manifest = run.manifest
    reward_keys = {name: inputs.reward_keys[name] for name in settings.rewards if name in inputs.reward_keys}
    candidates = manifest.candidates(inputs.generate)
    resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    shown = _without_passwords(resolved)
    return ReportData(
        title=settings.report.title,
        name=run.root.resolve().name,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seed=settings.seed,
        settings_text=shown,
        settings=yaml.safe_load(shown),
        provenances=_provenances(run, settings, reward_keys, inputs.evaluate),
        reward_notes={
            name: ", ".join(filter(None, (reward.kind, reward.path))) for name, reward in settings.rewards.items()
        },
        filter_rewards=settings.filter.rewards,
        stages=[row for row in manifest.stages() if row.state == "done"],
        candidates=candidates,
        scores=manifest.scores(reward_keys, [row.candidate_id for row in candidates]),
        selections=manifest.selections(inputs.filter),
        evaluation=manifest.eval_rows(inputs.evaluate),
        pairs=_pairs(run, inputs, settings),
        grid_prompts=settings.report.grid_prompts,
        total_of=_total_of(manifest),
        strips=_strips(run, inputs, settings.train.steps, same_noise=settings.evaluate.seed in (None, settings.seed)),
        losses=_losses(run, inputs.train),
        versions=_versions(),
        reward_keys=reward_keys,
        model_digest=_model_digest(settings.model),
        loras=_loras(run),
    )


def _total_of(manifest: Manifest) -> list[str] | None:
    row = manifest.stage("filter")
    weights = row.info.get("r_total") if row is not None else None
    return list(weights) if isinstance(weights, dict) else None


def _provenances(
    run: Run, settings: Settings, reward_keys: Mapping[str, str], evaluate: str
) -> dict[str, list[Provenance | None]]:
    candidates, pairs = run.manifest.provenances(reward_keys), run.manifest.eval_provenances(evaluate)
    return {name: list({**candidates.get(name, {}), **pairs.get(name, {})}) for name in settings.rewards}


def _pairs(run: Run, inputs: ReportInputs, settings: Settings) -> list[Pair]:
    """Held-out prompts that have scores or pictures on both sides, in the file's order."""
    files = [run.manifest.files(*inputs.images[side]) if side in inputs.images else {} for side in SIDES]
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for side, prompt_id, reward, value in run.manifest.eval_scores(inputs.evaluate):
        scores.setdefault((side, prompt_id), {})[reward] = value
    root = settings.seed if settings.evaluate.seed is None else settings.evaluate.seed
    pairs = []
    for group in run.manifest.groups(inputs.expand, "heldout"):
        prompt_id = group.prompt.prompt_id
        paths = [run.path(side[prompt_id].path) if prompt_id in side else None for side in files]
        base, tuned = (path if path is not None and path.is_file() else None for path in paths)
        before, after = (scores.get((side, prompt_id), {}) for side in SIDES)
        if (base and tuned) or (before and after):
            # As evaluate derives it.
            seed = derive_seed(root, "evaluate", prompt_id)
            pairs.append(Pair(prompt_id, group.prompt.text, seed, base, tuned, before, after))
    return pairs


def _strips(run: Run, inputs: ReportInputs, last_step: int, *, same_noise: bool) -> list[Strip]:
    """Pictures that training drew at intervals, between the base model's and the tuned one's where those are there.

    Training draws from the run's seed; evaluated pictures of another one (``evaluate.seed``) are no part of the row.
    """
    by_prompt: dict[str, dict[int, Path]] = {}
    for name, ref in run.manifest.files("sample", "train").items():
        step, _, prompt_id = name.partition("/")
        if step.isdecimal() and run.path(ref.path).is_file():
            by_prompt.setdefault(prompt_id, {})[int(step)] = run.path(ref.path)
    ends = {side: run.manifest.files(*where) for side, where in inputs.images.items()} if same_noise else {}
    strips = []
    for group in run.manifest.groups(inputs.expand, "heldout"):
        prompt_id = group.prompt.prompt_id
        if prompt_id in by_prompt:
            steps = by_prompt[prompt_id]
            images = [(f"step {step}", path) for step, path in sorted(steps.items())]
            found = {side: run.path(files[prompt_id].path) for side, files in ends.items() if prompt_id in files}
            if "base" in found and found["base"].is_file():
                images.insert(0, ("base", found["base"]))
            if "tuned" in found and found["tuned"].is_file() and last_step not in steps:
                images.append(("tuned", found["tuned"]))
            strips.append(Strip(group.prompt.text, images))
    return strips


def _losses(run: Run, key: str) -> list[tuple[int, float]]:
    """Loss by step; a step that was done again after a kill counts once, with its last value."""
    found: dict[int, float] = {}
    for event in read_log(run):
        step, loss = event.get("step"), event.get("loss")
        if event.get("event") != "train_step" or str(event.get("key", ""))[:16] != key[:16]:
            continue
        if isinstance(step, int) and isinstance(loss, (int, float)) and math.isfinite(loss):
            found[step] = float(loss)
    return sorted(found.items())


def _versions() -> dict[str, str]:
    found = {"craft-fast": craft_fast.__version__, "Python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _model_digest(model: ModelSettings) -> str | None:
    """The model's digest, free where the pipeline has just computed it; None when the model is not there any more."""
    from craft_fast.sdxl.load import model_digest

    try:
        return model_digest(model.path, config=model.config, vae=model.vae, offline=model.offline)
    except CraftError:
        return None


def _loras(run: Run) -> list[FileRef]:
    """The exported files, the one to use first; their digests are the export's, not taken again of many GiB."""
    row = run.manifest.stage("export")
    if row is not None and row.state == "done" and "path" in row.info:
        main = FileRef(str(row.info["path"]), str(row.info["sha256"]), int(row.info["size"]))
        return [main, *(FileRef(**ref) for ref in row.info.get("also", ()))]
    folder = run.path("lora")
    return [run.ref(path) for path in sorted(folder.rglob("*.safetensors"))] if folder.is_dir() else []


def _without_passwords(text: str) -> str:
    """Settings as they are shown: a report is made to be passed on, so ``user:password@`` leaves addresses."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
