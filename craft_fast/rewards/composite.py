"""Score: the rewards of the candidates they are asked about, ``r_m,ij = R_m(x_ij, c_i)`` (design.md section 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from craft_fast.asking import Lazily, answers, cheapest_first, survivors
from craft_fast.config import ScoreSettings
from craft_fast.errors import IntegrityError, Interrupted
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, ScoreRow
from craft_fast.rewards.base import Reward
from craft_fast.rewards.pixels import Pictures, PixelForm
from craft_fast.store.digest import digest_json, sha256_file
from craft_fast.store.run import Run
from craft_fast.store.safe_load import read_image

_KEEP_BYTES = 512 * 1024**2


def score_key(own_key: str, settings: ScoreSettings) -> str:
    """The key under which a reward's scores of candidates are kept: the reward's own, and which text it saw."""
    return digest_json([own_key, settings.prompt])


def score_candidates(
    run: Run,
    candidates: Sequence[Candidate],
    rewards: Sequence[Reward],
    *,
    settings: ScoreSettings,
    progress: Progress | None = None,
    lazily: Lazily | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Score candidates and put the scores into the run's manifest.

    One reward at a time is on the device; pictures are decoded once for all of them, and shaped once for those of equal
    form, as far as memory is cheap. A chunk's scores are one transaction, so a kill costs one chunk of one reward.

    **The same bits.** A score's last bits may depend on the pictures beside it in a batch. Chunks are therefore cut
    from the candidates that a reward is asked about and from the batch size alone, whatever is scored already; a chunk
    in which a picture was never judged is judged as a whole, what it holds of known pictures with it, and replaces
    their values. A chunk of pictures that this reward has all judged before, with the same text and provenance (of
    another candidate, by an evaluation), is not judged: its values are copied. Whether it is one or the other follows
    from the chunks before it, which are recorded in order. Whom a lazy reward is asked about follows from scores
    of rewards that were finished before it began, and their order from blocks that were finished before this one
    (``lazily.rejected``). So a run that was killed anywhere goes on with the very batches of one that was not.

    Args:
        run: the open run.
        candidates: of one block, whole groups; their images are read. Call with the same ones to resume.
        rewards: the judges.
        settings: batch size, and whether the rewards see the base prompt or the expanded one.
        progress: told of images scored, and of scores that came about in another way and are made again.
        lazily: which of the rewards are asked about survivors only; None: none.
        should_stop: asked between chunks.

    Raises:
        IntegrityError: an image is damaged, or not what was written. EnvironmentProblem: it is missing.
        CraftError: a reward failed, or gave a score that is not finite. Interrupted: ``should_stop`` said so.
    """
    block = _Block(run, candidates, settings, progress or Silent(), should_stop, shared=len(rewards) > 1)
    late = {reward.name: reward for reward in rewards if lazily is not None and reward.name in lazily.rewards}
    for reward in rewards:
        if reward.name not in late:
            block.score(reward, candidates)
    if lazily is None:
        return
    asked = [reward for reward in rewards if reward.name in lazily.others]
    costs = {name: late[name].cost() for name in lazily.rewards if name in late}
    for name in cheapest_first(costs, lazily.rejected):
        block.score(late[name], block.left(asked, lazily.keep))
        asked.append(late[name])


