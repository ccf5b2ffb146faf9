"""What a run will need, stage by stage, before anything is loaded: memory, time, disk, and what is done already.

Memory follows from the settings and the model's configurations (``craft_fast.sdxl.costs``); time from a probe of some
seconds on the very device (``craft_fast.probe``). Nothing is written and no network is asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from craft_fast.budget import Machine, machine_of, model_shape, resolve_auto
from craft_fast.config import RewardSettings, Settings
from craft_fast.plan.amounts import Amounts, amounts, disk_bytes, fetched, seconds
from craft_fast.plan.fit import Change, over, ways_to_fit
from craft_fast.plan.stages import GIB, Costs
from craft_fast.plan.states import Known, known_of
from craft_fast.progress import Progress, Silent

if TYPE_CHECKING:
    from craft_fast.probe import Probe

State = Literal["done", "stale", "running", "new"]


@dataclass(frozen=True)
class StagePlan:
    """One line of ``craft-fast plan``.

    Attributes:
        name: the stage.
        state: as in ``craft-fast status``, under the settings given.
        peak_gib: most memory it needs; None where that is not known.
        seconds: time it will take from now on, 0 where it is done; None where it was not measured.
        disk_gib: what it will leave on disk.
        what: what decides its memory.
        fits: whether it does.
    """

    name: str
    state: State
    peak_gib: float | None
    seconds: float | None
    disk_gib: float
    what: str
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        device: its name.
        total_gib: its memory.
        cap_gib: ``engine.vram_gib``.
        budget_gib: what tensors may take of it.
        stages: in order.
        made: how many images, samples and prompts.
        seconds: of all stages that could be timed.
        timed: whether that was all of them.
        disk_gib: what will be written.
        disk_free_gib: where it goes.
        fits: whether everything fits into memory.
        changes: what would make it fit, cheapest first; empty where it does.
        can_fit: whether these suffice.
        probe: what was measured; None without a probe.
        notes: what was assumed or chosen.
    """

    device: str
    total_gib: float
    cap_gib: float | None
    budget_gib: float
    stages: tuple[StagePlan, ...]
    made: Amounts
    seconds: float
    timed: bool
    disk_gib: float
    disk_free_gib: float
    fits: bool
    changes: tuple[Change, ...]
    can_fit: bool
    probe: Probe | None
    notes: tuple[str, ...]

    @property
    def disk_fits(self) -> bool:
        """Whether what will be written has room."""
        return self.disk_gib <= self.disk_free_gib

    @property
    def options(self) -> list[str]:
        """What to add to the command so that it fits."""
        merged: dict[str, str] = {}
        for change in self.changes:
            for option in change.options():
                merged[option.partition("=")[0]] = option
        return list(merged.values())


