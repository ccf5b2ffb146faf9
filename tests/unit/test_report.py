"""The report of a realistic run, made through the manifest's own interface."""

from __future__ import annotations

import html.parser
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter

from craft_fast.config import FilterSettings, ReportSettings, RewardSettings, Settings, TrainSettings
from craft_fast.records import Candidate, EvalRow, FileRef, Group, Prompt, Provenance, ScoreRow, Selection, Variant
from craft_fast.report import ReportInputs, build_report
from craft_fast.rng import derive_seed
from craft_fast.store.run import Run, open_run

HOSTILE = [
    "<script>document.title='owned'</script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "a \u202ered circle\u202c and \u05e9\u05dc\u05d5\u05dd",
    "\x1b[31mred\x1b[0m \x00 \x07 circle",
    "&lt;b&gt; {{7*7}} %n ../../etc/passwd </title></style>",
]
COLOURS = {"red": "#d33", "blue": "#35c", "green": "#2a4", "yellow": "#ec2", "purple": "#83c"}
TRAINING, HELD_OUT = ["h", "p", "a"], ["image_reward", "oracle_alignment", "oracle_clean", "oracle"]
SETTINGS = Settings(
    seed=7,
    rewards={
        **{name: RewardSettings(kind="clip", path=f"rewards/{name}") for name in TRAINING},
        **{name: RewardSettings(kind="function", path=f"judge:{name}", held_out=True) for name in HELD_OUT},
    },
    train=TrainSettings(steps=300),
    report=ReportSettings(title="Shapes, first try"),
)
KEYS = ReportInputs(
    expand="e" * 64,
    generate="g" * 64,
    filter="f" * 64,
    train="t" * 64,
    evaluate="v" * 64,
    reward_keys={name: f"key-{name}" for name in TRAINING},
    images={"base": ("eval_base", "b" * 64), "tuned": ("eval_tuned", "t" * 64)},
)


def picture(path: Path, colour: str, shape: str, *, blur: float) -> Path:
    size = 64
    image = Image.new("RGB", (size, size), "#888" if blur else "#fff")
    draw = ImageDraw.Draw(image)
    box = [size * 0.2, size * 0.25, size * 0.75, size * 0.8]
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.filter(ImageFilter.GaussianBlur(blur)).save(path)
    return path


def add_candidates(run: Run, rng: random.Random, *, groups: int, accept: bool) -> None:
    """Groups of one plain member and three variants, scored by three rewards and filtered."""
    file = FileRef("candidates/x.png", "0" * 64, 1)
    candidates, scores, selections = [], [], []
    for number in range(groups):
        plain = {name: rng.gauss(0.2, 0.05) for name in TRAINING}
        for member in range(4):
            name = f"c{number}-{member}"
            seed = derive_seed(7, "generate", number)
            candidates.append(Candidate(name, f"p{number}", member, "a red circle", "a red circle", seed, file, file))
            values = {key: value + (rng.gauss(0.02, 0.04) if member else 0) for key, value in plain.items()}
            scores += [ScoreRow(name, key, f"key-{key}", value) for key, value in values.items()]
            passed = {key: member > 0 and values[key] > plain[key] for key in TRAINING}
            accepted = accept and all(passed.values())
            selections.append(Selection(name, f"p{number}", member, accepted, passed, sum(values.values()), 0.0))
    run.manifest.put_candidates(KEYS.generate, candidates)
    run.manifest.put_scores(scores)
    run.manifest.put_selections(KEYS.filter, selections)


def add_evaluation(run: Run, rng: random.Random, prompts: list[str], *, gain: float) -> None:
    """Held-out prompts with two pictures and two scores each, and the table over them."""
    groups, scores = [], []
    files: dict[str, dict[str, FileRef]] = {"base": {}, "tuned": {}}
    for number, text in enumerate(prompts):
        prompt_id = f"h{number}"
        groups.append(Group(Prompt(prompt_id, text, "heldout"), (Variant(prompt_id, 0, text),)))
        colour = next((value for name, value in COLOURS.items() if name in text), "#555")
        shape = "circle" if "circle" in text else "square"
        for side, blur in (("base", 2.2), ("tuned", 0.3 if gain > 0 else 4)):
            path = picture(run.path("samples", f"{side}-{number}.png"), colour, shape, blur=blur)
            files[side][prompt_id] = run.ref(path)
            shift = gain if side == "tuned" else 0.0
            scores += [(side, prompt_id, name, rng.gauss(0.3 + shift, 0.1)) for name in [*TRAINING, *HELD_OUT[:-1]]]
            scores.append((side, prompt_id, "oracle", float(rng.random() < 0.25 + 3 * shift)))
    run.manifest.put_groups(KEYS.expand, groups)
    for side, refs in files.items():
        run.manifest.put_files(*KEYS.images[side], refs)
    run.manifest.put_eval_scores(KEYS.evaluate, scores)
    n = len(prompts)
    rows = [
        EvalRow(name, name in HELD_OUT, 0.3, 0.3 + gain, 0.5 + 2 * gain, gain - 0.03, gain + 0.03, n)
        for name in [*TRAINING, *HELD_OUT[:-1]]
    ]
    rows.append(EvalRow("oracle", True, 0.25, 0.25 + 3 * gain, 0.5 + gain, 3 * gain - 0.1, 3 * gain + 0.1, n))
    run.manifest.put_eval(KEYS.evaluate, rows)


