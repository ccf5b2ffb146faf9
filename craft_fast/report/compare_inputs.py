"""Finished evaluations of several runs, and which of their pictures may be held against one another.

Two evaluated pictures are comparable when base model, way of drawing, prompt and noise seed are equal. The proof is the
base model's picture, which each run drew for itself: equal bytes come from nothing else. Runs are opened read-only.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.errors import CraftError, UsageError
from craft_fast.records import FileRef, Provenance, StageRow
from craft_fast.settings_io import load_settings
from craft_fast.store.digest import sha256_bytes
from craft_fast.store.run import Run, open_run

if TYPE_CHECKING:
    from craft_fast.config import Settings

SIDES = ("base", "tuned")
CONFIG_NAME = "config.yaml"
# Base pictures of equal settings that differ in their last bits (another batch, GPU or version of a library) stay
# below this many levels of 255 on average; other noise moves a picture by tens.
ROUNDING_LEVELS = 4.0
# What a picture depends on in these sections. Pieces of the batch change its last bits alone.
_MODEL = ("path", "config", "vae", "prediction_type", "zero_terminal_snr", "dtype", "vae_dtype")
_GENERATE = (
    "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "negative_prompt", "unet", "height_px",
    "width_px",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One run's finished evaluation.

    Attributes:
        label: the run's name, as it is shown.
        root: its folder.
        settings: as saved.
        seed: of the pictures.
        prompts: prompt_id to text, in the run's order.
        pictures: by side (``base``, ``tuned``) and prompt_id.
        scores: by side, reward and prompt_id.
        provenances: by reward, how its scores came about; None: not known, or in more than one way.
        stages: the rows of all stages.
        trained_on: sha256 of the pictures that were accepted.
        loras: the exported files.
    """

    label: str
    root: Path
    settings: Settings
    seed: int
    prompts: Mapping[str, str]
    pictures: Mapping[str, Mapping[str, FileRef]]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    provenances: Mapping[str, Provenance | None]
    stages: Sequence[StageRow]
    trained_on: frozenset[str]
    loras: Sequence[FileRef]

    def held_out(self, reward: str) -> bool:
        """Whether a reward neither filtered nor weighted this run's training set."""
        return reward in self.settings.rewards and self.settings.rewards[reward].held_out

    def file(self, side: str, prompt_id: str) -> Path | None:
        """A picture's file, while it is there; a record that points out of the run's folder has none."""
        path = self.root / self.pictures[side][prompt_id].path
        return path if path.is_file() and path.resolve().is_relative_to(self.root.resolve()) else None


@dataclass(frozen=True, slots=True)
class Shared:
    """What can be compared.

    Attributes:
        prompts: prompt_id to text of the prompts that all runs drew from the same noise, in the first run's order.
        left_out: a line for each reason why others are not among them.
        rounded: prompts whose base pictures are equal but for rounding.
    """

    prompts: Mapping[str, str]
    left_out: Sequence[str] = ()
    rounded: int = 0


def command(root: Path, verb: str, *more: str) -> str:
    """A command line for a run: ``craft-fast evaluate --name sea``."""
    words = ["craft-fast", verb, "--name", root.name]
    if root.parent != Path("runs"):
        words += ["--runs", str(root.parent)]
    return shlex.join([*words, *more])


# ---- reading


def read_evaluation(root: Path, label: str) -> Evaluated:
    """The finished evaluation of a run; works beside a running one.

    Args:
        root: the run's folder.
        label: what to call it.

    Raises:
        UsageError: no run, no finished evaluation, or one that is not of the run's settings; with what to type.
        CraftError: a manifest or settings that cannot be read.
    """
    with open_run(root, read_only=True) as run:
        key = _finished(run)
        settings = load_settings(config=root / CONFIG_NAME)
        stages = {row.name: row for row in run.manifest.stages()}
        scores: dict[str, dict[str, dict[str, float]]] = {side: {} for side in SIDES}
        for side, prompt_id, reward, value in run.manifest.eval_scores(key):
            scores[side].setdefault(reward, {})[prompt_id] = value
        pictures = {side: run.manifest.files(f"eval_{side}", key) for side in SIDES}
        groups = run.manifest.groups(stages["expand"].key, "heldout")
        texts = {group.prompt.prompt_id: group.prompt.text for group in groups}
        ways = {reward: list(found) for reward, found in run.manifest.eval_provenances(key).items()}
        return Evaluated(
            label=label,
            root=root,
            settings=settings,
            seed=settings.seed if settings.evaluate.seed is None else settings.evaluate.seed,
            prompts={name: text for name, text in texts.items() if all(name in pictures[side] for side in SIDES)},
            pictures=pictures,
            scores=scores,
            provenances={reward: found[0] if len(found) == 1 else None for reward, found in ways.items()},
            stages=list(stages.values()),
            trained_on=_trained_on(run, stages),
            loras=[FileRef(*ref) for ref in _loras(stages)],
        )


