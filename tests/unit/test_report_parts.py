"""The report's parts: agreement of judges, table of prompts, colours, speeds, the frame that other pages may use."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from craft_fast.records import Candidate, EvalRow, FileRef, StageRow
from craft_fast.report import agreement as agree
from craft_fast.report.document import asset, document, policy
from craft_fast.report.figures import ranking_metric
from craft_fast.report.inputs import Pair, ReportData
from craft_fast.report.judges import agreement_section
from craft_fast.report.page import measured
from craft_fast.report.table import table_section, tint, worst_first
from craft_fast.report.text import breakable, fixed, shortened
from craft_fast.report.training import speed
from tests.unit.report_runs import gathered, judged

FILE = FileRef("x", "0" * 64, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return gathered(tmp_path_factory.mktemp("parts"))


def judged_by(data: ReportData, rows: list[EvalRow], pairs: list[Pair] | None = None) -> ReportData:
    return replace(data, evaluation=rows, pairs=data.pairs if pairs is None else pairs)


def pair(number: int, **changes: float) -> Pair:
    """A prompt on which each judge's score went from 0.5 by so much."""
    base = dict.fromkeys(changes, 0.5)
    return Pair(f"h{number}", f"prompt {number}", number, None, None, base, {k: 0.5 + v for k, v in changes.items()})


# ---- agreement


def test_ranks_share_the_mean_where_values_tie() -> None:
    assert agree.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert agree.ranks([]) == []


def test_spearman_is_the_correlation_of_ranks() -> None:
    rng = random.Random(0)
    one = [rng.gauss(0, 1) for _ in range(50)]
    two = [x**3 + rng.gauss(0, 0.3) for x in one]
    order = [np.argsort(np.argsort(values)) for values in (one, two)]
    assert agree.spearman(one, two) == pytest.approx(np.corrcoef(*order)[0, 1])
    assert agree.spearman(one, [x**3 for x in one]) == pytest.approx(1.0)
    assert agree.spearman(one, [-x for x in one]) == pytest.approx(-1.0)
    assert agree.spearman(one, [1.0] * 50) is None
    assert agree.spearman([1.0, 2.0], [1.0, 2.0]) is None


def test_agreement_counts_prompts_on_which_both_changed() -> None:
    pairs = [pair(0, h=1, p=1), pair(1, h=-1, p=1), pair(2, h=0, p=1), pair(3, h=-1, p=-1), pair(4, h=1), pair(5, p=2)]
    [item] = agree.agreements(pairs, ["h", "p"])
    assert (item.same, item.moved) == (2 / 3, 3)
    assert item.rho == pytest.approx(np.corrcoef([4, 1.5, 3, 1.5], [3, 3, 3, 1])[0, 1])
    [idle] = agree.agreements([pair(0, h=0, p=0)], ["h", "p"])
    assert (idle.same, idle.moved, idle.rho) == (None, 0, None)


def test_scores_that_are_not_finite_are_no_change() -> None:
    assert agree.change(pair(0, h=float("nan")), "h") is None
    assert agree.change(pair(0, h=1.0), "p") is None


def test_the_lowest_is_across_training_and_held_out_where_it_can_be() -> None:
    found = [
        agree.Agreement("h", "p", 0.4, 50, 0.0),
        agree.Agreement("h", "r", 0.7, 50, 0.0),
        agree.Agreement("p", "r", 0.6, 50, 0.0),
        agree.Agreement("p", "s", 0.1, 5, 0.0),
    ]
    held_out = {"h": False, "p": False, "r": True, "s": True}
    assert agree.lowest(found, held_out) == found[2]
    assert agree.lowest(found, dict.fromkeys(held_out, True)) == found[0]
    assert agree.lowest(found[3:], held_out) is None


def test_prompts_where_training_rose_and_held_out_fell_are_ordered_by_how_far() -> None:
    held_out = {"h": False, "p": False, "r": True}
    pairs = [
        pair(0, h=2, p=2, r=-2),
        pair(1, h=1, p=1, r=-1),
        pair(2, h=2, p=2, r=2),
        pair(3, h=-1, p=-1, r=-3),
        pair(4, h=0.1, p=0.1, r=-3),  # rose by next to nothing
        pair(5, h=3, p=1, r=-2),
        pair(6, h=3, p=3, r=-0.1),  # fell by next to nothing
    ]
    found = agree.partings(pairs, held_out)
    assert [item.n for item in found] == [1, 6, 2]
    size = {name: agree.size_of_change(pairs, name) for name in held_out}
    assert size["r"] == pytest.approx((31.01 / 7) ** 0.5)
    assert found[1].training == pytest.approx((3 / size["h"] + 1 / size["p"]) / 2)
    assert found[1].held_out == pytest.approx(-2 / size["r"])


