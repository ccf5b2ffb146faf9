"""The report of a realistic run."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from craft_fast.config import FilterSettings, TrainSettings
from craft_fast.records import Candidate, EvalRow, FileRef, Provenance, ScoreRow, Selection
from craft_fast.report import build_report
from craft_fast.report.inputs import gather
from craft_fast.rng import derive_seed
from craft_fast.store.run import Run, open_run
from tests.unit.report_runs import (
    HELD_OUT,
    HOSTILE,
    KEYS,
    SETTINGS,
    TRAINING,
    Page,
    add_candidates,
    add_evaluation,
    add_stages,
    add_training,
    fill,
    shapes,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "runs" / "demo", create=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A whole run; for tests that only read it and write its report."""
    with open_run(tmp_path_factory.mktemp("filled") / "runs" / "demo", create=True) as opened:
        fill(opened)
        yield opened


@pytest.fixture(scope="module")
def page(filled: Run) -> Page:
    return page_of(filled)


def page_of(run: Run) -> Page:
    path, _ = build_report(run, SETTINGS, KEYS)
    return Page(path.read_text(encoding="utf-8"))


def test_first_screen_answers_better_by_how_much_at_what_cost(page: Page) -> None:
    assert "Better On 64 held-out prompts" in page.text
    assert "pictures that pass the oracle rose from 25.0 % to 49.0 %" in page.text
    assert "+24.0 points 95 % interval +14.0 to +34.0" in page.text
    assert "accepted of 640 candidates" in page.text
    assert "3 min 50 s peak memory 1.88 GiB" in page.text


def test_a_worse_model_is_called_worse(run: Run) -> None:
    add_evaluation(run, random.Random(0), shapes(4), gain=-0.08)
    page = page_of(run)
    assert "Worse On 4 held-out prompts" in page.text
    assert "fell from 25.0 % to 1.0 %" in page.text


def test_page_stands_alone(filled: Run, page: Page) -> None:
    text = filled.path("report.html").read_text()
    assert len(text.encode()) < 5_000_000
    assert not [tag for tag, _ in page.tags if tag in {"link", "iframe", "object", "form", "base"}]
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", text)
    assert "prefers-color-scheme: dark" in page.code["style"]
    assert "@media print" in page.code["style"]


