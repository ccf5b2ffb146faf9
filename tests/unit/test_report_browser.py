"""The page in a headless Chromium, one start: what a reader does with mouse, keys, printer, and without a script."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from craft_fast.report import build_report
from craft_fast.store.run import open_run
from tests.unit.chromium import Browser, Tab, chromium
from tests.unit.report_runs import (
    HOSTILE,
    KEYS,
    SETTINGS,
    add_candidates,
    add_evaluation,
    add_stages,
    add_training,
    shapes,
)  # fmt: skip

EVIL = [
    *HOSTILE, "</script><img src=x onerror=\"document.title='owned'\">", '"><svg onload="document.title=\'owned\'">',
    "]]><script>document.title='owned'</script>", "x" * 10_000,
    "\U0001f525 fire \u200f\u05d0 \U0001f9d1\u200d\U0001f680",
]  # fmt: skip
TABLE = "table.prompts"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 24 prompts, the first ten hostile."""
    rng = random.Random(0)
    with open_run(tmp_path_factory.mktemp("browser") / "demo", create=True) as run:
        add_candidates(run, rng, groups=20, accept=True)
        add_evaluation(run, rng, [*EVIL, *shapes(14)], gain=0.02)
        add_training(run, rng, 40)
        add_stages(run)
        return build_report(run, SETTINGS, KEYS)[0]


@pytest.fixture
def tab(browser: Browser, report: Path) -> Iterator[Tab]:
    """The freshly loaded page; afterwards nothing may have been asked for, said, or run that is not ours."""
    opened = browser.page()
    opened.open(report)
    yield opened
    assert opened.asked_for() == [report.as_uri()]
    assert opened.said() == []
    assert opened.run("document.title") == "Shapes, first try"
    opened.close()


def column(tab: Tab, reward: str) -> list[float]:
    """The changes of a reward in the table's present order."""
    head = f"document.querySelector('{TABLE} th[data-reward={reward}]')"
    values: list[float] = tab.run(
        f"[...document.querySelectorAll('{TABLE} tbody tr')].map(row => Number(row.cells[{head}.cellIndex].dataset.v))"
    )
    return values


def head_of(reward: str) -> str:
    return f"{TABLE} th[data-reward={reward}]"


def test_the_divider_moves_by_key_and_by_mouse(tab: Tab) -> None:
    clip = "getComputedStyle(document.querySelector('.stage .over')).clipPath"
    assert tab.run("document.querySelector('.viewer input').value") == "50"
    tab.run("document.querySelector('.viewer input').focus()")
    before = tab.run(clip)
    for _ in range(3):
        tab.press("ArrowRight", 39)
    assert tab.run("document.querySelector('.viewer input').value") == "53"
    assert tab.run("document.querySelector('.viewer input').ariaValueText").startswith("left 53 % base")
    assert before != tab.run(clip) == "inset(0px 47% 0px 0px)"
    box = tab.box(".stage")
    y = box["y"] + box["height"] / 2
    tab.mouse("mousePressed", box["x"] + 0.5 * box["width"], y)
    tab.mouse("mouseMoved", box["x"] + 0.2 * box["width"], y)
    tab.mouse("mouseReleased", box["x"] + 0.2 * box["width"], y, down=False)
    assert tab.run("document.querySelector('.viewer input').value") == "20"
    tab.mouse("mouseMoved", box["x"] + 0.9 * box["width"], y, down=False)
    assert tab.run(clip) == "inset(0px 80% 0px 0px)", "it moves on after the button is up"


def test_the_divider_moves_by_touch(tab: Tab) -> None:
    box = tab.box(".stage")
    x, y = box["x"], box["y"] + box["height"] / 2
    tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x + box["width"] / 2, "y": y}])
    tab.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x + 0.75 * box["width"], "y": y}])
    tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert tab.run("document.querySelector('.viewer input').value") == "75"


