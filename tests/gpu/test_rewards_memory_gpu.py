"""Scoring at full size on a GPU: the memory that was planned, the issue's bound, and half precision beside float32."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from craft_bench.rewards.cases import TRAINING
from craft_bench.rewards.compare import compare
from craft_bench.rewards.models import SIZES, Subject, make_pictures, make_prompts, open_subject

pytestmark = pytest.mark.gpu
GIB = 2**30
FULL = SIZES["full"]
# The formula knows no workspaces of libraries, and the allocator rounds up.
MEMORY = 0.08


@pytest.fixture(scope="module", params=TRAINING)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    with open_subject(request.param, FULL, torch.device("cuda")) as made:
        yield made


@pytest.mark.parametrize("batch", [16, 64])
def test_scoring_takes_the_memory_that_was_planned(subject: Subject, batch: int) -> None:
    pictures, prompts = make_pictures(FULL, batch), make_prompts(0, batch)
    with subject.at_work("float16", "sdpa") as judge:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        judge.reward.score(pictures, prompts)
        measured = torch.cuda.max_memory_allocated()
        planned = judge.planned_bytes(batch, FULL)
    assert planned == pytest.approx(measured, rel=MEMORY), (planned / GIB, measured / GIB)
    assert measured <= 2.5 * GIB
    # At rest nothing of it is left on the card but what libraries hold.
    assert torch.cuda.memory_allocated() < 0.15 * GIB


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_the_scores_of_float32(subject: Subject, dtype: str) -> None:
    pictures, prompts = make_pictures(FULL, 8), make_prompts(0, 8)
    exact = subject.score_once("float32", "sdpa", pictures, prompts)
    found = compare(subject.score_once(dtype, "sdpa", pictures, prompts), exact, subject.unit, "ours", dtype)
    assert found.right, found


def test_fewer_pictures_at_once_under_a_budget_give_the_same_scores(subject: Subject) -> None:
    pictures, prompts = make_pictures(FULL, 16), make_prompts(0, 16)
    with subject.at_work("float16", "sdpa") as judge:
        whole = judge.reward.score(pictures, prompts)
        judge.reward.memory_budget = judge.reward.need.weight_bytes + 4 * judge.reward.need.image_bytes
        assert judge.reward.images_at_once(16) == 4
        parts = judge.reward.score(pictures, prompts)
        judge.reward.memory_budget = None
    assert compare(parts, whole, subject.unit, "ours", "float16").right