def _finished(run: Run) -> str:
    """The evaluation's key.

    Raises:
        UsageError: it is not done, or is not of the settings that are saved now.
    """
    row = run.manifest.stage("evaluate")
    keys = json.loads(run.manifest.get_meta("keys") or "{}")
    exported = run.manifest.stage("export")
    verb = "evaluate" if exported is not None and exported.state == "done" else "run"
    config = run.path(CONFIG_NAME)
    saved = run.manifest.get_meta("config")
    if row is None or row.state != "done":
        what, why = "This run has no finished evaluation", "the stage evaluate is not done"
    elif row.key != keys.get("evaluate"):
        what, why = "This run's evaluation is not of its settings", "settings or inputs have changed since"
        verb = "run"
    elif saved is not None and (not config.is_file() or sha256_bytes(config.read_bytes()) != saved):
        what, why = "This run's evaluation is not of its settings", f"{CONFIG_NAME} is not what the run was worked with"
        verb = "run"
    else:
        return row.key
    raise UsageError(what, where=str(run.root), why=why, hint=command(run.root, verb))


def _trained_on(run: Run, stages: Mapping[str, StageRow]) -> frozenset[str]:
    if not {"filter", "generate"} <= set(stages):
        return frozenset()
    accepted = {row.candidate_id for row in run.manifest.selections(stages["filter"].key) if row.accepted}
    candidates = run.manifest.candidates(stages["generate"].key)
    return frozenset(row.image.sha256 for row in candidates if row.candidate_id in accepted)


def _loras(stages: Mapping[str, StageRow]) -> list[tuple[str, str, int]]:
    info: Mapping[str, Any] = stages["export"].info if "export" in stages else {}
    if not {"path", "sha256", "size"} <= set(info):
        return []
    return [(str(info["path"]), str(info["sha256"]), int(info["size"]))]


# ---- what they share


def match(runs: Sequence[Evaluated], differ: Callable[[Path, Path], float]) -> Shared:
    """The prompts of which all runs drew the base picture of the first.

    Args:
        runs: at least two; the first is what the others are held against.
        differ: mean difference of two pictures, in levels of 255; infinite where they cannot be compared.

    Raises:
        UsageError: none are shared; says why, and what to type.
    """
    first = runs[0]
    common = set(first.prompts)
    left_out: list[str] = []
    rounded: set[str] = set()
    for other in runs[1:]:
        there = [name for name in first.prompts if name in other.prompts]
        reasons = _differences(first, other)
        equal = {name for name in there if _same_bytes(first, other, name)}
        # Which pictures are equal but for rounding is looked at where the settings leave no other cause.
        near = {name for name in there if name not in equal and not reasons and _is_near(first, other, name, differ)}
        if not equal | near:
            raise _nothing_shared(first, other, there, reasons)
        left_out += _left_out(first, other, there, len(there) - len(equal | near), reasons)
        rounded |= near
        common &= equal | near
    if not common:
        raise UsageError(
            "There is no prompt that all of these runs drew from the same noise",
            where=", ".join(run.label for run in runs),
            why="each shares some with the first, but not the same ones",
            hint=f"two at a time: craft-fast compare {shlex.join([str(run.root) for run in runs[:2]])}",
        )
    prompts = {name: text for name, text in first.prompts.items() if name in common}
    return Shared(prompts, left_out, len(rounded & common))


def _same_bytes(first: Evaluated, other: Evaluated, name: str) -> bool:
    return first.pictures["base"][name].sha256 == other.pictures["base"][name].sha256


