"""Generate, score and filter in blocks of groups, until enough is accepted, a budget is spent, or prompts run out.

What was decided is recorded with the verdicts in one transaction: a run that continues, or is asked again, uses the
same groups, also when it was a clock that decided.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from craft_fast.config import Settings
from craft_fast.errors import CraftError, Interrupted, QualityGateError, UsageError
from craft_fast.filtering import FilterResult, rates_in_words, what_to_loosen
from craft_fast.own_groups import drawn_part, own_members
from craft_fast.pipeline_keys import InputKeys
from craft_fast.pipeline_own import bring_in_block, given_result, own_weights
from craft_fast.pipeline_scoring import RenewedError, Scoring
from craft_fast.progress import Progress
from craft_fast.records import Candidate, Group, Selection
from craft_fast.store.digest import digest_json, sha256_file
from craft_fast.store.run import Run
from craft_fast.workbench import Meter, Workbench

Reason = Literal["enough", "max_images", "max_minutes", "prompts", "candidates"]
_REASONS = {
    "enough": "enough were accepted",
    "max_images": "the image budget is spent",
    "max_minutes": "the time budget is spent",
    "prompts": "the prompts ran out",
    "candidates": "these are all candidates there are",
}
STREAMED = ("generate", "score", "filter")


@dataclass(frozen=True)
class Decision:
    """Which groups, counted from the first, were used, and why no more."""

    groups: int
    reason: Reason


@dataclass(frozen=True)
class Work:
    """What every stage is given: the run, its settings and keys, what is shared, and whom to tell."""

    run: Run
    settings: Settings
    keys: InputKeys
    bench: Workbench
    progress: Progress
    should_stop: Callable[[], bool]

    def check_stop(self) -> None:
        """Raise ``Interrupted`` when a signal asked the run to stop."""
        if self.should_stop():
            raise Interrupted("Stopped; everything done so far is saved", hint="the same command continues")


def selection_digest(selections: Sequence[Selection]) -> str:
    """Digest of what training depends on: who was accepted, and with which advantage."""
    return digest_json([[row.candidate_id, row.advantage] for row in selections if row.accepted])


class Stream:
    """The streaming filter.

    Args:
        work: see ``Work``.
        steps: which of the three stages may do new work; the others only use what is there.
        announce: told the stage that works now, each time it changes.
    """

    def __init__(
        self, work: Work, steps: Sequence[str] = STREAMED, announce: Callable[[str], None] = lambda name: None
    ) -> None:
        self.work = work
        self._announce = announce
        self.steps = frozenset(steps)
        manifest, keys = work.run.manifest, work.keys
        self.groups = manifest.groups(keys.expand, "train")
        # Own pictures: how many of a group's members the model draws, and whether verdicts came with them.
        self.own = work.settings.images.folder is not None
        self.given = own_weights(work, ()) is not None
        self.scoring = Scoring(work)
        self.stage_keys = {"generate": keys.generate, "score": keys.score, "filter": keys.filter}
        self.meters = {name: self._meter(name) for name in STREAMED}
        for name in self._steps_in_order():
            manifest.begin_stage(name, self.stage_keys[name])
        self.recorded = self._read_decision()

    def _steps_in_order(self) -> list[str]:
        return [name for name in STREAMED if name in self.steps]

    def _meter(self, name: str) -> Meter:
        """The stage's clock goes on where it stopped, also when a larger budget or another filter asks for more."""
        row = self.work.run.manifest.stage(name)
        same = row is not None and row.key == self.stage_keys[name]
        return Meter(row.seconds, row.peak_gib) if row is not None and same else Meter()

    # ---- the loop

    def run(self) -> FilterResult | None:
        """Work through the blocks; returns the final verdicts, or None when nothing was to be judged."""
        budget = self.work.settings.generate
        if "generate" in self.steps and "filter" not in self.steps and not (budget.max_images or budget.max_minutes):
            self.work.progress.info(f"No budget: candidates of all {len(self.groups)} prompts; --max-images sets one")
        try:
            if "score" in self.steps:
                self.scoring.settle()
            while True:
                with contextlib.suppress(RenewedError):
                    used, decision = self._blocks()
                    break
            return self._finish(used, decision)
        except BaseException:
            with contextlib.suppress(CraftError):
                self._save_meters()
            raise

    def _blocks(self) -> tuple[list[Group], Decision]:
        used: list[Group] = []
        result: FilterResult | None = None
        for block in _chunks(self.groups, self.work.settings.filter.block_groups):
            reason = self._why_stop(used, result)
            if reason is not None:
                return used, Decision(len(used), reason)
            room = self._fit(block, used)
            ready = self._make(room, used)
            used += ready
            if "filter" in self.steps and used:
                result = self._judge(used, final=False)
                self._tell(used, result)
            self._save_meters()
            if len(ready) < len(room):
                return used, Decision(len(used), "candidates" if "generate" not in self.steps else "max_minutes")
            if len(room) < len(block):
                return used, self.recorded or Decision(len(used), "max_images")
        return used, Decision(len(used), self._why_stop(used, result) or "prompts")

    def _why_stop(self, used: Sequence[Group], result: FilterResult | None) -> Reason | None:
        """Whether no further block is wanted, and why; a recorded decision is obeyed, not made again."""
        if self.recorded is not None:
            return self.recorded.reason if len(used) >= self.recorded.groups else None
        if result is not None and result.done and not self.given:
            return "enough"
        if "generate" in self.steps and used and self._out_of_time():
            return "max_minutes"
        return None

    def _fit(self, block: Sequence[Group], used: Sequence[Group]) -> list[Group]:
        """The part of a block that a recorded decision or the image budget has room for."""
        if self.recorded is not None:
            return list(block[: self.recorded.groups - len(used)])
        budget = self.work.settings.generate.max_images
        if budget is None:
            return list(block)
        left = budget - sum(map(self._drawn, used))
        room: list[Group] = []
        for group in block:
            left -= self._drawn(group)
            if left < 0:
                break
            room.append(group)
        return room

    def _drawn(self, group: Group) -> int:
        """Pictures of a group that the model draws; own ones cost the budget nothing."""
        return len(group.variants) - (len(own_members(group)) if self.own else 0)

    def _out_of_time(self) -> bool:
        budget = self.work.settings.generate.max_minutes
        spent = sum(meter.seconds for name, meter in self.meters.items() if name != "filter")
        # Where nothing is drawn, part of a selection would be another selection.
        return budget is not None and spent >= 60 * budget and not self.given

    # ---- one block

    def _make(self, block: Sequence[Group], used: Sequence[Group]) -> list[Group]:
        """Generate and score what a block lacks; returns its groups, from the first, that are ready."""
        if not block:
            return []
        self.work.check_stop()
        fresh = "generate" in self.steps and self._generate(block)
        rows = self._candidates(block)
        if "score" in self.steps:
            if not fresh and "generate" in self.steps and self._drop_damaged(rows):
                self._generate(block)
            rows = self._candidates(block)
            if not self.given:
                self._score(rows, used)
        judged = self.steps & {"score", "filter"} and not self.given
        unfinished = self.scoring.unfinished(rows) if judged else set()
        made = Counter(row.prompt_id for row in rows)
        ready: list[Group] = []
        for group in block:
            name = group.prompt.prompt_id
            if made[name] < len(group.variants) or name in unfinished:
                break
            ready.append(group)
        return ready

    def _candidates(self, groups: Sequence[Group]) -> list[Candidate]:
        wanted = {group.prompt.prompt_id for group in groups}
        return [row for row in self.work.run.manifest.candidates(self.work.keys.generate) if row.prompt_id in wanted]

    def _generate(self, block: Sequence[Group]) -> bool:
        """Make the missing candidates of a block; returns whether any were missing."""
        from craft_fast.candidates import generate

        work = self.work
        if len(self._candidates(block)) == sum(len(group.variants) for group in block):
            return False
        self._announce("generate")
        drawn = list(block)
        if self.own:
            drawn = [part for group in block if (part := drawn_part(group)) is not None]
        with self.meters["generate"].running():
            if self.own:
                bring_in_block(work, block)
            generate(
                work.run,
                work.bench.model(),
                drawn,
                settings=work.settings.generate,
                seed=work.settings.seed,
                key=work.keys.generate,
                progress=work.progress,
                should_stop=lambda: work.should_stop() or (self.recorded is None and self._out_of_time()),
                concessions=work.bench.concessions(),
            )
        work.check_stop()
        return True

    def _score(self, rows: Sequence[Candidate], used: Sequence[Group]) -> None:
        if self.scoring.unfinished(rows):
            self._announce("score")
            with self.meters["score"].running():
                self.scoring.score(rows, self._candidates(used))
            self.work.check_stop()

    def _drop_damaged(self, rows: Sequence[Candidate]) -> bool:
        """Forget groups with a file that is not what was written, so that they are made again before they count."""
        bad = {row.prompt_id for row in rows if not (_intact(self.work.run, row))}
        if bad:
            self.work.progress.warn(f"{len(bad)} groups have damaged or missing files and are made again")
            self.work.run.log("candidates_rebuilt", groups=len(bad))
            self.work.run.manifest.drop_candidates(self.work.keys.generate, sorted(bad))
        return bool(bad)

    def remake(self, prompt_ids: Sequence[str]) -> None:
        """Make the candidates of some groups again, block by block as the first time, so that the bits are the same."""
        bad = set(prompt_ids)
        self.work.run.manifest.drop_candidates(self.work.keys.generate, sorted(bad))
        left = self.recorded.groups if self.recorded else len(self.groups)
        for block in _chunks(self.groups[:left], self.work.settings.filter.block_groups):
            if bad & {group.prompt.prompt_id for group in block}:
                self._generate(block)

    # ---- verdicts

    def _judge(self, used: Sequence[Group], *, final: bool) -> FilterResult:
        rows = self._candidates(used)
        self._announce("filter")
        with self.meters["filter"].running():
            if self.given:
                return given_result(used, rows)
            return self.scoring.judge(used, rows, final=final)

    def _tell(self, used: Sequence[Group], result: FilterResult) -> None:
        if self.given:
            return
        images = sum(len(group.variants) for group in used)
        wanted = self.work.settings.filter.target_samples
        self.work.progress.info(
            f"{images} images of {len(used)} prompts: {result.passing} pass, {wanted} wanted ({rates_in_words(result)})"
        )

    def _finish(self, used: Sequence[Group], decision: Decision) -> FilterResult | None:
        work, manifest = self.work, self.work.run.manifest
        images = sum(len(group.variants) for group in used)
        if not used:
            raise self._nothing(decision)
        result = self._judge(used, final=True) if "filter" in self.steps else None
        counts: dict[str, Any] = {"groups": len(used), "images": images, "reason": _REASONS[decision.reason]}
        counts |= {"own_pictures": images - sum(map(self._drawn, used))} if self.own else {}
        asked = self.scoring.infos()
        infos: dict[str, dict[str, Any]] = {
            "generate": counts,
            "score": {"images": images, "reward_keys": work.keys.rewards, **asked["score"]},
        }
        if self.given:
            infos["score"] |= {"images": 0, "everyone": [], "survivors": [], "weights": "given"}
        if result is not None:
            infos["filter"] = {**counts, **_figures(result, work.settings.filter.target_samples), **asked["filter"]}
        with manifest.transaction():
            if result is not None:
                manifest.put_selections(work.keys.filter, result.selections)
                manifest.set_meta(self._decision_name, json.dumps(asdict(decision)))
            for name in (step for step in self._steps_in_order() if step in infos):
                meter = self.meters[name]
                manifest.finish_stage(name, self.stage_keys[name], meter.seconds, meter.peak_gib, infos[name])
        self.scoring.tell_cut(self._candidates(used))
        if result is not None:
            say_result(work, result, images, decision, given=self.given)
            if self.own and decision.reason == "enough" and (left := len(self.groups) - len(used)):
                work.progress.info(f"{left} more captions of own pictures were not needed; filter.target_samples")
        return result

    def _nothing(self, decision: Decision) -> Exception:
        if decision.reason == "max_images":
            least = self._drawn(self.groups[0]) if self.groups else 1
            return UsageError(
                "The image budget has no room for one group",
                where="generate.max_images",
                why=f"found {self.work.settings.generate.max_images}; one prompt with its variants needs {least}",
            )
        if decision.reason == "max_minutes":
            budget = self.work.settings.generate.max_minutes
            return UsageError(
                "The time budget ended before one group was made", where=f"generate.max_minutes = {budget}"
            )
        missing = "candidates" if "score" in self.steps else "scores"
        before = "generate" if "score" in self.steps else "score"
        return UsageError(f"There are no {missing} yet", hint=f"craft-fast {before} --name {self.work.run.root.name}")

    # ---- what was decided, what it took

    @property
    def _decision_name(self) -> str:
        return f"decision:{self.work.keys.filter}"

    def _read_decision(self) -> Decision | None:
        text = self.work.run.manifest.get_meta(self._decision_name)
        if text is None:
            return None
        decision = Decision(**json.loads(text))
        # Running out of candidates is the end only for a command that may not make more.
        return None if decision.reason == "candidates" and "generate" in self.steps else decision

    def _save_meters(self) -> None:
        manifest = self.work.run.manifest
        with manifest.transaction():
            for name, meter in self.meters.items():
                row = manifest.stage(name)
                if row is not None and row.state == "running":
                    manifest.put_stage(replace(row, seconds=meter.seconds, peak_gib=meter.peak_gib))


