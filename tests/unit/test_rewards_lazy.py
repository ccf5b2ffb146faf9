"""Lazy scoring: fewer questions, the same verdicts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast.asking import Lazily, cheapest_first, cut_note, lacking, rejections, survivors, who_is_asked
from craft_fast.config import FilterSettings, RewardSettings, ScoreSettings, TrainSettings
from craft_fast.errors import CraftError, ResourceError
from craft_fast.filtering import FilterResult, filter_candidates, rates_in_words, what_to_loosen
from craft_fast.records import Candidate, FileRef, Group, Prompt, Provenance, Variant
from craft_fast.rewards.composite import score_candidates, score_key
from craft_fast.store.run import Run, open_run

S = ("h", "p", "a")
SETTINGS = ScoreSettings(batch_size=3)
WAY = Provenance("test", "0" * 64)

# ---- who is asked


def asked(
    weights: Mapping[str, float] | None = None,
    *,
    lazy: bool = True,
    weighting: str = "positive",
    select: str = "first",
    rewards: Sequence[str] = S,
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, float]]:
    weights = weights or dict.fromkeys(S, 1.0)
    judges = {name: RewardSettings(kind="clip", path="x", weight=weight) for name, weight in weights.items()}
    judges["judge"] = RewardSettings(kind="clip", path="x", held_out=True)
    found = who_is_asked(
        judges,
        FilterSettings(rewards=list(rewards), select=select),  # type: ignore[arg-type]
        TrainSettings(weighting=weighting),  # type: ignore[arg-type]
        ScoreSettings(lazy=lazy),
    )
    return found.everyone, found.lazy, dict(found.weights)


def test_a_reward_with_a_weight_is_asked_about_everyone() -> None:
    assert asked() == (S, (), {"h": 1.0, "p": 1.0, "a": 1.0})
    assert asked({"h": 1.0, "p": 0.0, "a": 0.0}) == (("h",), ("p", "a"), {"h": 1.0})
    assert asked({"h": 1.0, "p": 0.0, "a": 0.0}, lazy=False) == (S, (), {"h": 1.0})


def test_where_r_total_decides_nothing_the_whole_filter_is_lazy() -> None:
    assert asked(weighting="uniform") == ((), S, {})
    assert asked(weighting="uniform", rewards=["a", "h"]) == (("p",), ("a", "h"), {"p": 1.0})
    assert asked(weighting="uniform", select="top") == (S, (), dict.fromkeys(S, 1.0))


def test_the_cheap_and_the_selective_come_first() -> None:
    assert cheapest_first({"h": 378.0, "p": 378.0, "a": 156.0}, {}) == ["a", "h", "p"]
    assert cheapest_first({"h": 378.0, "p": 378.0, "a": 156.0}, {"p": (9, 10), "a": (1, 10)}) == ["p", "h", "a"]
    # A cost that is not known counts as the dearest: what is known to be cheap comes first.
    assert cheapest_first({"f": 0.0, "p": 378.0, "a": 156.0}, {}) == ["a", "f", "p"]
    assert cheapest_first({"f": 0.0, "g": 0.0}, {"f": (1, 4), "g": (2, 4)}) == ["g", "f"]


def test_rejections_are_counted_over_those_asked() -> None:
    group = [{"h": 1.0, "p": 1.0}, {"h": 2.0, "p": 1.0}, {"h": 1.0}, {}]
    assert rejections([group, group[:2]], ["h", "p", "a"]) == {"h": (1, 3), "p": (2, 2), "a": (0, 0)}


def test_survivors_and_what_a_verdict_waits_for() -> None:
    group = [{"h": 1.0}, {"h": 2.0}, {"h": 1.0}, {"h": 3.0}]
    assert survivors(group, [], "each") == survivors(group, [], "all") == [0, 1, 2, 3]
    assert survivors(group, ["h"], "each") == [0, 1, 3]
    assert survivors(group, ["h"], "all") == []
    assert survivors([{"h": 9.0}, *group[1:]], ["h"], "each") == []
    assert lacking(group, ["h", "p"], "each") == [(0, "p"), (1, "p"), (3, "p")]
    assert lacking(group, ["h", "p"], "all") == []
    group = [row | {"p": float(j)} for j, row in enumerate(group[:2])] + group[2:]
    assert lacking(group, ["h", "p"], "each") == [(3, "p")]


def test_a_group_that_was_half_asked_is_not_decided() -> None:
    # Under keep=all one failure is enough for the verdict; a resumed run must ask on all the same.
    group = [{"h": 1.0}, {"h": 0.0}, {}]
    assert lacking(group, ["h"], "all") == [(2, "h")]
    assert lacking([*group[:2], {"h": 2.0}], ["h", "p"], "all") == []


def test_prompts_that_were_cut_are_counted_among_those_asked() -> None:
    cut = {"one": 3, "two": 1, "of another stage": 2}
    assert cut_note("h", cut, ["one", "two", "three", "one"]).startswith("h: 2 prompts are longer than it reads")
    assert cut_note("h", {}, ["one"]) == ""


# ---- the stage


class Told:
    """Says what it was told to of each picture, which holds its own number; keeps who it was asked about."""

    def __init__(self, name: str, values: Sequence[float], cost: float = 1.0) -> None:
        self.name, self.held_out, self.key, self.provenance = name, False, name, WAY
        self.values, self.gflop = values, cost
        self.seen: list[int] = []
        self.left: int | None = None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        numbers = [int(image[0, 0, 0]) for image in images]
        self.seen += numbers
        return torch.tensor([self.values[number] for number in numbers])

    def cost(self) -> float:
        return self.gflop

    def memory_bytes(self, images: int) -> int:
        return 0

    def rest(self) -> None:
        return None

    def close(self) -> None:
        return None


MEMBERS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, list[Group], list[Candidate]]]:
    """Six groups of four members, and their pictures."""
    with open_run(tmp_path_factory.mktemp("lazy") / "run", create=True) as run:
        run.path("candidates").mkdir()
        groups, rows = [], []
        for g in range(6):
            variants = tuple(Variant(f"g{g}", j, f"prompt {g}" + ", sharp" * (j > 0)) for j in range(MEMBERS))
            groups.append(Group(Prompt(f"g{g}", f"prompt {g}"), variants))
            for variant in variants:
                number = len(rows)
                path = run.path("candidates", f"{number}.png")
                Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(path)
                ref: FileRef = run.ref(path)
                texts = (f"prompt {g}", variant.text)
                rows.append(Candidate(f"c{number}", f"g{g}", variant.member, *texts, 0, ref, ref))
        yield run, groups, rows


@pytest.fixture
def world(made: tuple[Run, list[Group], list[Candidate]]) -> tuple[Run, list[Group], list[Candidate]]:
    with made[0].manifest.transaction():
        for table in ("scores", "judgements"):
            made[0].manifest._db.execute(f"DELETE FROM {table}")
    return made


def ask(run: Run, rows: Sequence[Candidate], judges: Sequence[Told], lazy: Sequence[str], keep: str) -> None:
    """Two blocks, as the stream does it: what is rejected in the first decides the order in the second."""
    others = tuple(name for name in S if name not in lazy)
    for start in (0, 12):
        known = scores(run, judges)
        groups = [[known.get(f"c{i + j}", {}) for j in range(MEMBERS)] for i in range(0, start, MEMBERS)]
        score_candidates(
            run,
            rows[start : start + 12],
            judges,
            settings=SETTINGS,
            lazily=Lazily(tuple(lazy), others, keep, rejections(groups, lazy)),
        )


def scores(run: Run, judges: Sequence[Told]) -> dict[str, dict[str, float]]:
    return run.manifest.scores({judge.name: score_key(judge.key, SETTINGS) for judge in judges})


def judge(
    groups: Sequence[Group],
    rows: Sequence[Candidate],
    found: Mapping[str, Mapping[str, float]],
    lazy: Sequence[str],
    keep: str,
) -> FilterResult:
    settings = FilterSettings(rewards=list(S), keep=keep, target_samples=5)  # type: ignore[arg-type]
    weights = {name: 1.0 for name in S if name not in lazy}
    return filter_candidates(groups, rows, found, settings, weights, True, lazy=lazy)


LAZY = [("h", "p", "a"), ("p", "a"), ("a",)]
CASES = list(itertools.product(LAZY, ("each", "all"), range(6)))


@pytest.mark.parametrize(("lazy", "keep", "seed"), CASES)
def test_verdicts_are_those_of_asking_everyone(
    lazy: Sequence[str], keep: str, seed: int, world: tuple[Run, list[Group], list[Candidate]]
) -> None:
    run, groups, rows = world
    draw = random.Random(seed)
    # Of few values, so that ties are many; a high chance to pass, so that whole groups do.
    values = {
        name: [float(draw.choice([0, 0, 1]) if i % MEMBERS == 0 else draw.choice([0, 1, 1, 2])) for i in range(24)]
        for name in S
    }
    judges = [Told(name, values[name], draw.choice([0.0, 1.0, 5.0])) for name in S]
    ask(run, rows, judges, lazy, keep)
    everyone = {row.candidate_id: {name: values[name][i] for name in S} for i, row in enumerate(rows)}
    full = judge(groups, rows, everyone, lazy, keep)
    found = judge(groups, rows, scores(run, judges), lazy, keep)
    assert found.accepted == full.accepted
    assert (found.passing, found.tried, found.done) == (full.passing, full.tried, full.done)
    assert [(row.accepted, row.r_total, row.advantage) for row in found.selections] == [
        (row.accepted, row.r_total, row.advantage) for row in full.selections
    ]
    assert all(
        row.passed.items() <= whole.passed.items() for row, whole in zip(found.selections, full.selections, strict=True)
    )
    number = sum(len(judge.seen) for judge in judges)
    assert number == sum(len(row) for row in scores(run, judges).values())
    assert number <= 72
    for name in set(S) - set(lazy):
        assert len(next(judge for judge in judges if judge.name == name).seen) == 24


def test_rejected_variants_and_lost_groups_are_not_asked_about(
    world: tuple[Run, list[Group], list[Candidate]],
) -> None:
    run, _, rows = world
    # Group 0: member 1 passes h. Group 1: nobody does. The others: all do.
    h = [5.0, 6.0, 5.0, 0.0] + [5.0, 1.0, 2.0, 5.0] + [0.0, 1.0, 1.0, 1.0] * 4
    judges = [Told("h", h, 1.0), Told("p", [0.0] * 24, 1.2), Told("a", [0.0] * 24, 3.0)]
    ask(run, rows, judges, S, "each")
    assert judges[1].seen == [0, 1, 8, 9, 10, 11, *range(12, 24)]
    # In the first block p rejected everyone, h little: p comes first in the second block, and h is not asked at all.
    assert judges[0].seen == [*range(12)]
    assert judges[2].seen == []


def test_under_keep_all_a_group_that_failed_once_is_left_out(
    world: tuple[Run, list[Group], list[Candidate]],
) -> None:
    run, groups, rows = world
    h = [0.0, 1.0, 1.0, 0.0] + [0.0, 1.0, 1.0, 1.0] * 5
    judges = [Told("h", h, 1.0), Told("p", [0.0, 1.0, 1.0, 1.0] * 6, 50.0), Told("a", [0.0, 1.0, 1.0, 1.0] * 6, 99.0)]
    ask(run, rows, judges, S, "all")
    assert judges[1].seen == judges[2].seen == [*range(4, 24)]
    result = judge(groups, rows, scores(run, judges), S, "all")
    assert result.asked == {"h": 18, "p": 15, "a": 15}
    assert result.acceptance == {"h": 17 / 18, "p": 1.0, "a": 1.0, "all": 15 / 18}
    assert rates_in_words(result) == "h 94%, p 100% of 15 asked, a 100% of 15 asked, all 83%"
    settings = FilterSettings(rewards=list(S), keep="all", target_samples=100)
    assert "drops h, the strictest" in what_to_loosen(result, settings, 24)


@pytest.mark.parametrize("keep", ["each", "all"])
@pytest.mark.parametrize(("name", "calls"), [("h", 1), ("h", 5), ("p", 0), ("p", 2), ("p", 3), ("a", 0), ("a", 1)])
def test_a_killed_run_asks_the_very_same(
    name: str, calls: int, keep: str, world: tuple[Run, list[Group], list[Candidate]]
) -> None:
    run, _, rows = world
    draw = random.Random(3)
    values = {n: [float(draw.random() < 0.9) if i % MEMBERS else 0.0 for i in range(24)] for n in S}

    def judges() -> list[Told]:
        return [Told("h", values["h"], 1.0), Told("p", values["p"], 2.0), Told("a", values["a"], 2.5)]

    def rows_of_tables() -> list[list[tuple[object, ...]]]:
        return [run.manifest._all(f"SELECT * FROM {table}") for table in ("scores", "judgements")]

    whole = judges()
    ask(run, rows, whole, S, keep)
    undisturbed = rows_of_tables()
    with run.manifest.transaction():
        for table in ("scores", "judgements"):
            run.manifest._db.execute(f"DELETE FROM {table}")
    killed = judges()
    killed[S.index(name)].left = calls
    with pytest.raises(KeyboardInterrupt):
        ask(run, rows, killed, S, keep)
    after = judges()
    ask(run, rows, after, S, keep)
    assert rows_of_tables() == undisturbed
    for one, two, all_of_it in zip(killed, after, whole, strict=True):
        assert one.seen + two.seen == all_of_it.seen


def test_a_score_that_the_verdict_needs_is_missed(world: tuple[Run, list[Group], list[Candidate]]) -> None:
    _, groups, rows = world
    found = {row.candidate_id: {"h": float(row.member), "p": float(row.member)} for row in rows}
    with pytest.raises(CraftError, match="missing") as caught:
        judge(groups, rows, found, ("a",), "each")
    assert "reward a, candidate c0" in caught.value.where
    assert "craft-fast score" in caught.value.hint
    rejected = {key: {"h": 0.0, "p": 0.0} for key in found}
    assert judge(groups, rows, rejected, ("a",), "each").accepted == ()
    with pytest.raises(CraftError, match="missing"):
        judge(groups, rows, rejected, (), "each")


def test_memory_that_ran_out_is_a_resource_error(world: tuple[Run, list[Group], list[Candidate]]) -> None:
    run, _, rows = world

    class Large(Told):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(ResourceError) as caught:
        score_candidates(run, rows, [Large("h", [])], settings=SETTINGS)
    assert "score.batch_size" in caught.value.hint
