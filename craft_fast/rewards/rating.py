"""Rate any pictures with any rewards: ``r_m = R_m(x, c)``, outside a run (``craft-fast rewards score``).

Rewards come one after another, so that one is on the device at a time; pictures come in batches, and every finished
batch goes into the user's score memory. Batches are cut from the whole list of pairs, whatever is known already, so a
command that was killed and typed again gives the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from craft_fast.errors import CraftError, EnvironmentProblem, Interrupted, ResourceError
from craft_fast.picture_folders import Picture
from craft_fast.progress import Progress, Silent
from craft_fast.prompt_lines import excerpt
from craft_fast.records import Provenance
from craft_fast.rewards.base import Reward
from craft_fast.rewards.memory import Judgement, Pair, ScoreMemory, reward_digest
from craft_fast.rewards.pixels import Pictures, PixelForm
from craft_fast.rewards.rating_pictures import Darkroom, File, hash_picture, one_of

_TOLD_AT_ONCE = 64  # pictures hashed: some microseconds each
# Of decoded pictures that wait for a reward that looks at whole pictures of one size.
_WAITING_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that got no score, and the reason."""

    image: str
    why: str


@dataclass(frozen=True, slots=True)
class Judge:
    """What a reward's scores are shown with."""

    name: str
    held_out: bool
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One score: a picture, a text, a reward."""

    picture: Picture
    sha256: str
    prompt: str
    judge: Judge
    judgement: Judgement


@dataclass(slots=True)
class Rating:
    """What rating led to.

    Attributes:
        rows: by picture, text and reward, each in the order given.
        failures: pictures without scores.
        known: scores that were known before. made: scores that were worked out now.
        decoded: how often a picture was decoded.
    """

    judges: list[Judge] = field(default_factory=list)
    rows: list[ScoredRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    known: int = 0
    made: int = 0
    decoded: int = 0


def rate(
    pictures: Sequence[Picture],
    rewards: Sequence[Reward],
    *,
    memory: ScoreMemory,
    batch_size: int = 64,
    blind: Collection[str] = (),
    fresh: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    stages_before: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Rating:
    """Judge pictures against their texts with every reward.

    Args:
        pictures: with their texts; the same content under two names is judged once.
        rewards: the judges, not resident: each is read by its first batch and rests after its last.
        memory: of scores; asked before, told after every batch.
        batch_size: pairs of picture and text scored together at most.
        blind: names of rewards that look at no text.
        fresh: do not ask the memory.
        strict: the first picture that cannot be read is an error.
        progress: told of pictures hashed and scores made.
        stages_before: stages that the caller has told it of.
        should_stop: asked between batches.

    Raises:
        CraftError: a reward failed or gave a score that is not a number; what was done is in the memory. With
            ``strict``, also what is wrong with a picture. ``Interrupted``: asked to stop.
    """
    work = _Work(pictures, memory, batch_size, strict, progress or Silent(), should_stop)
    try:
        stages = stages_before + 1 + len(rewards)
        work.progress.stage("pictures", stages_before + 1, stages)
        work.hash()
        tasks = [work.task(reward, reward.name in blind, fresh) for reward in rewards]
        for at, task in enumerate(tasks):
            work.progress.stage(task.reward.name, stages_before + 2 + at, stages)
            work.judge_all(task, tasks[at + 1 :])
            task.reward.rest()
        return work.result(rewards, blind)
    finally:
        work.darkroom.close()


@dataclass(slots=True)
class _Task:
    """One reward with all that it has to judge; ``scores`` grows from what is known to all of ``pairs``."""

    reward: Reward
    digest: str
    pairs: list[Pair]
    known: dict[Pair, Judgement]
    scores: dict[Pair, Judgement]


class _Work:
    """One call of ``rate``."""

    def __init__(
        self, pictures: Sequence[Picture], memory: ScoreMemory, batch_size: int, strict: bool, progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.pictures = pictures
        self.memory = memory
        self.batch_size = batch_size
        self.strict = strict
        self.progress = progress
        self.should_stop = should_stop
        self.files: dict[str, File] = {}
        self.hashes: dict[int, str] = {}
        self.failed: dict[str, CraftError] = {}
        self.unread: dict[int, CraftError] = {}
        self.scores: dict[str, dict[Pair, Judgement]] = {}
        self.darkroom = Darkroom(self.files)
        self.rating = Rating()

    # ---- pictures

    def hash(self) -> None:
        """Find out what each picture's content is."""
        with self.progress.task("pictures", len(self.pictures), "images") as task:
            for at, picture in enumerate(self.pictures):
                self._stop_if_asked()
                try:
                    file = hash_picture(picture.path)
                except CraftError as error:
                    if self.strict:
                        raise
                    self.unread[at] = error
                else:
                    self.hashes[at] = file.sha256
                    self.files.setdefault(file.sha256, file)
                if (at + 1) % _TOLD_AT_ONCE == 0 or at + 1 == len(self.pictures):
                    task.advance(at % _TOLD_AT_ONCE + 1)

    def task(self, reward: Reward, blind: bool, fresh: bool) -> _Task:
        """What a reward has to judge: every picture that can be read with each of its texts, once."""
        pairs = list(
            dict.fromkeys(
                (sha, "" if blind else text) for at, sha in self.hashes.items() for text in self.pictures[at].prompts
            )
        )
        digest = reward_digest(reward.key, reward.provenance)
        known = {} if fresh else self.memory.known(digest, pairs)
        self.rating.known += len(known)
        return _Task(reward, digest, pairs, known, dict(known))

    def name(self, sha: str) -> str:
        """The first picture of this content."""
        return next(self.pictures[at].name for at, found in self.hashes.items() if found == sha)

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise Interrupted("Stopped; every finished batch is kept", hint="the same command continues")

    def _refuse(self, failed: dict[str, CraftError]) -> None:
        for sha, error in failed.items():
            if self.strict:
                raise error
            self.failed[sha] = error

    # ---- one reward

    def judge_all(self, task: _Task, later: Sequence[_Task]) -> None:
        """Every pair that is not known yet, batch by batch."""
        reward, name = task.reward, task.reward.name
        self.scores[name] = task.scores
        unit = "images" if len(task.pairs) == len({sha for sha, _ in task.pairs}) else "scores"
        forms: dict[PixelForm, set[str]] = {}
        for other in later:
            if (form := _form(other.reward)) is not None:
                forms.setdefault(form, set()).update(sha for sha, text in other.pairs if (sha, text) not in other.known)
        self.darkroom.keep_only({*forms, *filter(None, [_form(reward)])})
        with self.progress.task(name, len(task.pairs), unit) as told:
            if task.known:
                told.advance(len(task.known))
            for batch, pictures in self._batches(reward, _cut(task.pairs, task.known, self.batch_size), forms):
                for part, found in _judge(reward, batch, pictures, self.name):
                    judged = self._judged(reward, part, found)
                    self.memory.put(task.digest, judged)
                    task.scores |= judged
                    self.rating.made += len(judged)
                    told.advance(len(judged))

    def _batches(
        self, reward: Reward, batches: Iterable[list[Pair]], forms: dict[PixelForm, set[str]]
    ) -> Iterator[tuple[list[Pair], Pictures]]:
        """Pairs with their pictures; those whose picture cannot be read are noted and left out."""
        form = _form(reward)
        if form is None:
            yield from self._of_one_size(batches)
            return
        for batch in self.darkroom.batches(self._while_wanted(batches), form, forms):
            self._refuse(batch.failed)
            if batch.pairs:
                yield batch.pairs, batch.pictures

    def _while_wanted(self, batches: Iterable[list[Pair]]) -> Iterator[list[Pair]]:
        """Each batch as it comes, without pictures that an earlier reward found broken, until asked to stop."""
        for batch in batches:
            self._stop_if_asked()
            if left := [pair for pair in batch if pair[0] not in self.failed]:
                yield left

    def _of_one_size(self, batches: Iterable[list[Pair]]) -> Iterator[tuple[list[Pair], Pictures]]:
        """For rewards that take one tensor of whole pictures: a batch in groups of equal size."""
        for batch in self._while_wanted(batches):
            texts: dict[str, list[str]] = {}
            for sha, text in batch:
                texts.setdefault(sha, []).append(text)
            groups: dict[torch.Size, list[tuple[Pair, Tensor]]] = {}
            for sha, image in self.darkroom.images(list(texts)):
                if isinstance(image, CraftError):
                    self._refuse({sha: image})
                    continue
                group = groups.setdefault(image.shape, [])
                group += [((sha, text), image) for text in texts[sha]]
                if sum(len(group) * size.numel() for size, group in groups.items()) > _WAITING_BYTES:
                    yield _group(groups.pop(max(groups, key=lambda size: len(groups[size]) * size.numel())))
            for group in groups.values():
                yield _group(group)

    def _judged(self, reward: Reward, pairs: Sequence[Pair], scores: Sequence[float]) -> dict[Pair, Judgement]:
        cut: Mapping[str, int] = getattr(reward, "cut", {})
        prefix = getattr(getattr(reward, "spec", None), "prefix", "")  # which a network reads before the text
        return {
            (sha, text): Judgement(score, int(cut.get(prefix + text, 0)), *self.darkroom.sizes[sha])
            for (sha, text), score in zip(pairs, scores, strict=True)
        }

    # ---- the end

    def result(self, rewards: Sequence[Reward], blind: Collection[str]) -> Rating:
        """Rows of all pictures that every reward has judged, and the others with their reasons."""
        rating = self.rating
        rating.decoded = self.darkroom.decoded
        rating.judges = [Judge(reward.name, reward.held_out, reward.provenance) for reward in rewards]
        for at, picture in enumerate(self.pictures):
            error = self.unread.get(at) or self.failed.get(self.hashes[at])
            if error is not None:
                what = error.what.rstrip(".")
                rating.failures.append(Failure(picture.name, f"{what}: {error.why}" if error.why else what))
                continue
            sha = self.hashes[at]
            for text in picture.prompts:
                for judge in rating.judges:
                    judgement = self.scores[judge.name][sha, "" if judge.name in blind else text]
                    rating.rows.append(ScoredRow(picture, sha, text, judge, judgement))
        return rating