class _Block:
    """The candidates of one call, and what is kept of their pictures while it lasts."""

    def __init__(
        self,
        run: Run,
        candidates: Sequence[Candidate],
        settings: ScoreSettings,
        progress: Progress,
        should_stop: Callable[[], bool],
        *,
        shared: bool,
    ) -> None:
        self.run, self.candidates, self.settings = run, candidates, settings
        self.progress, self.should_stop = progress, should_stop
        self.shelf = _Shelf(run, shared=shared)

    def score(self, reward: Reward, rows: Sequence[Candidate]) -> None:
        """Let one reward judge what it has not judged yet, then leave the device to the next."""
        key, size = score_key(reward.key, self.settings), self.settings.batch_size
        manifest, ids = self.run.manifest, [row.candidate_id for row in rows]
        done = set(manifest.scores({reward.name: key}, ids, provenances={reward.name: reward.provenance}))
        self._tell_of_others(reward, key, [name for name in ids if name not in done])
        with self.progress.task(f"score {reward.name}", len(rows), "images") as task:
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                if any(row.candidate_id not in done for row in chunk):
                    if self.should_stop():
                        raise Interrupted("Stopped; everything done so far is saved", hint="the same command continues")
                    self._chunk(reward, key, chunk, done)
                task.advance(len(chunk))
        reward.rest()

    def _chunk(self, reward: Reward, key: str, chunk: Sequence[Candidate], done: set[str]) -> None:
        manifest = self.run.manifest
        texts = [row.base_prompt if self.settings.prompt == "base" else row.prompt for row in chunk]
        judged = {row.candidate_id: (row.image.sha256, text) for row, text in zip(chunk, texts, strict=True)}
        new = [name for name in judged if name not in done]
        known = manifest.judgements(reward.key, reward.provenance, {judged[name] for name in new})
        if all(judged[name] in known for name in new):
            values = {name: known[judged[name]] for name in new}
            manifest.put_scores(self._rows(reward, key, values))
            return
        pictures = _Chunk(self.shelf, chunk)
        score_pictures = getattr(reward, "score_pictures", None)

        def question() -> Tensor:
            if score_pictures is not None:
                scores: Tensor = score_pictures(pictures, texts)
                return scores
            return reward.score(pictures.stacked(), texts)

        values = dict(zip(judged, answers(reward.name, question, texts), strict=True))
        with manifest.transaction():
            manifest.put_scores(self._rows(reward, key, values))
            manifest.put_judgements(reward.key, reward.provenance, {judged[name]: values[name] for name in judged})

    def _rows(self, reward: Reward, key: str, values: dict[str, float]) -> list[ScoreRow]:
        return [ScoreRow(name, reward.name, key, value, reward.provenance) for name, value in values.items()]

    def left(self, asked: Sequence[Reward], keep: str) -> list[Candidate]:
        """The candidates that the next lazy reward is asked about, in the block's order."""
        names = [reward.name for reward in asked]
        scores = self.run.manifest.scores(
            {reward.name: score_key(reward.key, self.settings) for reward in asked},
            [row.candidate_id for row in self.candidates],
            provenances={reward.name: reward.provenance for reward in asked},
        )
        groups: dict[str, list[Candidate]] = {}
        for row in self.candidates:
            groups.setdefault(row.prompt_id, []).append(row)
        left: set[str] = set()
        for rows in groups.values():
            members = sorted(rows, key=lambda row: row.member)
            kept = survivors([scores.get(row.candidate_id, {}) for row in members], names, keep)
            left |= {members[j].candidate_id for j in kept}
        return [row for row in self.candidates if row.candidate_id in left]

    def _tell_of_others(self, reward: Reward, key: str, ids: Sequence[str]) -> None:
        """Warn of scores that came about in another way, if a caller has left any."""
        for found, count in self.run.manifest.provenances({reward.name: key}, ids).get(reward.name, {}).items():
            differs = found.differences(reward.provenance) if found else ["how they came about is not recorded"]
            self.progress.warn(
                f"{count} scores of {reward.name} came about in another way and are made again: {'; '.join(differs)}"
            )


class _Shelf:
    """Pictures of a block, by digest: decoded, and shaped for networks, each up to 512 MiB."""

    def __init__(self, run: Run, *, shared: bool) -> None:
        self.run, self.shared = run, shared
        self._images: dict[str, Tensor] = {}
        self._pixels: dict[tuple[str, PixelForm, str], Tensor] = {}
        self._image_bytes = self._pixel_bytes = 0

    def image(self, row: Candidate) -> Tensor:
        """A decoded picture, uint8 [3, H, W].

        Raises:
            IntegrityError: it is not what was written: a judgement of it would be kept under a wrong digest.
        """
        if row.image.sha256 in self._images:
            return self._images[row.image.sha256]
        path = self.run.path(row.image.path)
        image = read_image(path)
        if sha256_file(path) != row.image.sha256:
            raise IntegrityError(
                "A candidate's picture is not what was written",
                where=str(path),
                why="its sha256 is not the recorded one",
                hint="the same craft-fast run makes it anew",
            )
        if self.shared and self._image_bytes + image.nbytes <= _KEEP_BYTES:
            self._images[row.image.sha256] = image
            self._image_bytes += image.nbytes
        return image

    def pixels(self, rows: Sequence[Candidate], form: PixelForm, device: torch.device) -> Tensor:
        """Pictures in a form, [B, 3, S, S] on the device; what is kept for other rewards is kept on the CPU."""

        def key(row: Candidate) -> tuple[str, PixelForm, str]:
            return row.image.sha256, form, device.type

        missing = [row for row in rows if key(row) not in self._pixels]
        if not missing:
            return torch.stack([self._pixels[key(row)] for row in rows]).to(device)
        made = Pictures(lambda: [self.image(row) for row in missing]).pixels(form, device)
        if self.shared and self._pixel_bytes + made.nbytes <= _KEEP_BYTES:
            self._pixels.update(zip(map(key, missing), made.cpu(), strict=True))
            self._pixel_bytes += made.nbytes
        if len(missing) == len(rows):
            return made
        new = {row.candidate_id: pixels for row, pixels in zip(missing, made, strict=True)}
        return torch.stack(
            [new[row.candidate_id] if row.candidate_id in new else self._pixels[key(row)].to(device) for row in rows]
        )


class _Chunk(Pictures):
    """A chunk's pictures, out of what the block keeps."""

    def __init__(self, shelf: _Shelf, rows: Sequence[Candidate]) -> None:
        super().__init__(lambda: [shelf.image(row) for row in rows])
        self._shelf, self._rows = shelf, rows

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, form: PixelForm, device: torch.device | str = "cpu") -> Tensor:
        """See ``Pictures``; shared with the block's other chunks."""
        return self._shelf.pixels(self._rows, form, torch.device(device))