def _chunks(groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    return (groups[start : start + size] for start in range(0, len(groups), size))


def _intact(run: Run, row: Candidate) -> bool:
    try:
        return all(sha256_file(run.path(ref.path)) == ref.sha256 for ref in (row.latents, row.image))
    except OSError:
        return False


def _figures(result: FilterResult, wanted: int) -> dict[str, Any]:
    return {
        "accepted": len(result.accepted),
        "wanted": wanted,
        "passing": result.passing,
        "tried": result.tried,
        "acceptance": dict(result.acceptance),
        "asked": dict(result.asked),
        "selection": selection_digest(result.selections),
    }


def say_result(work: Work, result: FilterResult, images: int, decision: Decision, *, given: bool = False) -> None:
    """Say how many were accepted; fewer than wanted comes with rates and what to loosen, unless it was ``given``.

    Raises:
        QualityGateError: not one candidate was accepted.
    """
    found, wanted = len(result.accepted), work.settings.filter.target_samples
    loosen = what_to_loosen(result, work.settings.filter, images)
    if found == 0:
        raise QualityGateError(
            "Not one candidate passed the filter, so there is nothing to train on",
            where=f"filter.rewards = {work.settings.filter.rewards}",
            why=loosen.split(" To get more:")[0],
            hint=loosen.split("To get more: ")[-1],
        )
    if given:
        work.progress.info(f"{found} own pictures, with the weights that came with them")
    elif found < wanted:
        work.progress.warn(f"Fewer samples than wanted, {_REASONS[decision.reason]}: {loosen}")
    else:
        share = result.acceptance.get("all", math.nan)
        work.progress.info(f"{found} samples accepted of {images} images; {share:.0%} of the variants pass")