def _form(reward: Reward) -> PixelForm | None:
    """The form a reward takes pictures in; None for one that takes whole pictures of one size."""
    form: PixelForm | None = getattr(reward, "pixel_form", None)
    return form if hasattr(reward, "score_pictures") else None


def _cut(pairs: Sequence[Pair], known: Collection[Pair], size: int) -> Iterator[list[Pair]]:
    """Batches of what is not known: the same ones as if nothing were, and what is left of the others together."""
    left: list[Pair] = []
    for start in range(0, len(pairs), size):
        batch = list(pairs[start : start + size])
        new = [pair for pair in batch if pair not in known]
        if len(new) == len(batch):
            yield batch
        else:
            left += new
    for start in range(0, len(left), size):
        yield left[start : start + size]


def _group(group: list[tuple[Pair, Tensor]]) -> tuple[list[Pair], Pictures]:
    return [pair for pair, _ in group], Pictures.of([image for _, image in group])


def _judge(
    reward: Reward, batch: list[Pair], pictures: Pictures, name: Callable[[str], str]
) -> Iterator[tuple[list[Pair], list[float]]]:
    """Scores of a batch; when the reward fails at it, of one picture after the other up to the one it fails at."""
    try:
        yield batch, _scores(reward, batch, pictures)
        return
    except (ResourceError, EnvironmentProblem, Interrupted):
        raise
    except CraftError as error:
        if len(batch) == 1:
            raise _about(error, reward, name(batch[0][0])) from error
    # Out of the except block: what it holds keeps the failed call's tensors alive.
    for at, pair in enumerate(batch):
        yield from _judge(reward, [pair], one_of(pictures, at), name)