def add_training(run: Run, rng: random.Random, steps: int) -> None:
    for step in range(1, steps + 1):
        run.log("train_step", key=KEYS.train[:16], step=step, loss=0.09 + 0.08 * 0.98**step + rng.gauss(0, 0.012))
    run.log("train_step", key=KEYS.train[:16], step=steps, loss=0.09)
    run.log("train_step", key=KEYS.train[:16], step=steps + 1, loss=float("nan"))
    run.log("train_step", key="of another training", step=steps + 2, loss=1.0)
    for step in (100, 200, 300):
        refs = {}
        for number, colour in enumerate(COLOURS.values()):
            path = run.path("samples", "train", f"{step}-{number}.png")
            refs[f"{step:06d}/h{number}"] = run.ref(picture(path, colour, "circle", blur=2.2 - step / 150))
        run.manifest.put_files("sample", "train", refs)
    lora = run.path("lora", "craft.safetensors")
    lora.parent.mkdir()
    lora.write_bytes(b"not read by the report")


def add_stages(run: Run) -> None:
    costs = {"expand": 0.04, "generate": 71.3, "score": 6.2, "filter": 0.2, "cache": 2.4, "train": 118.0}
    costs |= {"export": 0.4, "evaluate": 31.0}
    for name, seconds in costs.items():
        info = {"images": 480, "images_per_s": 6.73} if name == "generate" else {}
        run.manifest.finish_stage(name, (name[0] * 64), seconds, 0.4 + seconds / 80, info)
    run.manifest.begin_stage("report", "r" * 64)


def shapes(count: int) -> list[str]:
    names = list(COLOURS)
    things = [f"{names[i % 5]} {'circle' if i % 2 else 'square'}" for i in range(count)]
    return [f"a {thing} left of a {names[(i + 2) % 5]} square" for i, thing in enumerate(things)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "runs" / "demo", create=True) as opened:
        yield opened


def fill(run: Run, *, prompts: list[str] | None = None, gain: float = 0.08) -> None:
    rng = random.Random(0)
    add_candidates(run, rng, groups=160, accept=True)
    add_evaluation(run, rng, shapes(64) if prompts is None else prompts, gain=gain)
    add_training(run, rng, 300)
    add_stages(run)


