"""What the report says to try next: each rule with figures that trigger it, and with figures that just do not."""

from __future__ import annotations

import random
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from craft_fast.records import Candidate, EvalRow, FileRef, Selection, StageRow
from craft_fast.report import advice
from craft_fast.report.inputs import ReportData
from craft_fast.report.page import render_page
from craft_fast.settings_io import load_settings
from tests.unit.report_runs import gathered, judged

FILE = FileRef("candidates/x.png", "0" * 64, 1)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return gathered(tmp_path_factory.mktemp("advice"))


@pytest.fixture
def data(empty: ReportData) -> ReportData:
    """A run that asks for nothing: better by all judges, enough samples, an even loss."""
    rows = [judged("oracle", 0.2, 0.3, held_out=True), judged("h", 0.02, 0.04), judged("p", 0.02, 0.04)]
    even = [(step, 0.1 + 0.01 * (step % 7)) for step in range(1, 301)]
    return judged_by(with_variants(replace(empty, evaluation=rows, losses=even), 200, passing=120), rows)


def judged_by(data: ReportData, rows: list[EvalRow]) -> ReportData:
    return replace(data, evaluation=rows)


def with_variants(data: ReportData, count: int, *, passing: int, h: int | None = None) -> ReportData:
    """So many variants, three a group with their plain member; the first ``passing`` beat it on every reward."""
    candidates, selections = [], []
    for number in range(count):
        group, member = f"p{number // 3}", number % 3 + 1
        if member == 1:
            candidates.append(Candidate(f"{group}-0", group, 0, "a", "a", 0, FILE, FILE))
        name, passed = f"{group}-{member}", number < passing
        candidates.append(Candidate(name, group, member, "a", "a", 0, FILE, FILE))
        # p and a say no to different variants, so that no two rewards say the same.
        verdict = {"h": number < h if h is not None else passed or number % 3 > 0}
        verdict |= {"p": passed or number % 3 == 0, "a": passed or number % 2 == 0}
        selections.append(Selection(name, group, member, passed and all(verdict.values()), verdict, 0.0, 0.0))
    return replace(data, candidates=candidates, selections=selections)


def with_settings(data: ReportData, **sections: dict[str, Any]) -> ReportData:
    merged = {name: {**data.settings[name], **values} for name, values in sections.items()}
    return replace(data, settings={**data.settings, **merged})


def with_stage(data: ReportData, name: str, *, seconds: float = 1.0, peak: float = 1.0, **info: Any) -> ReportData:
    rest = [row for row in data.stages if row.name != name]
    return replace(data, stages=[*rest, StageRow(name, "k", "done", seconds, peak, info)])


def test_a_run_in_which_all_is_well_is_told_how_to_use_its_lora(data: ReportData) -> None:
    assert advice.advise(data) == []
    page = render_page(data)
    assert "Nothing in this run\u2019s figures asks for a change." in page
    assert "craft-fast try &#x27;my run&#x27; --prompt" in page
    assert "models/loras/" in page
    assert "lora check" in page
    assert "To try next" not in page


def test_without_an_evaluation_the_run_goes_on(data: ReportData) -> None:
    [item] = [advice.unfinished(replace(data, evaluation=[]))]
    assert item is not None
    assert item.commands == ("craft-fast run --name 'my run'",)
    assert advice.unfinished(data) is None


def test_rewards_that_rise_while_a_held_out_judge_falls(data: ReportData) -> None:
    rows = [judged("image_reward", -0.3, -0.1, held_out=True), judged("h", 0.02, 0.04)]
    item = advice.exploited(judged_by(data, rows))
    assert item is not None
    start = "Held-out image_reward moved \u22120.200 (95 % interval \u22120.300 to \u22120.100), while"
    assert item.why.startswith(start)
    assert item.commands[0].endswith("--set train.steps=150")
    assert item.commands[1].endswith("--set train.learning_rate=0.00033")
    assert advice.exploited(judged_by(data, [judged("image_reward", -0.3, 0.01, held_out=True), rows[1]])) is None
    assert advice.got_worse(judged_by(data, rows)) is None
    fell = judged_by(data, [rows[0], judged("h", -0.02, 0.04)])
    assert advice.exploited(fell) is None
    found = advice.got_worse(fell)
    assert found is not None
    assert found.commands == ("craft-fast run --name 'my run' --set train.learning_rate=0.00033",)