def plan(
    root: Path,
    settings: Settings,
    *,
    probing: bool = True,
    deadline_s: float | None = None,
    progress: Progress | None = None,
    prompt_count: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """Work out what a run in ``root`` will need.

    Args:
        root: the run's folder, which need not exist.
        settings: as the user wrote them.
        probing: measure the device for some seconds.
        deadline_s: of the probe.
        progress: told what is going on.
        prompt_count: how many training prompts there are, instead of those in ``prompts.file``.
        machine: to plan for, instead of the one that ``model.device`` names; without a probe.

    Raises:
        CraftError: a setting, the model or the device is not right.
    """
    progress = progress or Silent()
    shape = model_shape(settings)
    notes = [shape.note] if shape.note else []
    machine = machine or _machine(settings)
    machine.check_cap(settings.engine)
    resolved, chosen = resolve_auto(settings, shape=shape, machine=machine)
    planned = Costs.of(resolved, machine, shape)
    known = known_of(root, resolved)
    made = amounts(resolved, acceptance=known.acceptance, prompt_count=prompt_count)
    notes += [*chosen, *made.notes, *known.notes, *_rewards_notes(planned, root)]
    probed = _probe(planned, deadline_s, progress, notes) if probing and machine.device else None
    stages = _stages(planned, made, known.states, probed, root)
    fits = all(stage.fits for stage in stages)
    changes, can_fit = ([], True) if fits else ways_to_fit(planned)
    todo = [stage for stage in stages if stage.state != "done"]
    return Plan(
        device=machine.name,
        total_gib=machine.total_bytes / GIB,
        cap_gib=resolved.engine.vram_gib,
        budget_gib=planned.budget / GIB,
        stages=stages,
        made=made,
        seconds=sum(stage.seconds or 0.0 for stage in todo),
        timed=all(stage.seconds is not None for stage in todo),
        disk_gib=sum(stage.disk_gib for stage in todo),
        disk_free_gib=free_disk(root) / GIB,
        fits=fits,
        changes=tuple(changes),
        can_fit=can_fit,
        probe=probed,
        notes=tuple(notes),
    )


def memory_warning(settings: Settings) -> str | None:
    """For a run that begins: which stage will not fit the GPU, or None; no probe, and nothing on a CPU."""
    machine = _machine(settings)
    if not machine.gpu:
        return None
    planned = Costs.of(settings, machine)
    excess = over(planned)
    if not excess:
        return None
    worst = max(excess, key=lambda name: excess[name])
    needed = (planned.budget + excess[worst]) / GIB
    return (
        f"{worst} is expected to need {needed:.1f} GiB of GPU memory, {planned.budget / GIB:.1f} can be used; "
        "craft-fast plan says which settings would fit"
    )


def free_disk(root: Path) -> int:
    """Bytes free where the run's folder is or will be."""
    return shutil.disk_usage(_there(root)).free


def _machine(settings: Settings) -> Machine:
    from craft_fast.sdxl.load import pick_device

    return machine_of(pick_device(settings.model.device))


def _probe(planned: Costs, deadline_s: float | None, progress: Progress, notes: list[str]) -> Probe | None:
    import torch

    from craft_fast.probe import probe

    progress.info("Measuring this device for some seconds; --no-probe leaves that out")
    try:
        return probe(planned, deadline_s=deadline_s)
    except torch.OutOfMemoryError as error:
        notes.append(f"not even one block fits into the memory that is free now: {str(error).splitlines()[0]}")
        return None


def _rewards_notes(planned: Costs, root: Path) -> list[str]:
    """Rewards whose needs are not known, and what is fetched before the run begins."""
    notes = []
    if missing := [name for name, judge in planned.judges(held_out=True).items() if judge is None]:
        notes.append(f"rewards {', '.join(missing)} are not on this machine: what they need is not known")
    if planned.plugins:
        notes.append(f"rewards {', '.join(planned.plugins)} are plug-ins: what they need is not counted")
    assets = [asset for some in fetched(planned).values() for asset in some]
    if assets:
        from craft_fast.rewards.shelf import shelf

        need, place = sum(asset.size for asset in assets), shelf()
        kinds = list(dict.fromkeys(spec.kind for spec in planned.settings.rewards.values() if _fetches(planned, spec)))
        notes.append(
            f"reward models to be fetched first: {need / 1e9:.1f} GB in {len(assets)} files, to {place}; beforehand: "
            f"craft-fast rewards fetch {' '.join(kinds)}"
        )
        if not _same_disk(root, place) and need > (free := free_disk(place)):
            notes.append(
                f"NOT ENOUGH ROOM for them at {place}: {free / GIB:.1f} GiB free; CRAFT_FAST_REWARDS=DIR moves it"
            )
    return notes


def _fetches(planned: Costs, spec: RewardSettings) -> bool:
    judges = planned.judges(held_out=True)
    return any(
        planned.settings.rewards[name] is spec and judge is not None and judge.fetch for name, judge in judges.items()
    )


def _same_disk(one: Path, other: Path) -> bool:
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(path: Path) -> Path:
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return place


def _stages(
    planned: Costs, made: Amounts, states: Mapping[str, State], probed: Probe | None, root: Path
) -> tuple[StagePlan, ...]:
    from craft_fast.rewards.shelf import shelf

    peaks, disk = planned.peaks(), disk_bytes(planned, made, fetch=_same_disk(root, shelf()))
    times: Mapping[str, float | None] = {} if probed is None else seconds(planned, made, probed)
    found = []
    for name, peak in peaks.items():
        done = states.get(name) == "done"
        found.append(
            StagePlan(
                name=name,
                state=states.get(name, "new"),
                peak_gib=None if peak is None else peak.allocated / GIB,
                seconds=0.0 if done else times.get(name),
                disk_gib=0.0 if done else disk[name] / GIB,
                what="" if peak is None else peak.what,
                fits=done or peak is None or peak.reserved <= planned.budget,
            )
        )
    return tuple(found)


def plan_data(found: Plan, command: Callable[[list[str]], str]) -> dict[str, Any]:
    """A plan as JSON.

    Args:
        found: the plan.
        command: makes the command line of the run with some options.
    """
    from dataclasses import asdict

    data = {name: value for name, value in asdict(found).items() if name not in ("made", "probe", "changes")}
    return {
        **data,
        "made": asdict(found.made),
        "disk_fits": found.disk_fits,
        "changes": [
            {"options": change.options(), "peak_gib": change.peak_gib, "time": change.time} for change in found.changes
        ],
        "probe": None if found.probe is None else found.probe.data(),
        "command": command(found.options),
    }


__all__ = ["Known", "Plan", "StagePlan", "free_disk", "memory_warning", "plan", "plan_data"]
