"""What may be compared, and what may be claimed: on evaluations made of numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast import pipeline_keys
from craft_fast.errors import UsageError
from craft_fast.pipeline_keys import InputKeys, output_keys
from craft_fast.records import FileRef
from craft_fast.report.compare_figures import Claim, Comparison, compare, comparison_json
from craft_fast.report.compare_inputs import Evaluated, match, picture_difference
from craft_fast.report.compare_page import MOST_PICTURES, render
from craft_fast.sdxl.vae import png_bytes
from tests.unit.compared_runs import NAMES, SETTINGS, WAY, evaluated, never
from tests.unit.small_runs import changed


def claims(*runs: Evaluated) -> list[Claim]:
    return list(compare(runs, match(runs, never)).claims)


# ---- what is shared


def test_only_what_all_drew_from_the_same_noise_is_compared() -> None:
    one, two = evaluated("one"), evaluated("two", names=[*NAMES[2:], "q"])
    three = evaluated("three", names=NAMES[:7])
    shared = match([one, two, three], never)
    assert list(shared.prompts) == NAMES[2:7]
    assert shared.left_out == [
        "2 of 8 prompts of one are not among those of two",
        "1 of 7 prompts of two are not among those of one",
        "1 of 8 prompts of one are not among those of three",
    ]


def test_pictures_equal_but_for_rounding_count_where_settings_are_equal() -> None:
    one, two = evaluated("one"), evaluated("two", noise="another batch")
    files = {"file": lambda self, side, name: Path(name)}
    one, two = (type("Here", (Evaluated,), files)(**{n: getattr(r, n) for n in r.__slots__}) for r in (one, two))
    shared = match([one, two], lambda a, b: 0.3 if a.name != "p7" else 40.0)
    assert (list(shared.prompts), shared.rounded) == (NAMES[:7], 7)
    assert "though their settings do not" in shared.left_out[0]
    other = replace(two, seed=9)
    with pytest.raises(UsageError):
        match([one, other], never)


def test_a_picture_is_read_and_compared_by_its_pixels(tmp_path: Path) -> None:
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    for name, pixels in (("a", image), ("b", image + 3), ("small", image[:, :4])):
        (tmp_path / name).write_bytes(png_bytes(pixels))
    (tmp_path / "broken").write_bytes(b"no picture")
    assert picture_difference(tmp_path / "a", tmp_path / "b") == 3.0
    assert picture_difference(tmp_path / "a", tmp_path / "small") == math.inf
    assert picture_difference(tmp_path / "a", tmp_path / "broken") == math.inf


@pytest.mark.parametrize(
    ("sections", "what", "hint"),
    [
        ({"generate": {"guidance_scale": 5.0}}, "in different ways", "--set generate.guidance_scale=2.0"),
        ({"model": {"path": "another"}}, "different models", "one base model"),
        ({}, "though their settings do not", "evaluate both on one machine"),
    ],
)
def test_nothing_shared_is_refused_with_the_way_out(sections: dict[str, Any], what: str, hint: str) -> None:
    two = evaluated("two", settings=changed(SETTINGS, **sections), noise="another")
    with pytest.raises(UsageError) as refused:
        match([evaluated("one"), two], lambda a, b: 99.0)
    assert what in refused.value.what
    assert hint in refused.value.hint


def test_other_prompts_and_no_common_ones_are_refused() -> None:
    with pytest.raises(UsageError, match="different prompts"):
        match([evaluated("one"), evaluated("two", names=["q"])], never)
    with pytest.raises(UsageError, match="no prompt that all"):
        match([evaluated("one"), evaluated("two", names=["p0"]), evaluated("three", names=["p1"])], never)


def test_a_record_that_points_out_of_the_runs_folder_names_no_picture(tmp_path: Path) -> None:
    run = evaluated("one", root=tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    outside = {"base": {"p0": FileRef("../secret.png", "0", 1)}}
    assert replace(run, pictures=outside).file("base", "p0") is None


# ---- what is claimed


def test_a_difference_is_claimed_where_its_interval_leaves_out_zero() -> None:
    [up] = claims(evaluated("one"), evaluated("two", 0.5))
    assert up.direction == "better"
    assert up.sentence.startswith("two scores higher than one on average by eye (+0.500, 95 % interval")
    assert "oracle (+50.0 points, 95 % interval" in up.sentence
    assert "h (" not in up.sentence  # it was trained on
    [down] = claims(evaluated("one"), evaluated("two", {"eye": [-0.5] * 8}))
    assert down.direction == "worse"
    assert down.sentence.endswith("; the other held-out judge shows no difference.")
    assert claims(evaluated("one"), evaluated("two", {"eye": [1.0] * 8, "oracle": [-1.0] * 8}))[0].direction == "mixed"


def test_nothing_is_claimed_that_the_interval_does_not_support() -> None:
    [open_] = claims(evaluated("one"), evaluated("two", {"eye": [1.0, -1.0] * 4, "h": [1.0] * 8}))
    assert open_.direction == "unclear"
    assert open_.sentence == (
        "None of 2 held-out judges tells two from one on 8 prompts: every 95 % interval includes zero."
    )
    few = NAMES[:5]
    [little] = claims(evaluated("one", names=few), evaluated("two", 9.0, names=few))
    assert (little.direction, little.sentence) == ("none", "5 shared prompts are too few to tell two from one.")
    one = evaluated("one")
    [same] = claims(one, evaluated("two", pictures=one.pictures))
    assert (same.direction, same.sentence) == ("same", "two and one drew the same pictures.")


def test_judges_that_were_trained_on_say_so() -> None:
    known = changed(SETTINGS, rewards={"eye": {"kind": "image-reward"}, "oracle": {"kind": "pickscore"}})
    [claim] = claims(evaluated("one"), evaluated("two", 0.5, settings=known))
    assert claim.direction == "better"
    assert claim.sentence.endswith("No reward was held out in both, so a gain may be one that training exploited.")


# ---- which rewards, settings, costs


def together(*runs: Evaluated) -> Comparison:
    return compare(runs, match(runs, never))


def test_scores_of_another_provenance_are_named_and_left_out() -> None:
    ways = {**dict.fromkeys(SETTINGS.rewards, WAY), "eye": replace(WAY, precision="float16"), "oracle": None}
    found = together(evaluated("one"), evaluated("two", 0.5, provenances=ways))
    assert [judge.name for judge in found.judges] == ["h"]
    assert found.left_out[0] == (
        "eye",
        "one and two were judged in different ways: precision: float32, float16",
    )
    assert found.left_out[1] == ("oracle", "how its scores came about is not recorded, or not one way, in two")
    page = render(found, prompts=0)
    assert "Not compared: eye: one and two were judged in different ways" in page


def test_a_reward_that_one_run_lacks_is_left_out() -> None:
    fewer = SETTINGS.model_copy(update={"rewards": {"h": SETTINGS.rewards["h"]}})
    found = together(evaluated("one"), evaluated("two", settings=fewer))
    assert [judge.name for judge in found.judges] == ["h"]
    assert ("eye", "not asked by two") in found.left_out


def test_every_pair_settings_cost_and_overlap() -> None:
    other = changed(SETTINGS, train={"rank": 4}, expand={"base_url": "http://me:secret@host/v1"}, report={"title": "x"})
    runs = evaluated("one"), evaluated("two", {"eye": [0.0, 1.0] * 4}, settings=other), evaluated("three", 1.0)
    found = together(*runs)
    eye = found.judges[1]
    assert sorted(eye.pairs) == [(0, 1), (0, 2), (1, 2)]
    assert [round(eye.pairs[pair].win_rate, 3) for pair in sorted(eye.pairs)] == [0.75, 1.0, 0.75]
    assert dict(found.settings) == {
        "expand.base_url": ["http://localhost:8000/v1", "http://host/v1", "http://localhost:8000/v1"],
        "train.rank": [16, 4, 16],
    }
    assert found.overlap == {(0, 1): 1, (0, 2): 1, (1, 2): 1}
    assert (found.costs[0].seconds, found.costs[0].accepted, found.costs[0].images) == (2.5, 3, None)
    assert comparison_json(found)["rewards"][1]["means"] == pytest.approx({"one": 0.35, "two": 0.85, "three": 1.35})
    assert max(found.spread, key=found.spread.__getitem__) in NAMES[::2]
    page = render(found, prompts=8)
    assert page.count("not there any more") == 8 * 4
    assert "secret" not in page
    assert "Run against run" in page


def test_hostile_names_and_texts_stay_text() -> None:
    bad = "<img src=x onerror=alert(1)>\u202e"
    runs = evaluated(bad, prompts=dict.fromkeys(NAMES, bad)), evaluated("two")
    page = render(together(*runs), prompts=MOST_PICTURES)
    assert "<img src=x" not in page
    assert "\u202e" not in page


# ---- evaluate.seed


def keys(**settings: Any) -> dict[str, str]:
    known = InputKeys("e", "g", "s", "f", "t", "m", {"h": "1"}, {"h": "1", "eye": "2"})
    return vars(output_keys(changed(SETTINGS, **settings), known, "chosen"))


def test_the_seed_of_the_pictures_changes_the_evaluation_alone() -> None:
    own, given = keys(), keys(evaluate={"seed": 7})
    assert {name for name in own if own[name] != given[name]} == {"evaluate", "report"}
    # Said or not, the run's own seed is the same evaluation.
    assert keys(evaluate={"seed": SETTINGS.seed})["evaluate"] == own["evaluate"]


def test_without_it_the_evaluations_key_is_what_it_was_before_there_was_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: dict[str, tuple[Any, ...]] = {}

    def key(stage: str, *parts: Any) -> str:
        hashed[stage] = parts
        return stage

    monkeypatch.setattr(pipeline_keys, "_key", key)
    keys()
    assert hashed["evaluate"][0] == SETTINGS.seed
    assert {"prompts": 64, "bootstrap_samples": 200} in hashed["evaluate"]
