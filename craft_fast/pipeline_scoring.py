"""The stream's score stage: which scores are there, which are enough for verdicts, and which must be made (again)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from craft_fast.asking import Lazily, cut_note, lacking, rejections, who_is_asked
from craft_fast.filtering import FilterResult, filter_candidates
from craft_fast.records import Candidate, Group, Provenance

if TYPE_CHECKING:
    from craft_fast.pipeline_stream import Work
    from craft_fast.rewards.base import Reward

Rows = Sequence[Candidate]


class RenewedError(Exception):
    """Scores that came about in another way were dropped; blocks that were ready may not be any more."""


class Scoring:
    """Scores of one run's candidates.

    Scores of one reward are compared with one another, so all must have come about in the same way. Those of a run
    that has moved (to a GPU, to another library) are used as they are while none is missing; once one must be made,
    those that came about otherwise are dropped, and made again the same way. The judgements they were made of stay.

    Args:
        work: see ``Work``.
    """

    def __init__(self, work: Work) -> None:
        settings = work.settings
        self.work = work
        self.asked = who_is_asked(settings.rewards, settings.filter, settings.train, settings.score)
        self.filter = settings.filter
        self._used: dict[str, Reward] = {}

    def scores(self, rows: Rows) -> dict[str, dict[str, float]]:
        """r_m by candidate, as far as they are there."""
        return self.work.run.manifest.scores(self.work.keys.rewards, [row.candidate_id for row in rows])

    def unfinished(self, rows: Rows) -> set[str]:
        """Ids of the prompts whose groups are not scored far enough for their verdicts."""
        scores = self.scores(rows)
        everyone = set(self.asked.everyone)
        found = {row.prompt_id for row in rows if everyone - scores.get(row.candidate_id, {}).keys()}
        if not self.asked.lazy:
            return found
        for members in _groups(rows):
            values = [scores.get(row.candidate_id, {}) for row in members]
            if lacking(values, self.filter.rewards, self.filter.keep):
                found.add(members[0].prompt_id)
        return found

    def score(self, rows: Rows, before: Rows) -> None:
        """Make the scores that a block lacks.

        Args:
            rows: the block's candidates, whole groups.
            before: those of earlier blocks; what lazy rewards rejected there decides in which order they are asked.

        Raises:
            RenewedError: scores of earlier blocks were dropped, so the stream must begin again.
        """
        from craft_fast.rewards.composite import score_candidates

        work = self.work
        rewards = work.bench.rewards(held_out=False, progress=work.progress)
        if self._renew({reward.name: reward.provenance for reward in rewards}):
            raise RenewedError
        self._used = {reward.name: reward for reward in rewards}
        known = self.scores(before) if self.asked.lazy else {}
        earlier = [[known.get(row.candidate_id, {}) for row in members] for members in _groups(before)]
        others = tuple(name for name in self.filter.rewards if name in self.asked.everyone)
        score_candidates(
            work.run,
            rows,
            rewards,
            settings=work.settings.score,
            progress=work.progress,
            lazily=Lazily(self.asked.lazy, others, self.filter.keep, rejections(earlier, self.asked.lazy)),
            should_stop=work.should_stop,
        )

    # ---- scores that came about otherwise

    def settle(self) -> None:
        """Where scores of one reward came about in several ways, keep those that would be made now, drop the others."""
        found = self._provenances()
        mixed = [name for name, counts in found.items() if len(counts) > 1]
        if mixed:
            self._renew({name: self._current(name) for name in mixed})

    def _provenances(self) -> dict[str, dict[Provenance | None, int]]:
        return self.work.run.manifest.provenances(self.work.keys.rewards, self._ids())

    def _ids(self) -> list[str]:
        return [row.candidate_id for row in self.work.run.manifest.candidates(self.work.keys.generate)]

    def _current(self, name: str) -> Provenance:
        from craft_fast.rewards.registry import reward_provenance
        from craft_fast.sdxl.load import pick_device

        settings = self.work.settings
        device, offline = pick_device(settings.model.device), settings.model.offline
        return reward_provenance(name, settings.rewards[name], device, offline=offline, dtype=settings.score.dtype)

    def _renew(self, current: Mapping[str, Provenance]) -> bool:
        """Drop scores that came about in another way than now, with one warning; returns whether there were any."""
        found = self._provenances()
        differing: dict[str, list[str]] = {}
        number = 0
        for name, now in current.items():
            for way, count in found.get(name, {}).items():
                if way != now:
                    what = "; ".join(way.differences(now)) if way else "how they came about is not recorded"
                    differing.setdefault(what, []).append(name)
                    number += count
        if not number:
            return False
        said = ". ".join(f"{', '.join(names)}: {what}" for what, names in differing.items())
        self.work.progress.warn(
            f"{number} scores came about in another way than they would now, and are made again. {said}"
        )
        self.work.run.log("scores_renewed", scores=number, differences=list(differing))
        manifest = self.work.run.manifest
        ways = manifest.scored_by(self.work.keys.rewards, self._ids())
        with manifest.transaction():
            for name, now in current.items():
                stale = [row for row, known in ways.items() if name in known and known[name] != now]
                manifest.drop_scores(name, self.work.keys.rewards[name], stale)
        return True

    # ---- what is made of them

    def judge(self, groups: Sequence[Group], rows: Rows, *, final: bool) -> FilterResult:
        """The filter's verdicts on what is scored.

        Raises:
            IntegrityError: scores of one reward came about in different ways.
        """
        names = [row.candidate_id for row in rows]
        return filter_candidates(
            groups,
            rows,
            self.scores(rows),
            self.filter,
            self.asked.weights,
            final,
            lazy=self.asked.lazy,
            scored_by=self.work.run.manifest.scored_by(self.work.keys.rewards, names),
        )

    def infos(self) -> dict[str, dict[str, Any]]:
        """What the rows of the stages score and filter say of who was asked."""
        return {
            "score": {"everyone": list(self.asked.everyone), "survivors": list(self.asked.lazy)},
            "filter": {"r_total": dict(self.asked.weights)},
        }

    def tell_cut(self, rows: Rows) -> None:
        """Warn once of each reward that did not read prompts to their end."""
        expanded = self.work.settings.score.prompt == "expanded"
        texts = {row.prompt if expanded else row.base_prompt for row in rows}
        for name, reward in self._used.items():
            if note := cut_note(name, getattr(reward, "cut", ()), texts):
                self.work.progress.warn(note)


def _groups(rows: Iterable[Candidate]) -> list[list[Candidate]]:
    """Candidates by group, each in the order of its members."""
    found: dict[str, list[Candidate]] = {}
    for row in rows:
        found.setdefault(row.prompt_id, []).append(row)
    return [sorted(members, key=lambda row: row.member) for members in found.values()]