def _is_near(first: Evaluated, other: Evaluated, name: str, differ: Callable[[Path, Path], float]) -> bool:
    one, two = first.file("base", name), other.file("base", name)
    return one is not None and two is not None and differ(one, two) <= ROUNDING_LEVELS


def _differences(first: Evaluated, other: Evaluated) -> list[tuple[str, Any, Any]]:
    """What decides a picture and is not equal: setting, value of the first run, value of the other."""
    found: list[tuple[str, Any, Any]] = []
    for section, names in (("model", _MODEL), ("generate", _GENERATE)):
        one, two = getattr(first.settings, section), getattr(other.settings, section)
        pairs = [(f"{section}.{name}", getattr(one, name), getattr(two, name)) for name in names]
        found += [pair for pair in pairs if pair[1] != pair[2]]
    if first.seed != other.seed:
        found.append(("evaluate.seed", first.seed, other.seed))
    return found


def _left_out(
    first: Evaluated, other: Evaluated, there: Sequence[str], unequal: int, reasons: Sequence[tuple[str, Any, Any]]
) -> list[str]:
    lines = []
    if missing := len(first.prompts) - len(there):
        lines.append(f"{missing} of {len(first.prompts)} prompts of {first.label} are not among those of {other.label}")
    if missing := len(other.prompts) - len(there):
        lines.append(f"{missing} of {len(other.prompts)} prompts of {other.label} are not among those of {first.label}")
    if unequal:
        lines.append(f"{unequal} prompts: the base pictures of {first.label} and {other.label} differ{_told(reasons)}")
    return lines


def _told(reasons: Sequence[tuple[str, Any, Any]]) -> str:
    if not reasons:
        return ", though their settings do not: another model file, device or version of a library drew them"
    return f" ({'; '.join(f'{key}: {_short(one)}, {_short(two)}' for key, one, two in reasons[:4])})"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nothing_shared(
    first: Evaluated, other: Evaluated, there: Sequence[str], reasons: Sequence[tuple[str, Any, Any]]
) -> CraftError:
    """No pair of pictures that only the training sets apart: why, and the command that mends it."""
    where = f"{first.label} and {other.label}"
    again = f"craft-fast run --config {shlex.quote(str(other.root / CONFIG_NAME))} --name {other.root.name}-2"
    if not there:
        return UsageError(
            "These runs were evaluated on different prompts",
            where=where,
            why=f"none of {len(first.prompts)} and {len(other.prompts)} held-out prompts is in both",
            hint=f"run one again with the other's prompts: {again} --set "
            + shlex.quote(f"prompts.heldout_file={first.settings.prompts.heldout_file or 'FILE'}"),
        )
    keys = [key for key, _, _ in reasons]
    if keys == ["evaluate.seed"]:
        hint = command(other.root, "evaluate", "--set", f"evaluate.seed={first.seed}")
        return UsageError(
            "These runs drew their pictures from different noise",
            where=where,
            why=f"the seeds of their evaluations are {first.seed} and {other.seed}",
            hint=f"{hint}; then compare again",
        )
    if any(key.startswith("model.") for key in keys):
        what = "These runs align different models, or one model in different ways"
        return UsageError(what, where=where, why=_told(reasons).strip(" ()"), hint="compare runs of one base model")
    if keys:
        changes = [f"{key}={_short(one)}" for key, one, _ in reasons]
        return UsageError(
            "These runs drew their pictures in different ways",
            where=where,
            why=_told(reasons).strip(" ()"),
            hint=f"run one again as the other: {again} {' '.join(f'--set {shlex.quote(text)}' for text in changes)}",
        )
    return UsageError(
        "The base pictures of these runs differ, though their settings do not",
        where=where,
        why="another model file, device or version of a library drew them",
        hint=f"evaluate both on one machine: {command(other.root, 'evaluate')}",
    )


def picture_difference(one: Path, two: Path) -> float:
    """Mean absolute difference of two pictures in levels of 255; infinite where their sizes differ or one is broken."""
    from craft_fast.store.safe_load import read_image

    try:
        first, second = read_image(one), read_image(two)
    except CraftError:
        return math.inf
    if first.shape != second.shape:
        return math.inf
    return float((first.int() - second.int()).abs().double().mean())