def test_steps_that_were_skipped_or_leapt(data: ReportData) -> None:
    item = advice.unsteady(with_stage(data, "train", skipped=2))
    assert item is not None
    assert "2 of 302 steps gave no finite loss" in item.why
    assert item.commands == (
        "craft-fast run --name 'my run' --set train.learning_rate=0.0005 --set train.warmup_steps=20",
    )
    spiked = [*data.losses[:-4], *((297 + i, 0.9) for i in range(4))]
    found = advice.unsteady(replace(data, losses=spiked))
    assert found is not None
    assert "4 of 300 steps had a loss above 5 times the median" in found.why
    assert advice.unsteady(replace(data, losses=[*data.losses[:-1], (300, 0.9)])) is None


def test_no_judge_that_took_no_part(data: ReportData) -> None:
    item = advice.nobody_held_out(judged_by(data, [judged("h", 0.1, 0.2)]))
    assert item is not None
    assert "--set rewards.image_reward.held_out=true" in item.commands[0]


def test_fewer_samples_than_wanted(data: ReportData) -> None:
    few = with_variants(data, 180, passing=50)
    item = advice.too_few(few)
    assert item is not None
    # 240 images gave 50; 100 take 480, and a tenth more: 528 are 132 whole groups of four.
    assert "about 528 images; 240 were made" in item.why
    assert item.commands[0] == "craft-fast run --name 'my run' --max-images 528"
    assert item.commands[1] == "craft-fast run --name 'my run' --set 'filter.rewards=[h, a]'"
    assert "The strictest reward is p: by itself it lets 52 % of the variants pass" in item.why
    no_more = advice.too_few(with_stage(few, "expand", train=60))
    assert no_more is not None
    assert no_more.title.startswith("Add training prompts, about 132 in all")
    assert not any("--max-images" in line for line in no_more.commands)
    kept_whole = advice.too_few(with_settings(few, filter={"keep": "all"}))
    assert kept_whole is not None
    assert kept_whole.commands[-1].endswith("--set filter.keep=each")
    assert advice.too_few(with_stage(few, "expand", weights="given")) is None
    assert advice.too_few(data) is None


def test_a_filter_that_rejects_next_to_nothing(data: ReportData) -> None:
    lax = with_variants(data, 200, passing=190)
    item = advice.filters_nothing(lax)
    assert item is not None
    assert "95 % of 200 variants pass" in item.why
    assert item.commands == ("craft-fast run --name 'my run' --max-images 400 --set filter.select=top",)
    assert advice.filters_nothing(with_variants(data, 200, passing=179)) is None
    top = advice.filters_nothing(with_settings(lax, filter={"select": "top"}))
    assert top is not None
    assert top.commands == ("craft-fast run --name 'my run' --max-images 534",)


def test_an_interval_that_includes_zero_on_few_prompts(data: ReportData) -> None:
    unclear = judged_by(data, [judged("image_reward", -0.1, 0.3, held_out=True), judged("h", 0.1, 0.2)])
    item = advice.too_few_prompts(with_stage(unclear, "expand", heldout=1000))
    assert item is not None
    # Half the interval is twice the change, so four times the prompts, and a fifth more: 307, in fifties 350.
    assert item.commands == ("craft-fast run --name 'my run' --set evaluate.prompts=350",)
    none_left = advice.too_few_prompts(with_stage(unclear, "expand", heldout=64))
    assert none_left is not None
    assert none_left.commands == ()
    assert "All 64 held-out prompts were used" in none_left.why
    many = judged_by(data, [judged("image_reward", -0.1, 0.3, held_out=True, n=200)])
    assert advice.too_few_prompts(many) is None
    assert advice.no_effect(unclear) is None
    idle = advice.no_effect(judged_by(data, [judged("image_reward", -0.1, 0.3, held_out=True), judged("h", -1, 1)]))
    assert idle is not None
    assert idle.commands == ("craft-fast run --name 'my run' --set train.steps=600",)


def test_a_loss_that_still_falls_on_a_good_model(data: ReportData) -> None:
    falling = [(step, 0.3 - 0.0008 * step + 0.01 * (step % 7)) for step in range(1, 301)]
    good = [judged("image_reward", 0.1, 0.3, held_out=True, wins=0.7), judged("h", 0.1, 0.2)]
    item = advice.still_learning(judged_by(replace(data, losses=falling), good))
    assert item is not None
    assert item.commands == ("craft-fast run --name 'my run' --set train.steps=450",)
    assert advice.still_learning(judged_by(data, good)) is None
    weak = [judged("image_reward", 0.1, 0.3, held_out=True, wins=0.59), good[1]]
    assert advice.still_learning(judged_by(replace(data, losses=falling), weak)) is None


