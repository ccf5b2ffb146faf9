"""The recipe: which stage comes when, what is done, what is stale.

Stages never call one another; this is the one place that knows their order. Each leaves its records in the run's
manifest under a key; a stage whose key is unchanged costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from craft_fast.budget import apply_cap, resolve_auto, with_changes
from craft_fast.config import Settings
from craft_fast.errors import UsageError, closest
from craft_fast.pipeline_keys import expander_cache, input_keys
from craft_fast.pipeline_own import own_digests
from craft_fast.pipeline_stages import Stages
from craft_fast.pipeline_stream import STREAMED, Stream, Work
from craft_fast.progress import Progress, Silent
from craft_fast.records import EvalRow, StageRow
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_bytes
from craft_fast.store.run import Run, open_run
from craft_fast.workbench import Workbench

if TYPE_CHECKING:
    from craft_fast.dataset import Written

STAGES = ("expand", "generate", "score", "filter", "cache", "train", "export", "evaluate", "report")
CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class RunSummary:
    """What a call of ``run_pipeline`` leaves behind; paths are None where that stage has not been reached.

    Attributes:
        root: the run's folder.
        stages: state, cost and figures of every stage so far.
        accepted: samples accepted by the filter.
        wanted: ``filter.target_samples``.
        images: candidates used.
        acceptance: share of variants that pass, by reward and under ``all``.
        evaluation: tuned against base on held-out prompts.
        lora: the LoRA file, or the folder of a whole UNet.
        report: the HTML page.
        report_json: the same as JSON.
    """

    root: Path
    stages: list[StageRow] = field(default_factory=list)
    accepted: int = 0
    wanted: int = 0
    images: int = 0
    acceptance: Mapping[str, float] = field(default_factory=dict)
    evaluation: list[EvalRow] = field(default_factory=list)
    lora: Path | None = None
    report: Path | None = None
    report_json: Path | None = None


@dataclass(frozen=True)
class StageStatus:
    """One line of ``craft-fast status``.

    Attributes:
        name: the stage.
        state: ``done``; ``stale``: done, under other settings or inputs; ``running``: begun, not finished; ``new``.
        seconds: time it took so far.
        peak_gib: peak memory.
        info: its figures.
    """

    name: str
    state: Literal["done", "stale", "running", "new"]
    seconds: float = 0.0
    peak_gib: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


def run_pipeline(
    root: Path,
    settings: Settings,
    *,
    until: str | None = None,
    only: str | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunSummary:
    """Work on a run until it is done; the same call after any interruption continues.

    Args:
        root: the run's folder; made when missing.
        settings: resolved settings; saved as ``config.yaml``.
        until: the last stage to run.
        only: the one stage to run, on the results of the stages before it.
        progress: told what happens.
        should_stop: polled; True saves and raises ``Interrupted``.

    Raises:
        CraftError: see ``craft_fast.errors``; what was done is saved.
    """
    for name in (until, only):
        if name is not None and name not in STAGES:
            raise UsageError(
                "There is no such stage", where=name, hint=f"{closest(name, STAGES)}one of: {', '.join(STAGES)}"
            )
    progress = progress or Silent()
    settings, saved = _decide(settings, progress)
    bench = Workbench(settings)
    with open_run(Path(root), create=only in (None, "expand", "generate")) as run:
        _save_settings(run, saved)
        own = own_digests(settings, run, progress) if settings.images.folder is not None else None
        keys = input_keys(settings, expander_cache(run), progress, own)
        work = Work(run, settings, keys, bench, progress, should_stop)
        try:
            _run_stages(work, until, only)
        finally:
            bench.close()
        return _summary(work)


def _decide(settings: Settings, progress: Progress) -> tuple[Settings, Settings]:
    """What ``auto`` means on this machine, and the memory cap in force; before any key is computed.

    Returns:
        The settings to work with, and those to save: with the method and the drawing UNet that were chosen, since the
        result depends on them, and the ``engine`` section as the user wrote it, since another machine may choose
        otherwise.
    """
    from craft_fast.plan import memory_warning
    from craft_fast.sdxl.load import pick_device

    device = pick_device(settings.model.device)
    for note in apply_cap(device, settings.engine):
        progress.warn(note)
    resolved, notes = resolve_auto(settings)
    for note in notes:
        progress.info(note)
    if warning := memory_warning(resolved):
        progress.warn(warning)
    chosen = {"train.method": resolved.train.method, "generate.unet": resolved.generate.unet}
    return resolved, with_changes(settings, chosen)


def _save_settings(run: Run, settings: Settings) -> None:
    from craft_fast.settings_io import render_yaml

    text = render_yaml(settings)
    path = run.path(CONFIG_NAME)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        atomic.write_text(path, text)
    with run.manifest.transaction():
        run.manifest.set_meta("seed", str(settings.seed))
        run.manifest.set_meta("config", sha256_bytes(text.encode()))


def _run_stages(work: Work, until: str | None, only: str | None) -> None:
    stages = Stages(work, STAGES)
    wanted = [only] if only else list(STAGES[: STAGES.index(until or STAGES[-1]) + 1])
    if "expand" in wanted or (only == "generate"):
        stages.expand()
    else:
        stages.need("expand")
    if streamed := [name for name in STREAMED if name in wanted]:
        _stream(work, stages, streamed)
    later = [name for name in wanted if name in STAGES[4:]]
    if not later:
        return
    stages.need("filter")
    for name in STAGES[4 : STAGES.index(later[-1]) + 1]:
        work.check_stop()
        if name in later:
            getattr(stages, name)()
        else:
            stages.need(name)
    if later[-1] == "report" or only == "evaluate":
        stages.quality_gate()


def _stream(work: Work, stages: Stages, streamed: list[str]) -> None:
    """The streamed stages that are wanted, unless verdicts of the same key are there already."""
    if "filter" in streamed and stages.filter_done():
        for name in streamed:
            stages.say_done(name)
        return
    Stream(work, streamed, stages.announce).run()


def _summary(work: Work) -> RunSummary:
    manifest = work.run.manifest
    rows = {row.name: row for row in manifest.stages()}
    chosen = rows["filter"].info if "filter" in rows else {}
    keys = stage_keys(work.run)

    def result(stage: str, name: str) -> Path | None:
        done = stage in rows and rows[stage].state == "done" and rows[stage].key == keys.get(stage)
        path = work.run.path(str(rows[stage].info[name])) if done and name in rows[stage].info else None
        return path if path is not None and path.exists() else None

    return RunSummary(
        root=work.run.root,
        stages=manifest.stages(),
        accepted=int(chosen.get("accepted", 0)),
        wanted=work.settings.filter.target_samples,
        images=int(chosen.get("images", 0)),
        acceptance=chosen.get("acceptance", {}),
        evaluation=manifest.eval_rows(keys.get("evaluate", "")),
        lora=result("export", "path"),
        report=result("report", "html"),
        report_json=result("report", "json"),
    )


def stage_keys(run: Run) -> dict[str, str]:
    """The keys that the stages had, or would have had, when the run was last worked on."""
    found: dict[str, str] = json.loads(run.manifest.get_meta("keys") or "{}")
    return found


def status(root: Path) -> list[StageStatus]:
    """State of every stage, from the manifest alone; beside a running run, too.

    Args:
        root: the run's folder.

    Raises:
        UsageError: there is no such run.
    """
    with open_run(Path(root), read_only=True) as run:
        keys = stage_keys(run)
        rows = {row.name: row for row in run.manifest.stages()}
        return [_status(name, rows.get(name), keys.get(name)) for name in STAGES]


def export_dataset(
    root: Path, out: Path, *, caption: str, everything: bool, force: bool, progress: Progress
) -> Written:
    """The accepted pictures of a run as an ordinary dataset; see ``craft_fast.dataset.write_dataset``.

    Raises:
        UsageError: there is no such run, or its training set is not there or not of its last settings.
    """
    from craft_fast.dataset import Keys, write_dataset

    with open_run(Path(root), read_only=True) as run:
        current = stage_keys(run)
        rows = {row.name: row for row in run.manifest.stages() if row.state == "done"}
        for name in STAGES[: STAGES.index("cache") + 1]:
            if name not in rows or rows[name].key != current.get(name):
                raise UsageError(
                    "The run's training set is not complete", where=str(root),
                    why=f"the stage {name} is {'of other settings' if name in rows else 'not done'}",
                    hint=f"craft-fast run --until cache --name {run.root.name}",
                )  # fmt: skip
        expand, generate, _, chosen, cache = (rows[name].key for name in STAGES[: STAGES.index("cache") + 1])
        keys = Keys(expand, generate, chosen, cache, rows["score"].info.get("reward_keys", {}))
        return write_dataset(run, out, keys, caption=caption, everything=everything, force=force, progress=progress)


def _status(name: str, row: StageRow | None, key: str | None) -> StageStatus:
    if row is None:
        return StageStatus(name, "new")
    state: Literal["done", "stale", "running"] = "running" if row.state == "running" else "done"
    if row.key != key:
        state = "stale"
    return StageStatus(name, state, row.seconds, row.peak_gib, row.info)


__all__ = ["STAGES", "RunSummary", "StageStatus", "export_dataset", "run_pipeline", "stage_keys", "status"]
