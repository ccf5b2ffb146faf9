"""Score: every reward of every candidate, ``r_m,ij = R_m(x_ij, c_i)`` (design.md section 1, item 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from craft_fast.config import ScoreSettings
from craft_fast.progress import Progress, Silent
from craft_fast.records import Candidate, ScoreRow
from craft_fast.rewards.base import Reward
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run
from craft_fast.store.safe_load import read_image


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
) -> None:
    """Score candidates with each reward and put the scores into the run's manifest.

    Chunks are cut from ``candidates`` and the batch size alone, whatever is scored already, and an incomplete chunk
    is scored as a whole: a resumed run gets bit-identical scores. One reward is on the device at a time.

    Args:
        run: the open run.
        candidates: their images are read; call with the same ones to resume.
        rewards: the judges.
        settings: batch size, and whether the rewards see the base prompt or the expanded one.
        progress: told of images scored.

    Raises:
        IntegrityError: an image is damaged. CraftError: a reward failed or gave a score that is not finite.
    """
    progress = progress or Silent()
    ids = [row.candidate_id for row in candidates]
    for reward in rewards:
        key = score_key(reward.key, settings)
        done = run.manifest.scores({reward.name: key}, ids)
        with progress.task(f"score {reward.name}", len(candidates), "images") as task:
            for start in range(0, len(candidates), settings.batch_size):
                chunk = candidates[start : start + settings.batch_size]
                if not all(row.candidate_id in done for row in chunk):
                    values = _score_chunk(run, chunk, reward, settings.prompt)
                    run.manifest.put_scores(
                        [ScoreRow(r.candidate_id, reward.name, key, v) for r, v in zip(chunk, values, strict=True)]
                    )
                task.advance(len(chunk))
        reward.rest()


def _score_chunk(run: Run, chunk: Sequence[Candidate], reward: Reward, prompt: str) -> list[float]:
    images = torch.stack([read_image(run.path(row.image.path)) for row in chunk])
    texts = [row.base_prompt if prompt == "base" else row.prompt for row in chunk]
    values: list[float] = reward.score(images, texts).tolist()
    return values