def test_a_loss_falls_only_when_noise_does_not_explain_it() -> None:
    rng = random.Random(0)
    assert advice.loss_still_falls([0.1 + rng.gauss(0, 0.03) for _ in range(300)]) is None
    assert advice.loss_still_falls([0.1 - 0.0001 * i for i in range(20)]) is None
    fell = advice.loss_still_falls([0.2 - 0.0003 * i + rng.gauss(0, 0.005) for i in range(300)])
    assert fell == pytest.approx(0.03 / 0.155, rel=0.1)


def test_two_rewards_that_say_the_same(data: ReportData) -> None:
    rows = [replace(row, passed={**row.passed, "a": row.passed["p"]}) for row in data.selections]
    item = advice.same_verdicts(replace(data, selections=rows))
    assert item is not None
    assert "p and a give the same verdict on 100 % of 200 variants" in item.why
    assert item.commands == ("craft-fast run --name 'my run' --set 'filter.rewards=[h, p]'",)
    assert advice.same_verdicts(replace(data, selections=rows[:49])) is None


@pytest.mark.parametrize(
    ("stage", "changes", "command"),
    [
        ("generate", {"filter": {"select": "top"}}, "filter.select=first"),
        ("generate", {"generate": {"guidance_scale": 5.0}}, "'generate.guidance_interval=[0.1, 0.8]'"),
        ("score", {"score": {"lazy": False}}, "score.lazy=true"),
        ("train", {"train": {"gradient_checkpointing": "all"}}, "train.gradient_checkpointing=auto"),
        ("evaluate", {"evaluate": {"prompts": 1000}}, "evaluate.prompts=200"),
        ("score", {}, None),
    ],
)
def test_one_stage_that_takes_most_of_a_long_run(
    data: ReportData, stage: str, changes: dict[str, dict[str, Any]], command: str | None
) -> None:
    slow = with_settings(with_stage(data, stage, seconds=2000.0), **changes)
    item = advice.one_stage(slow)
    if command is None:
        assert item is None
    else:
        assert item is not None
        assert item.commands == (f"craft-fast run --name 'my run' --set {command}",)
        assert f"{stage} took 33 min 20 s" in item.why
        assert advice.one_stage(with_stage(slow, stage, seconds=100.0)) is None  # not ten minutes in all


def test_memory_to_spare(data: ReportData) -> None:
    capped = with_stage(with_settings(data, engine={"vram_gib": 12.0}), "train", peak=5.0)
    item = advice.memory_to_spare(with_settings(capped, train={"grad_accum_steps": 4, "micro_batch_size": 1}))
    assert item is not None
    assert "5.00 of the 12 GiB" in item.why
    assert item.commands[0].endswith("--set train.micro_batch_size=2 --set train.grad_accum_steps=2")
    again = advice.memory_to_spare(with_settings(capped, train={"gradient_checkpointing": "all"}))
    assert again is not None
    assert again.commands[0].endswith("train.gradient_checkpointing=auto")
    assert advice.memory_to_spare(with_stage(capped, "train", peak=8.0)) is None
    assert advice.memory_to_spare(data) is None


def test_at_most_five_and_every_command_is_one(data: ReportData) -> None:
    rows = [judged("h", -0.1, 0.1, n=50)]
    bad = with_settings(with_variants(judged_by(data, rows), 180, passing=20), engine={"vram_gib": 100.0})
    bad = with_stage(with_stage(bad, "train", skipped=3), "generate", seconds=5000.0)
    found = advice.advise(bad)
    names = ["unsteady", "nobody_held_out", "too_few", "no_effect", "too_few_prompts"]
    assert [item.rule for item in found] == names
    assert len([rule for rule in advice.RULES if rule(bad)]) > advice.MOST
    for line in (line for item in found for line in item.commands):
        words = shlex.split(line)
        assert words[:4] == ["craft-fast", "run", "--name", "my run"]
        # The settings are understood, whatever the run's others are.
        load_settings(overrides=[value for flag, value in pairwise(words) if flag == "--set"])
    page = render_page(bad)
    assert page.count("<li><h3>") == 5
    assert re.search(r'To try next: <a href="#next">Steady the training: .*</a> and 4 more', page)
    assert "cp -r &#x27;runs/my run&#x27; &#x27;runs/my run-before&#x27;" in page