class Page(html.parser.HTMLParser):
    """Elements and texts of a page, as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(run: Run) -> tuple[str, Page]:
    path, _ = build_report(run, SETTINGS, KEYS)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_first_screen_answers_better_by_how_much_at_what_cost(run: Run) -> None:
    fill(run)
    _, page = page_of(run)
    assert "Better On 64 held-out prompts" in page.text
    assert "pictures that pass the oracle rose from 25.0 % to 49.0 %" in page.text
    assert "+24.0 points 95 % interval +14.0 to +34.0" in page.text
    assert "accepted of 640 candidates" in page.text
    assert "3 min 50 s peak memory 1.88 GiB" in page.text


def test_a_worse_model_is_called_worse(run: Run) -> None:
    fill(run, gain=-0.08)
    _, page = page_of(run)
    assert "Worse On 64 held-out prompts" in page.text
    assert "fell from 25.0 % to 1.0 %" in page.text


def test_page_stands_alone(run: Run) -> None:
    fill(run)
    text, page = page_of(run)
    assert len(text.encode()) < 5_000_000
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object", "form"}]
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"@import|url\(", text)
    assert {"http-equiv", "content"} <= next(a for t, a in page.tags if t == "meta" and "http-equiv" in a).keys()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_grid_shows_the_first_prompts_twice_and_the_worst_again(run: Run) -> None:
    fill(run)
    _, page = page_of(run)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * (SETTINGS.report.grid_prompts + 4) + 4 * 4
    assert {image["alt"] for image in images[:2]} == {f"{side}: {shapes(1)[0]}" for side in ("base", "tuned")}
    assert all(image["class"] == "small" for image in images)
    assert "Where it lost most, by image_reward" in page.text


def test_strips_show_training_from_the_base_on(run: Run) -> None:
    fill(run)
    _, page = page_of(run)
    drawn = [str(attributes["alt"]).partition(":")[0] for tag, attributes in page.tags if tag == "img"]
    assert drawn[-16:] == ["base", "step 100", "step 200", "step 300"] * 4
    build_report(run, SETTINGS.model_copy(update={"train": TrainSettings(steps=350)}), KEYS)
    drawn = re.findall(r'alt="([a-z0-9 ]+): a red square', run.path("report.html").read_text())
    assert drawn[-5:] == ["base", "step 100", "step 200", "step 300", "tuned"]


def test_large_pictures_are_made_to_fit(run: Run) -> None:
    rng = random.Random(1)
    add_evaluation(run, rng, shapes(8), gain=0.08)
    for path in run.path("samples").iterdir():
        Image.frombytes("RGB", (512, 512), rng.randbytes(512 * 512 * 3)).save(path)
    text, page = page_of(run)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all((image["src"] or "").startswith("data:image/webp") and "class" not in image for image in images)
    assert len(text.encode()) < 5_000_000


def test_prompts_stay_text(run: Run) -> None:
    fill(run, prompts=HOSTILE)
    text, page = page_of(run)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b\x00"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert HOSTILE[4] in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "\u241b[31mred" in page.text
    assert "\u27e8U+202E\u27e9red circle" in page.text
    assert "\u05e9\u05dc\u05d5\u05dd" in page.text
    assert text.count("<bdi>") == text.count("</bdi>") > 0


def test_json_has_the_fields_that_others_read(run: Run) -> None:
    fill(run)
    _, path = build_report(run, SETTINGS, KEYS)
    data = json.loads(path.read_text())
    accepted = sum(row.accepted for row in run.manifest.selections(KEYS.filter))
    assert data["selection"]["accepted"] == accepted > 0
    assert data["stages"][1] == {"name": "generate", "seconds": 71.3, "peak_gib": pytest.approx(0.4 + 71.3 / 80)}
    assert "report" not in [row["name"] for row in data["stages"]]
    (oracle,) = [row for row in data["evaluation"] if row["metric"] == "oracle"]
    assert oracle == {
        **{"metric": "oracle", "held_out": True, "base_mean": 0.25, "tuned_mean": 0.49, "win_rate": 0.58},
        **{"ci_low": pytest.approx(0.14), "ci_high": pytest.approx(0.34), "n": 64},
    }
    assert data["digests"]["lora"] == {"lora/craft.safetensors": run.ref(run.path("lora", "craft.safetensors")).sha256}


def test_every_reward_says_how_its_scores_came_about(run: Run) -> None:
    fill(run)
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
    assert selection["r_total"] == ["a"]
    text = Page(page.read_text()).text
    assert "alone 75 %" in text
    assert "alone 33 % of 3 asked" in text
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
    _, page = page_of(run)
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
    _, page = page_of(run)
    titles = {
        "candidates": "What was kept",
        "evaluation": "What the judges say",
        "training": "Weighted noise-prediction loss",
        "stages": "What it cost",
    }
    assert {key for key, title in titles.items() if title in page.text} == {part} & titles.keys()


def test_an_evaluation_of_nothing_is_null_and_not_drawn(run: Run) -> None:
    run.manifest.put_eval(KEYS.evaluate, [EvalRow("h", False, 0.1, 0.2, 0.5, float("-inf"), float("inf"), 0)])
    _, page = page_of(run)
    assert "Not evaluated yet" in page.text
    (row,) = json.loads(run.path("report.json").read_text())["evaluation"]
    assert (row["ci_low"], row["n"]) == (None, 0)


def test_addresses_lose_their_passwords(run: Run) -> None:
    expand = SETTINGS.expand.model_copy(update={"base_url": "https://me:geheim@example.test/v1"})
    paths = build_report(run, SETTINGS.model_copy(update={"expand": expand}), KEYS)
    for path in paths:
        assert "geheim" not in path.read_text()
        assert "https://example.test/v1" in path.read_text()


def chromium(page: Path, profile: Path, *options: str) -> str:
    """What a headless browser says to a page on disk."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"]
    command = [browser, *flags, f"--user-data-dir={profile}", "--window-size=900,700", *options, page.as_uri()]
    environment = {**os.environ, "HOME": str(profile)}
    return subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment).stdout.decode()


@pytest.mark.slow
def test_a_browser_draws_it_in_light_and_dark_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    fill(run, prompts=[*HOSTILE, *shapes(11)])
    page, _ = build_report(run, SETTINGS, KEYS)
    chromium(page, tmp_path / "profile", f"--screenshot={tmp_path / 'light.png'}")
    chromium(page, tmp_path / "profile", f"--screenshot={tmp_path / 'dark.png'}", "--force-dark-mode")
    light, dark = (Image.open(tmp_path / name).convert("RGB") for name in ("light.png", "dark.png"))
    assert min(light.getpixel((2, 2))) > 240
    assert max(dark.getpixel((2, 2))) < 40
    assert len(light.getcolors(maxcolors=10**6) or []) > 20, "the page is blank"
    dom = chromium(page, tmp_path / "profile", "--dump-dom")
    assert "<title>Shapes, first try</title>" in dom, "a prompt ran as a script"