def test_the_viewer_goes_through_the_prompts(tab: Tab) -> None:
    shown = "document.querySelector('.viewer .which').textContent"
    assert tab.run(shown) == "prompt 1"
    tab.click(".choose button:first-child")
    assert tab.run(shown) == "prompt 24"
    tab.click(".choose button:last-child")
    tab.click(".choose button:last-child")
    assert tab.run(shown) == "prompt 2"
    tab.run("(s => { s.value = '12'; s.dispatchEvent(new Event('change')) })(document.querySelector('.choose select'))")
    assert tab.run(shown) == "prompt 12"
    assert tab.run("document.querySelector('.viewer .title').textContent") == shapes(2)[1]
    assert tab.run("document.querySelector('.viewer .seed').textContent.length") > 10
    # Its pictures are those of the figure: base over tuned.
    sources = tab.run(
        "[[...document.querySelectorAll('#p12 img')].map(i => i.src),"
        " ['.over', 'img:not(.over)'].map(s => document.querySelector(`.stage ${s}`).src)]"
    )
    assert sources[0] == sources[1]
    # And its scores those of the row, every judge in the same order.
    rows = tab.run("[...document.querySelectorAll('.viewer tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    row = tab.run(f"[...document.querySelector('{TABLE} tr[data-n=\"12\"]').cells].slice(2).map(c => c.textContent)")
    assert [cell for _, *cells in rows for cell in cells] == row
    assert rows[0][0] == "image_reward held out"
    assert [name for name, *_ in rows][4:] == ["h", "p", "a"]


def test_the_table_sorts_both_ways_as_numbers_and_by_enter(tab: Tab) -> None:
    first = column(tab, "image_reward")
    assert first == sorted(first), "worst first"
    assert tab.run(f"document.querySelector('{head_of('image_reward')}').getAttribute('aria-sort')") == "ascending"
    tab.click(f"{head_of('p')} button")
    assert column(tab, "p") == sorted(column(tab, "p"))
    assert column(tab, "image_reward") != first
    tab.press("Enter", 13, "\r")
    assert column(tab, "p") == sorted(column(tab, "p"), reverse=True)
    sorted_by = f"[...document.querySelectorAll('{TABLE} [aria-sort]')].map(h => [h.dataset.reward, h.ariaSort])"
    assert tab.run(sorted_by) == [["p", "descending"]]
    # Oracle's changes are -1, 0 and 1: within each, the order by p stays, whichever way.
    tab.click(f"{head_of('oracle')} button")
    for _ in range(2):
        rows = list(zip(column(tab, "oracle"), column(tab, "p"), strict=True))
        assert len({value for value, _ in rows}) == 3
        for value in (-1.0, 0.0, 1.0):
            same = [p for oracle, p in rows if oracle == value]
            assert same == sorted(same, reverse=True)
        tab.click(f"{head_of('oracle')} button")
    tab.click(f"{TABLE} thead th:nth-child(1) button")
    assert tab.run(f"document.querySelectorAll('{TABLE} tbody td.n')[9].textContent") == "10"


def test_what_was_not_measured_is_last_whichever_way(tab: Tab) -> None:
    tab.run(f"delete document.querySelector('{TABLE} tbody tr').cells[4].dataset.v")
    for _ in range(2):
        tab.click(f"{head_of('image_reward')} button")
        assert column(tab, "image_reward")[-1] is None, "NaN is null in JSON"


def test_rows_are_filtered_by_words_and_columns_chosen(tab: Tab) -> None:
    tab.run("document.querySelector('.tools input').focus()")
    tab.send("Input.insertText", text="GREEN  circle")
    wanted = sum("green" in text and "circle" in text for text in shapes(14))
    assert tab.run(f"[...document.querySelectorAll('{TABLE} tbody tr')].filter(r => !r.hidden).length") == wanted > 0
    assert tab.run("document.querySelector('.tools output').textContent") == f"{wanted} of 24 prompts"
    shown = f"[...document.querySelector('{TABLE} thead tr').cells].filter(c => c.offsetWidth).length"
    assert tab.run(shown) == 2 + 7
    tab.click(".choice input[value=level]")
    assert tab.run(shown) == 2 + 14
    tab.press("ArrowRight", 39)
    assert tab.run(shown) == 2 + 21


@pytest.mark.parametrize("way", ["row", "link", "figure"])
def test_a_row_a_link_and_a_figure_open_the_viewer(tab: Tab, way: str) -> None:
    tab.media(prefers_reduced_motion="reduce")  # or it is on its way yet
    if way == "row":
        tab.click(f"{TABLE} tr[data-n='14'] td.delta")
    elif way == "link":
        tab.run(f"document.querySelector('{TABLE} tr[data-n=\"14\"] a').focus()")
        tab.press("Enter", 13, "\r")
    else:
        tab.click("#p14 .pick")
    assert tab.run("document.querySelector('.viewer .which').textContent") == "prompt 14"
    assert tab.run("document.activeElement.type") == "range"
    top = tab.run("document.querySelector('.viewer').getBoundingClientRect().top")
    assert -1 <= top < 900
    assert tab.run("location.hash") == ""


def test_hostile_prompts_stay_text_in_the_viewer_too(tab: Tab) -> None:
    count = tab.run("document.querySelectorAll('*').length")
    for number, prompt in enumerate(EVIL, 1):
        tab.click(f"#p{number} .pick")
        said = tab.run("document.querySelector('.viewer .title').textContent")
        plain = all((char.isprintable() and char not in "\u202e\u202c") or char == "\u200f" for char in prompt)
        assert (
            said == prompt if plain and "\u200d" not in prompt else "\u2400" in said or "U+" in said or said == prompt
        )
    assert tab.run("document.querySelectorAll('*').length") == count, "no prompt became an element"
    assert tab.run("document.querySelectorAll('script').length") == 1
    assert tab.run("document.querySelectorAll('img[src=x], svg[onload], [onerror]').length") == 0
    assert tab.run("[...document.querySelectorAll('.choose option')].every(o => o.textContent.length < 90)")


def test_a_script_that_got_in_would_not_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    """The policy is the second line of defence: here escaping has failed."""
    holed = tmp_path / "holed.html"
    evil = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    holed.write_text(report.read_text().replace("<h1", evil + "<h1", 1))
    tab = browser.page()
    tab.open(holed)
    assert tab.run("document.title") == "Shapes, first try"
    assert sum("Content Security Policy" in line for line in tab.said()) >= 2
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        tab.run("document.body.innerHTML = '<b>'")
    tab.close()


def test_without_a_script_there_are_pairs_and_a_whole_table(browser: Browser, report: Path) -> None:
    tab = browser.page()
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(report)
    seen = "e => e.checkVisibility()"
    assert tab.run(f"[...document.querySelectorAll('.viewer, .tools, .pick')].some({seen})") is False
    assert tab.run(f"[...document.querySelectorAll('#pictures > .grid img')].filter({seen}).length") == 2 * (16 + 4)
    assert tab.run(f"[...document.querySelectorAll('{TABLE} tbody td')].every({seen})")
    assert tab.run(f"document.querySelectorAll('{TABLE} button').length") == 0
    tab.close()


def test_both_themes_are_drawn(tab: Tab, tmp_path: Path) -> None:
    for scheme, (low, high) in {"light": (240, 255), "dark": (0, 40)}.items():
        tab.media(prefers_color_scheme=scheme)
        with Image.open(tab.screenshot(tmp_path / f"{scheme}.png")) as image:
            shown = image.convert("RGB")
        assert all(low <= value <= high for value in shown.getpixel((2, 2)))  # type: ignore[union-attr]
        assert len(shown.getcolors(maxcolors=10**6) or []) > 20, "the page is blank"


def test_print_shows_pairs_and_no_controls(tab: Tab) -> None:
    tab.media("print")
    seen = "e => e.checkVisibility()"
    controls = "nav, .viewer, .tools, .pick, .choose"
    assert tab.run(f"[...document.querySelectorAll('{controls}')].some({seen})") is False
    assert tab.run(f"[...document.querySelectorAll('#pictures > .grid img')].filter({seen}).length") == 2 * (16 + 4)
    assert tab.run("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    pdf = base64.b64decode(tab.send("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert 4 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page>") <= 20 or b"/Count" in pdf


def test_everything_is_reached_by_tab_and_shows_that_it_is(tab: Tab) -> None:
    controls = json.loads(
        tab.run(
            "JSON.stringify([...document.querySelectorAll('a[href], button, input, select, summary, [tabindex]')]"
            ".filter(e => e.checkVisibility() && (e.type !== 'radio' || e.checked)).length)"
        )
    )
    stops = []
    state = (
        "(e => { e.dataset.seen = (e.dataset.seen || 0) + 1; const s = getComputedStyle(e.matches('.choice input') ?"
        " e.nextElementSibling : e); return [e.tagName, e.dataset.seen, s.outlineStyle, s.outlineWidth] })"
        "(document.activeElement)"
    )
    for _ in range(controls):
        tab.press("Tab", 9)
        stops.append(tab.run(state))
    assert all(seen == "1" for _, seen, *_ in stops), "a control is met twice, or the round ends before all are met"
    assert all((style, width) == ("solid", "2px") for _, _, style, width in stops)
    assert {"A", "BUTTON", "INPUT", "SELECT", "SUMMARY", "DIV"} == {name for name, *_ in stops}


@pytest.mark.parametrize("width", [1100, 400])
def test_nothing_is_wider_than_the_window_and_pictures_have_words(tab: Tab, width: int) -> None:
    tab.resize(width, 800)
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run("[...document.images].every(i => i.alt && i.naturalWidth > 0)")
    assert tab.run("document.querySelectorAll('main, header, nav').length") == 3
    levels = tab.run(
        "[...document.querySelectorAll('h1, h2, h3')].filter(h => h.checkVisibility()).map(h => h.tagName)"
    )
    assert levels[0] == "H1"
    assert levels.count("H1") == 1
    unnamed = "[...document.querySelectorAll('button, input, select, [role=region]')].filter(e =>" \
        " !(e.ariaLabel || e.textContent.trim() || (e.labels && e.labels.length))).length"  # fmt: skip
    assert tab.run(unnamed) == 0


def test_motion_is_asked_for(tab: Tab) -> None:
    behavior = "getComputedStyle(document.documentElement).scrollBehavior"
    tab.media(prefers_reduced_motion="no-preference")
    assert tab.run(behavior) == "smooth"
    tab.media(prefers_reduced_motion="reduce")
    assert tab.run(behavior) == "auto"