def test_candidates_are_ranked_within_their_groups() -> None:
    """Between groups both rewards go together; within each they are opposed, and only that counts."""
    rows, scores = [], {}
    for group in range(10):
        for member in range(4):
            name = f"c{group}-{member}"
            rows.append(Candidate(name, f"p{group}", member, "a", "a", 0, FILE, FILE))
            scores[name] = {"h": 100.0 * group + member, "p": 100.0 * group - member}
    scores["c0-0"].pop("p")
    [item] = agree.within_groups(rows, scores, ["h", "p"])
    assert (item.rho, item.groups) == (pytest.approx(-1.0), 10)
    [none] = agree.within_groups(rows[:1], scores, ["h", "p"])
    assert (none.rho, none.groups) == (None, 0)


def test_the_section_names_three_and_says_when_there_are_none(data: ReportData) -> None:
    rows = [judged("r", 0.1, 0.2, held_out=True), judged("h", 0.1, 0.2)]
    apart = [pair(n, h=1, r=-1 - n / 10) for n in range(5)] + [pair(n, h=1, r=1) for n in range(5, 12)]
    page = agreement_section(judged_by(data, rows, apart), {4})
    assert "On <b>5 of 12</b> prompts" in page
    assert re.findall(r"<li>.*?prompt (\d+)", page) == ["4", "3", "2"]
    assert '<a href="#p5" data-n="5"><bdi>prompt 4</bdi></a>' in page
    assert "<li><bdi>prompt 3</bdi>" in page, "no picture, no link"
    assert "<b>r</b> and <b>h</b> agree least: on 58 % of 12 prompts. A coin would agree on half." in page
    calm = agreement_section(judged_by(data, rows, apart[5:]), set())
    assert "On no prompt did the training rewards rise" in calm
    alone = agreement_section(judged_by(data, rows[1:], apart), set())
    assert alone == ""
    none_held_out = [judged("h", 0.1, 0.2), judged("r", 0.1, 0.2)]
    assert "There is no held-out judge" in agreement_section(judged_by(data, none_held_out, apart), set())


# ---- the table


def test_the_worst_come_first_and_the_unjudged_last() -> None:
    pairs = [pair(0, r=0.2), pair(1), pair(2, r=-0.3), pair(3, r=0.0), pair(4, r=-0.3)]
    assert worst_first(pairs, "r") == [2, 4, 3, 0, 1]


def test_tints_are_by_the_usual_size() -> None:
    assert [tint(value, 1.0) for value in (0, 0.2, 0.3, 1.0, 2.0, -0.3, -9.0)] == [0, 0, 1, 2, 3, -1, -3]
    assert tint(1.0, 0.0) == 0


