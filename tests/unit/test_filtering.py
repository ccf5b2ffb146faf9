"""Composite reward filter: design.md section 1, items 2 to 5, on cases computed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from craft_fast.config import FilterSettings, TrainSettings
from craft_fast.errors import CraftError
from craft_fast.filtering import (
    EPSILON,
    FilterResult,
    advantages,
    filter_candidates,
    indicator,
    r_total,
    sample_weights,
    select,
    training_samples,
    what_to_loosen,
)
from craft_fast.records import Candidate, FileRef, Group, Prompt, Variant

WEIGHTS = {"h": 1.0, "p": 1.0}
REF = FileRef("x", "0" * 64, 1)


def world(
    rows: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[Group], list[Candidate], dict[str, dict[str, float]]]:
    """Groups with members of the given (h, p) scores."""
    groups, candidates, scores = [], [], {}
    for i, members in enumerate(rows):
        pid = f"g{i}"
        prompt = Prompt(pid, f"prompt {i}")
        variants = tuple(
            Variant(pid, j, prompt.text if j == 0 else f"{prompt.text}, v{j}") for j in range(len(members))
        )
        groups.append(Group(prompt, variants))
        for variant, (h, p) in zip(variants, members, strict=True):
            key = f"{pid}-{variant.member}"
            candidates.append(Candidate(key, pid, variant.member, prompt.text, variant.text, 0, REF, REF))
            scores[key] = {"h": h, "p": p, "oracle": 9.0}
    return groups, candidates, scores


def judge(
    rows: Sequence[Sequence[tuple[float, float]]],
    weights: Mapping[str, float] = WEIGHTS,
    *,
    final: bool = True,
    **changes: object,
) -> FilterResult:
    settings = FilterSettings(**{"rewards": ["h", "p"], **changes})  # type: ignore[arg-type]
    groups, candidates, scores = world(rows)
    return filter_candidates(groups, candidates, scores, settings, weights, final)


# ---- the equations


def test_a_variant_must_beat_member_0_and_a_tie_does_not_pass() -> None:
    assert indicator({"h": 2.0, "p": 1.0}, {"h": 1.0, "p": 1.0}, ["h", "p"]) == {"h": True, "p": False}
    assert indicator({"h": 2.0}, {"h": 1.0}, []) == {}


def test_r_total_is_the_weighted_sum_of_z_scores() -> None:
    scores = {"x": {"h": 1.0, "p": 10.0}, "y": {"h": 3.0, "p": 10.0}, "z": {"h": 5.0, "p": 40.0}}
    # h: mean 3, std sqrt(8/3); p: mean 20, std sqrt(200)
    found = r_total(scores, {"h": 1.0, "p": 2.0})
    assert found["x"] == pytest.approx(-2 / math.sqrt(8 / 3) + 2 * -10 / math.sqrt(200))
    assert found["y"] == pytest.approx(2 * -10 / math.sqrt(200))
    assert found["z"] == pytest.approx(2 / math.sqrt(8 / 3) + 2 * 20 / math.sqrt(200))


def test_a_reward_without_spread_adds_nothing() -> None:
    assert r_total({"x": {"h": 0.3}, "y": {"h": 0.3}, "z": {"h": 0.3}}, {"h": 1.0}) == {"x": 0.0, "y": 0.0, "z": 0.0}


def test_advantages_are_over_all_members_with_population_std() -> None:
    found = advantages([0.0, 1.0, 2.0, 5.0])
    std = math.sqrt((4 + 1 + 0 + 9) / 4)
    assert found == pytest.approx([(v - 2.0) / (std + EPSILON) for v in (0.0, 1.0, 2.0, 5.0)])


def test_with_one_variant_the_advantage_is_one_whatever_the_margin() -> None:
    assert advantages([0.0, 0.5]) == pytest.approx([-1, 1], abs=1e-3)
    assert advantages([0.0, 50.0]) == pytest.approx([-1, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("positive", [0.5, 0.0, 3.0, 0.0]),
        ("signed", [0.5, -1.5, 3.0, 0.0]),
        ("uniform", [1.0, 1.0, 1.0, 0.0]),
        ("clipped", [0.5, -1.0, 1.0, 0.0]),
        ("exponential", [math.exp(0.25), math.exp(-0.75), math.exp(1.0), 0.0]),
    ],
)
def test_the_five_weightings(weighting: str, expected: list[float]) -> None:
    advantage, accepted = [0.5, -1.5, 3.0, 2.0], [True, True, True, False]
    found = sample_weights(advantage, accepted, weighting, clip=1.0, temperature=2.0)
    assert found == pytest.approx(expected)


def test_select_first_and_top() -> None:
    totals = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 5.0}
    assert select("abcd", totals, "first", 2) == ["a", "b"]
    assert select("abcd", totals, "top", 2) == ["b", "d"]
    assert select("abcd", totals, "top", 3) == ["b", "c", "d"]
    assert select("abcd", totals, "top", 9) == list("abcd")


def test_top_breaks_ties_by_order() -> None:
    assert select("abcd", dict.fromkeys("abcd", 1.0), "top", 2) == ["a", "b"]


# ---- the stage

# group 0: both variants beat the base; group 1: one does; group 2: none
ROWS = [
    [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)],
    [(5.0, 0.0), (6.0, 1.0), (7.0, 0.0)],
    [(3.0, 3.0), (4.0, 2.0), (2.0, 4.0)],
]


def test_keep_each_takes_members_by_themselves() -> None:
    assert judge(ROWS).accepted == ("g0-1", "g0-2", "g1-1")


def test_keep_all_takes_only_whole_groups() -> None:
    assert judge(ROWS, keep="all").accepted == ("g0-1", "g0-2")


def test_looser_filters_accept_more() -> None:
    assert judge(ROWS, rewards=["h"]).accepted == ("g0-1", "g0-2", "g1-1", "g1-2", "g2-1")
    assert len(judge(ROWS, rewards=[]).accepted) == 6


def test_member_0_is_never_accepted_and_has_its_advantage() -> None:
    result = judge(ROWS, rewards=[])
    firsts = [s for s in result.selections if s.member == 0]
    assert len(firsts) == 3
    assert not any(s.accepted for s in firsts)
    assert firsts[0].advantage < 0


def test_selections_hold_factors_totals_and_group_advantages() -> None:
    result = judge(ROWS)
    rows = {s.candidate_id: s for s in result.selections}
    assert rows["g1-2"].passed == {"h": True, "p": False}
    _, _, scores = world(ROWS)
    totals = r_total(scores, WEIGHTS)
    assert rows["g1-2"].r_total == totals["g1-2"]
    expected = advantages([totals[f"g1-{j}"] for j in range(3)])
    assert [rows[f"g1-{j}"].advantage for j in range(3)] == expected


def test_acceptance_rates_by_reward() -> None:
    result = judge(ROWS)
    assert result.acceptance == pytest.approx({"h": 5 / 6, "p": 4 / 6, "all": 3 / 6})
    assert (result.tried, result.passing) == (6, 3)


def test_first_stops_at_the_target_and_says_done_before_the_end() -> None:
    result = judge(ROWS, target_samples=2, final=False)
    assert (result.accepted, result.done) == (("g0-1", "g0-2"), True)
    assert not judge(ROWS, target_samples=4, final=False).done


def test_top_waits_for_the_end_and_takes_the_highest_totals() -> None:
    before = judge(ROWS, select="top", target_samples=2, final=False)
    assert (len(before.accepted), before.done) == (3, False)
    _, _, scores = world(ROWS)
    totals = r_total(scores, WEIGHTS)
    best = sorted(before.accepted, key=lambda key: -totals[key])[:2]
    assert set(judge(ROWS, select="top", target_samples=2).accepted) == set(best)


def test_a_later_block_changes_no_earlier_choice_of_first() -> None:
    one = judge(ROWS[:1], target_samples=2)
    all_three = judge(ROWS, target_samples=2)
    assert one.accepted == all_three.accepted


def test_incomplete_groups_and_lone_base_prompts_are_left_out() -> None:
    groups, candidates, scores = world([*ROWS, [(0.0, 0.0)]])
    del scores["g0-2"]
    settings = FilterSettings(rewards=["h", "p"])
    result = filter_candidates(groups, candidates, scores, settings, WEIGHTS, True)
    assert {s.prompt_id for s in result.selections} == {"g1", "g2"}


def test_order_of_candidates_does_not_matter() -> None:
    groups, candidates, scores = world(ROWS)
    settings = FilterSettings(rewards=["h", "p"])
    one = filter_candidates(groups, candidates, scores, settings, WEIGHTS, True)
    two = filter_candidates(groups, candidates[::-1], scores, settings, WEIGHTS, True)
    assert one == two


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_must_be_numbers(bad: float) -> None:
    with pytest.raises(CraftError, match="not a finite number") as caught:
        judge([[(0.0, 0.0), (bad, 1.0)]])
    assert "reward h, candidate g0-1" in caught.value.where


def test_a_missing_reward_is_named_with_the_command() -> None:
    groups, candidates, scores = world(ROWS)
    settings = FilterSettings(rewards=["z"])
    with pytest.raises(CraftError, match="missing") as caught:
        filter_candidates(groups, candidates, scores, settings, WEIGHTS, True)
    assert "craft-fast score" in caught.value.hint


def test_nothing_scored_is_an_empty_result() -> None:
    result = filter_candidates([], [], {}, FilterSettings(), {"h": 1.0, "p": 1.0, "a": 1.0}, True)
    assert (result.accepted, result.tried, result.done) == ((), 0, False)


def test_too_few_is_said_with_rates_and_what_to_loosen() -> None:
    result = judge(ROWS, keep="all", target_samples=10)
    text = what_to_loosen(result, FilterSettings(rewards=["h", "p"], keep="all", target_samples=10), 9)
    assert text.startswith("2 of 10 samples accepted from 9 images (passing: h 83%, p 67%, all 33%)")
    assert "filter.rewards=[h]' drops p" in text
    assert "filter.keep=each" in text
    assert what_to_loosen(judge(ROWS, target_samples=3), FilterSettings(target_samples=3), 9) == ""


# ---- training samples


def samples(result: FilterResult, **changes: object) -> list[tuple[str, str, float]]:
    _, candidates, _ = world(ROWS)
    train = TrainSettings(**changes)  # type: ignore[arg-type]
    found = training_samples(result.selections, candidates, FilterSettings(rewards=["h", "p"]), train)
    assert len({s.sample_id for s in found}) == len(found)
    return [(s.candidate_id, s.prompt, s.weight) for s in found]


def test_samples_are_conditioned_on_base_expanded_or_both() -> None:
    result = judge(ROWS)
    uniform = {"weighting": "uniform"}
    assert [text for _, text, _ in samples(result, condition_on="base", **uniform)] == [
        "prompt 0",
        "prompt 0",
        "prompt 1",
    ]
    assert [text for _, text, _ in samples(result, condition_on="expanded", **uniform)] == [
        "prompt 0, v1",
        "prompt 0, v2",
        "prompt 1, v1",
    ]
    both = samples(result, condition_on="both", **uniform)
    assert len(both) == 6
    assert [key for key, _, _ in both[:2]] == ["g0-1", "g0-1"]
    assert {weight for _, _, weight in both} == {1.0}


def test_samples_of_weight_zero_are_left_out() -> None:
    # The first variant beats the base, yet stays below its group's mean.
    result = judge([[(0.0, 0.0), (1.0, 1.0), (10.0, 10.0)]])
    values = {s.candidate_id: s.advantage for s in result.selections if s.accepted}
    found = samples(result, weighting="positive")
    assert found == [(key, f"prompt {key[1]}", a) for key, a in values.items() if a > 0]
    assert all(weight > 0 for _, _, weight in found)
    assert (len(found), len(values)) == (1, 2)


def test_sample_ids_are_a_function_of_candidate_and_text() -> None:
    result = judge(ROWS)
    _, candidates, _ = world(ROWS)
    settings = FilterSettings(rewards=["h", "p"])
    base = training_samples(result.selections, candidates, settings, TrainSettings(weighting="uniform"))
    both = training_samples(
        result.selections, candidates, settings, TrainSettings(weighting="uniform", condition_on="both")
    )
    assert {s.sample_id for s in base} < {s.sample_id for s in both}


def test_sample_ids_do_not_follow_the_settings_that_candidates_were_made_with() -> None:
    result = judge(ROWS)
    _, candidates, _ = world(ROWS)
    settings = FilterSettings(rewards=["h", "p"])
    selections = [replace(row, candidate_id=f"new-{row.candidate_id}") for row in result.selections]
    renamed = [replace(row, candidate_id=f"new-{row.candidate_id}") for row in candidates]
    before, after = (
        [sample.sample_id for sample in training_samples(judged, rows, settings, TrainSettings(weighting="uniform"))]
        for judged, rows in ((result.selections, candidates), (selections, renamed))
    )
    assert before == after
    assert len(set(before)) == len(before)


def test_nothing_accepted_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(CraftError, match="nothing to train on") as caught:
        samples(judge([[(1.0, 1.0), (0.0, 0.0)]]))
    assert "loosen filter.rewards" in caught.value.hint


def test_weights_that_average_to_nothing_are_refused() -> None:
    # Without a filter, signed weights of all variants average below zero when the base is the best member.
    result = judge([[(9.0, 9.0), (0.0, 0.0), (1.0, 1.0)]], rewards=[])
    with pytest.raises(CraftError, match="mean is not positive") as caught:
        samples(result, weighting="signed")
    assert "train.weighting=positive" in caught.value.hint


# ---- properties

score = st.floats(-100, 100, allow_nan=False)
rows_of_scores = st.lists(st.lists(st.tuples(score, score), min_size=3, max_size=5), min_size=1, max_size=6)


@hypothesis_settings(max_examples=150, deadline=None)
@given(rows_of_scores)
def test_advantages_of_a_group_sum_to_zero_and_are_bounded(rows: list[list[tuple[float, float]]]) -> None:
    result = judge(rows)
    for i, members in enumerate(rows):
        values = [s.advantage for s in result.selections if s.prompt_id == f"g{i}"]
        assert math.fsum(values) == pytest.approx(0.0, abs=1e-6)
        assert all(abs(v) <= math.sqrt(len(members) - 1) + 1e-6 for v in values)


@hypothesis_settings(max_examples=150, deadline=None)
@given(rows_of_scores)
def test_a_stricter_filter_accepts_a_subset(rows: list[list[tuple[float, float]]]) -> None:
    loose = set(judge(rows, rewards=["h"]).accepted)
    strict = set(judge(rows, rewards=["h", "p"]).accepted)
    whole = set(judge(rows, rewards=["h", "p"], keep="all").accepted)
    assert whole <= strict <= loose
    assert not any(key.endswith("-0") for key in loose)


@hypothesis_settings(max_examples=150, deadline=None)
@given(rows_of_scores, st.floats(0.1, 10), st.floats(-50, 50))
def test_rescaling_a_reward_changes_no_choice_and_no_advantage(
    rows: list[list[tuple[float, float]]], scale: float, shift: float
) -> None:
    # Whole numbers stay apart under rescaling; nearly equal floats may not.
    rows = [[(float(round(h)), float(round(p))) for h, p in members] for members in rows]
    other = [[(h * scale + shift, p) for h, p in members] for members in rows]
    one, two = judge(rows), judge(other)
    assert one.accepted == two.accepted
    for a, b in zip(one.selections, two.selections, strict=True):
        assert a.advantage == pytest.approx(b.advantage, abs=1e-4)


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(0.1, 5), st.floats(0.1, 5))
def test_weights_keep_their_promises(values: list[float], clip: float, temperature: float) -> None:
    accepted = [i % 2 == 0 for i in range(len(values))]
    found = {
        mode: sample_weights(values, accepted, mode, clip=clip, temperature=temperature)
        for mode in ("positive", "signed", "uniform", "exponential", "clipped")
    }
    for weights in found.values():
        assert all(w == 0 for w, keep in zip(weights, accepted, strict=True) if not keep)
        assert all(math.isfinite(w) for w in weights)
    assert all(w >= 0 for mode in ("positive", "uniform", "exponential") for w in found[mode])
    assert all(abs(w) <= clip for w in found["clipped"])
    assert all(w <= math.exp(clip) for w in found["exponential"])