def _scores(reward: Reward, batch: list[Pair], pictures: Pictures) -> list[float]:
    texts = [text for _, text in batch]
    scorer: Any = reward
    try:
        found: Tensor = (
            scorer.score_pictures(pictures, texts)
            if _form(reward) is not None
            else scorer.score(pictures.stacked(), texts)
        )
    except (CraftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a plug-in raises
        why = f"{type(error).__name__}: {error}"
        raise CraftError("A reward failed.", where=f"reward {reward.name}", why=why) from error
    if tuple(found.shape) != (len(batch),):
        why = f"{len(batch)} are wanted, it gave a shape of {tuple(found.shape)}"
        raise CraftError("A reward gave the wrong number of scores.", where=f"reward {reward.name}", why=why)
    if not bool(torch.isfinite(found).all()):
        raise CraftError("A reward gave a score that is not a number.", where=f"reward {reward.name}")
    scores: list[float] = found.float().tolist()
    return scores


def _about(error: CraftError, reward: Reward, picture: str) -> CraftError:
    """The same error, naming the reward and the picture and what is kept."""
    parts = [error.where or f"reward {reward.name}", f"picture {excerpt(picture, 200)}"]
    if reward.name not in parts[0]:
        parts.insert(0, f"reward {reward.name}")
    told = type(error)(error.what, where=", ".join(parts), why=error.why, hint=error.hint)
    kept = "what was scored before is kept, and the same command continues"
    told.hint = f"{told.hint}; {kept}" if told.hint else kept
    return told