def test_rows_hold_every_value_readable_and_as_numbers(data: ReportData) -> None:
    rows = [judged("oracle", 0.1, 0.2, held_out=True), judged("h", 0.1, 0.2)]
    pairs = [
        Pair("a", "first", 1, None, None, {"oracle": 1.0, "h": 0.25}, {"oracle": 0.0, "h": 0.5}),
        Pair("b", "second", 2, None, None, {"oracle": 1.0, "h": 0.5}, {"oracle": 1.0}),
    ]
    table = table_section(judged_by(data, rows, pairs), {0})
    first, second = re.findall(r"<tr data-n=.*?</tr>", table)
    yes, no = "\u2713", "\u2717"
    assert re.findall(r"<td[^>]*>(.*?)</td>", first) == ["1", yes, no, f"{yes} \u2192 {no}", "0.25", "0.50", "+0.25"]
    assert re.findall(r'data-v="([^"]*)"', first) == ["1", "1", "0", "-1", "0.25", "0.5", "0.25"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", second) == ["2", yes, yes, yes, "0.50", "\u2013", "\u2013"]
    assert 'href="#p1"' in first
    assert "href" not in second
    assert "aria-sort=ascending" in table
    assert table_section(judged_by(data, []), set()) == ""


def test_prompts_are_ranked_by_a_fine_held_out_judge() -> None:
    oracle, fine = judged("oracle", 0, 1, held_out=True), judged("image_reward", 0, 1, held_out=True)
    training = judged("h", 0, 1)
    assert ranking_metric([training, oracle, fine]) == "image_reward"
    assert ranking_metric([training, oracle]) == "oracle"
    assert ranking_metric([training]) == "h"
    assert ranking_metric([]) == ""


# ---- words and figures


def test_figures_of_a_column_line_up() -> None:
    shown = [fixed(value, 2, sign=True) for value in (1.234, -0.5, 0.0, -0.001)]
    assert shown == ["+1.23", "\u22120.50", "0.00", "0.00"]
    assert fixed(-12.6, 0) == "\u221213"
    assert breakable("a_b.<i>") == "a_<wbr>b.<wbr>&lt;i&gt;"
    assert (shortened("abc", 3), shortened("ab cdef", 4)) == ("abc", "ab\u2026")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (StageRow("generate", "k", "done", 10.0, None, {"images": 640}), "64 images/s"),
        (StageRow("generate", "k", "done", 2688.0, None, {"images": 640}), "4.2 s an image"),
        (StageRow("train", "k", "done", 100.0, None, {"steps": 50}), "2.0 s a step"),
        (StageRow("evaluate", "k", "done", 64.0, None, {"prompts": 64}), "2.0 images/s"),
        (StageRow("score", "k", "done", 0.0, None, {"images": 640}), ""),
        (StageRow("score", "k", "done", 1.0, None, {"images": True}), ""),
        (StageRow("cache", "k", "done", 1.0, None, {"samples": 5}), ""),
    ],
)
def test_speed_is_what_was_counted_over_time(row: StageRow, said: str) -> None:
    assert speed(row) == said
    assert speed(row, own=True) == ("" if row.name == "generate" else said)


# ---- the frame


def test_a_page_of_another_kind_uses_the_same_frame() -> None:
    parts = ["<p>one</p>", "", "<p>two</p>"]
    page = document("<b>", parts, header="<header>h</header>", script=False, meta="<meta name=x>")
    assert "<meta name=x>" in page
    assert "<title>&lt;b&gt;</title>" in page
    assert "<body><header>h</header><main>\n<p>one</p>\n<p>two</p>\n</main></body>" in page
    assert "<script" not in page
    assert "script-src" not in page, "default-src 'none' refuses all"
    assert "'sha256-" in policy("1")
    # What would end the script early, or be read as an entity in the policy's attribute.
    assert "</script" not in asset("script.js").lower()
    assert "<!--" not in asset("script.js")
    assert not re.search(r'["&<>]', policy(asset("script.js")))


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, WCAG 2.2."""
    text = "".join(2 * char for char in colour[1:]) if len(colour) == 4 else colour[1:]
    parts = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


TINTS = [f"{way}-{step}" for way in ("up", "down") for step in (1, 2, 3)]


def themes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", asset("style.css"), re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block))
        for name, block in zip(("light", "dark", "print"), blocks, strict=True)
    }


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_stands_out_in_every_theme(theme: str) -> None:
    colours = themes()[theme]
    assert set(colours) == set(themes()["light"])
    pairs = [(ink, ground) for ink in ("ink", "muted", "accent", "good", "bad") for ground in ("paper", "panel")]
    pairs += [("ink", ground) for ground in TINTS]
    low = {pair: ratio for pair in pairs if (ratio := contrast(colours[pair[0]], colours[pair[1]])) < 4.5}
    assert not low
    # Lines and marks of drawings, the divider of a table excepted: 3 to 1.
    assert min(contrast(colours[name], colours["paper"]) for name in ("accent", "good", "bad", "muted")) >= 3


def test_contrast_is_wcags() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_all_text_colours_are_variables() -> None:
    """Or the test above would not see them; those that are written over pictures are looked at here."""
    style = re.sub(r":root \{.*?\}", "", asset("style.css"), flags=re.DOTALL)
    literal = set(re.findall(r"[^-\w](?:color|background): ?(#[0-9a-f]+)", style))
    assert literal == {"#fff", "#000b", "#1b1f24"}  # divider, labels on it, its arrows
    assert contrast("#fff", "#444444") > 4.5  # #000b over white is #444


def test_an_unmeasured_metric_is_no_judge(data: ReportData) -> None:
    rows = [judged("h", 0.1, 0.2), EvalRow("p", False, 0.1, float("nan"), 0.5, 0.0, 0.0, 3)]
    assert [row.metric for row in measured(judged_by(data, rows)).evaluation] == ["h"]