def test_the_one_script_is_allowed_by_its_digest_alone(page: Page) -> None:
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    [policy] = [str(a["content"]) for t, a in page.tags if t == "meta" and a.get("http-equiv")]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(page.code["script"].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval|Function\(|fetch|https?:", page.code["script"])


def test_links_and_names_of_parts_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for t, a in page.tags if t == "a"}
    targets |= {str(a["aria-labelledby"]) for _, a in page.tags if a.get("aria-labelledby")}
    assert targets <= set(ids)
    assert {"pictures", "judges", "prompts", "agreement", "kept", "training", "cost", "next", "repeat"} <= targets


def test_all_evaluated_prompts_have_their_pictures_once_and_the_worst_again(page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * (64 + 4) + 4 * 4
    assert {image["alt"] for image in images[:2]} == {f"{side}: {shapes(1)[0]}" for side in ("base", "tuned")}
    assert all(image["class"] == "small" for image in images)
    assert "Where it lost most, by image_reward" in page.text
    assert "The next 48 prompts" in page.text


def test_strips_show_training_from_the_base_on(filled: Run, page: Page) -> None:
    drawn = [str(attributes["alt"]).partition(":")[0] for tag, attributes in page.tags if tag == "img"]
    assert drawn[-16:] == ["base", "step 100", "step 200", "step 300"] * 4
    data = gather(filled, SETTINGS.model_copy(update={"train": TrainSettings(steps=350)}), KEYS)
    assert [label for label, _ in data.strips[0].images] == ["base", "step 100", "step 200", "step 300", "tuned"]


def test_large_pictures_are_made_to_fit(run: Run) -> None:
    add_evaluation(run, random.Random(1), shapes(64), gain=0.08)
    noise = Image.frombytes("RGB", (320, 320), random.Random(1).randbytes(320 * 320 * 3))
    for path in run.path("samples").iterdir():
        noise.save(path, compress_level=0)
    page = page_of(run)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * (64 + 4)
    assert all((image["src"] or "").startswith("data:image/webp") and "class" not in image for image in images)
    assert 2_500_000 < run.path("report.html").stat().st_size < 5_000_000


def test_a_thousand_prompts_are_a_table_and_few_pictures(run: Run) -> None:
    prompts = [f"{text} {number}" for number, text in enumerate(shapes(300))]
    add_evaluation(run, random.Random(1), prompts, gain=0.08)
    page = page_of(run)
    assert 2 * 64 <= sum(tag == "img" for tag, _ in page.tags) <= 2 * 68
    assert sum(tag == "tr" and "data-n" in attributes for tag, attributes in page.tags) == 300
    linked = {a["data-n"] for t, a in page.tags if t == "a" and "data-n" in a}
    assert linked == {a["data-n"] for t, a in page.tags if t == "figure" and "id" in a}


def test_a_picture_that_is_gone_leaves_its_scores(run: Run) -> None:
    add_evaluation(run, random.Random(1), shapes(4), gain=0.08)
    run.path("samples", "tuned-2.png").unlink()
    page = page_of(run)
    assert [a["data-n"] for t, a in page.tags if t == "figure" and "id" in a] == ["1", "2", "4"]
    assert sum(tag == "tr" and "data-n" in attributes for tag, attributes in page.tags) == 4


def test_prompts_stay_text(run: Run) -> None:
    add_evaluation(run, random.Random(0), HOSTILE, gain=0.08)
    page = page_of(run)
    text = run.path("report.html").read_text()
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "b\x00" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for prompt in (HOSTILE[0], HOSTILE[1], HOSTILE[4]):
        assert prompt in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "\u241b[31mred" in page.text
    assert "\u27e8U+202E\u27e9red circle" in page.text
    assert "\u05e9\u05dc\u05d5\u05dd" in page.text
    assert text.count("<bdi>") == text.count("</bdi>") > 0


def test_a_long_prompt_is_in_the_page_three_times_at_most(run: Run) -> None:
    add_evaluation(run, random.Random(0), ["x" * 10_000, "a red circle"], gain=0.08)
    page_of(run)
    assert 20_000 <= run.path("report.html").read_text().count("x" * 100) * 100 <= 31_000


def test_json_has_the_fields_that_others_read(filled: Run, page: Page) -> None:
    run, data = filled, json.loads(filled.path("report.json").read_text())
    accepted = sum(row.accepted for row in run.manifest.selections(KEYS.filter))
    assert data["selection"]["accepted"] == accepted > 0
    assert data["stages"][1] == {"name": "generate", "seconds": 71.3, "peak_gib": pytest.approx(0.4 + 71.3 / 80)}
    assert "report" not in [row["name"] for row in data["stages"]]
    (oracle,) = [row for row in data["evaluation"] if row["metric"] == "oracle"]
    assert oracle == {
        **{"metric": "oracle", "held_out": True, "base_mean": 0.25, "tuned_mean": 0.49, "win_rate": 0.58},
        **{"ci_low": pytest.approx(0.14), "ci_high": pytest.approx(0.34), "n": 64},
    }
    row = data["per_prompt"][3]
    assert (row["prompt_id"], row["prompt"]) == ("h3", shapes(4)[3])
    assert row["noise_seed"] == derive_seed(7, "evaluate", "h3")
    assert set(row["scores"]) == set(TRAINING + HELD_OUT)
    assert set(row["scores"]["h"]) == {"base", "tuned"}
    assert len(data["agreement"]["evaluation"]) == 7 * 6 / 2
    assert [item["groups"] for item in data["agreement"]["candidates"]] == [160] * 3
    assert all(item["held_out"] < -0.25 and item["training"] > 0.25 for item in data["agreement"]["parted"])
    assert data["advice"] == []  # all is well
    assert data["digests"]["lora"] == {"lora/craft.safetensors": run.ref(run.path("lora", "craft.safetensors")).sha256}


def test_every_reward_says_how_its_scores_came_about(run: Run) -> None:
    add_candidates(run, random.Random(0), groups=160, accept=True)
    add_evaluation(run, random.Random(0), shapes(64), gain=0.08)
    way = Provenance(
        "native", "abcdef012345" * 5 + "6789", "pil-bicubic/crop-floor/224", "clip-bpe/77", "float16", "<b>"
    )
    run.manifest.put_scores([ScoreRow("c0-1", "p", "key-p", 0.5, way)])
    run.manifest.put_scores([ScoreRow(f"c{i}-{j}", "h", "key-h", 0.5, way) for i in range(160) for j in range(4)])
    heldout = [(side, f"h{i}", "image_reward", 0.5) for side in ("base", "tuned") for i in range(64)]
    run.manifest.put_eval_scores(KEYS.evaluate, heldout, {"image_reward": way})
    run.manifest.put_eval_scores(KEYS.evaluate, [(*row[:2], "h", 0.5) for row in heldout], {"h": way})
    page, path = build_report(run, SETTINGS, KEYS)
    line = "native, checkpoint abcdef012345, pictures pil-bicubic/crop-floor/224, text clip-bpe/77, precision float16"
    assert f"<dt>h</dt><dd>{line}, &lt;b&gt;</dd>" in page.read_text()
    assert "<dt>a</dt><dd>how its scores came about was not recorded</dd>" in page.read_text()
    rewards = json.loads(path.read_text())["rewards"]
    assert rewards["h"] == {"kind": "clip", "held_out": False, "provenance": asdict(way)}
    assert rewards["image_reward"]["provenance"]["checkpoint"] == way.checkpoint
    assert (rewards["a"]["provenance"], rewards["oracle"]["held_out"]) == (None, True)
    assert [rewards["p"]["provenance"], *rewards["p"]["also"]] in ([None, asdict(way)], [asdict(way), None])


def test_the_funnel_is_over_those_that_were_asked(run: Run) -> None:
    file = FileRef("candidates/x.png", "0" * 64, 1)
    # Of four variants h rejects one; p is asked about the other three and rejects two.
    passed = [{}, {"h": True, "p": True}, {"h": True, "p": False}, {"h": True, "p": False}, {"h": False}]
    rows = [Selection(f"c{j}", "p0", j, j == 1, factors, 0.0, 0.0) for j, factors in enumerate(passed)]
    run.manifest.put_candidates(
        KEYS.generate, [Candidate(row.candidate_id, "p0", row.member, "a", "a", 0, file, file) for row in rows]
    )
    run.manifest.put_selections(KEYS.filter, rows)
    run.manifest.finish_stage("filter", KEYS.filter, 0.1, None, {"r_total": {"a": 1.0}})
    few = SETTINGS.model_copy(update={"filter": FilterSettings(rewards=["p", "h"])})
    page, path = build_report(run, few, KEYS)
    selection = json.loads(path.read_text())["selection"]
    assert [(step["label"], step["left"], step["alone"], step["asked"]) for step in selection["funnel"]] == [
        ("variants", 4, 4, 4), ("h", 3, 3, 4), ("p", 1, 1, 3), ("accepted", 1, 1, 4),
    ]  # fmt: skip
    # The one that h rejects may have failed on p too: nobody knows.
    assert [step["only"] for step in selection["funnel"]] == [0, 0, 2, 0]
    assert selection["r_total"] == ["a"]
    text = Page(page.read_text()).text
    assert "alone 75 %" in text
    assert "alone 33 % of 3 asked; only p said no to 2" in text
    assert "asked about what others had left" in text
    assert "The total reward and the advantage are made of a alone." in text


def test_losses_of_a_resumed_run_count_once(run: Run) -> None:
    add_training(run, random.Random(0), 300)
    _, path = build_report(run, SETTINGS, KEYS)
    training = json.loads(path.read_text())["training"]
    assert training["steps"] == list(range(1, 301))
    assert training["loss"][-1] == 0.09


def test_nothing_accepted_says_what_to_loosen(run: Run) -> None:
    add_candidates(run, random.Random(0), groups=20, accept=False)
    page = page_of(run)
    assert "Nothing was accepted: loosen filter.rewards" in page.text
    assert "Not evaluated yet 80 candidates so far" in page.text


@pytest.mark.parametrize("part", ["empty", "candidates", "evaluation", "training", "stages", "one loss"])
def test_a_run_that_is_not_finished_makes_a_shorter_page(run: Run, part: str) -> None:
    rng = random.Random(0)
    if part == "candidates":
        add_candidates(run, rng, groups=3, accept=True)
    elif part == "evaluation":
        add_evaluation(run, rng, shapes(2), gain=0.01)
    elif part in {"training", "one loss"}:
        add_training(run, rng, 20 if part == "training" else 1)
    elif part == "stages":
        add_stages(run)
    page = page_of(run)
    titles = {
        "candidates": "What was kept",
        "evaluation": "What the judges say",
        "training": "Weighted noise-prediction loss",
        "stages": "What it cost",
    }
    assert {key for key, title in titles.items() if title in page.text} == {part} & titles.keys()


def test_an_evaluation_of_nothing_is_null_and_not_drawn(run: Run) -> None:
    run.manifest.put_eval(KEYS.evaluate, [EvalRow("h", False, 0.1, 0.2, 0.5, float("-inf"), float("inf"), 0)])
    page = page_of(run)
    assert "Not evaluated yet" in page.text
    (row,) = json.loads(run.path("report.json").read_text())["evaluation"]
    assert (row["ci_low"], row["n"]) == (None, 0)


def test_addresses_lose_their_passwords(run: Run) -> None:
    expand = SETTINGS.expand.model_copy(update={"base_url": "https://me:geheim@example.test/v1"})
    paths = build_report(run, SETTINGS.model_copy(update={"expand": expand}), KEYS)
    for path in paths:
        assert "geheim" not in path.read_text()
        assert "https://example.test/v1" in path.read_text()
