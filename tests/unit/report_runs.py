"""Runs for the report's tests, made through the manifest's own interface: realistic figures, small pictures."""

from __future__ import annotations

import html.parser
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from craft_fast.config import ReportSettings, RewardSettings, Settings, TrainSettings
from craft_fast.records import Candidate, EvalRow, FileRef, Group, Prompt, ScoreRow, Selection, Variant
from craft_fast.report import ReportInputs
from craft_fast.report.inputs import ReportData, gather
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


def fill(run: Run, *, prompts: list[str] | None = None, gain: float = 0.08) -> None:
    rng = random.Random(0)
    add_candidates(run, rng, groups=160, accept=True)
    add_evaluation(run, rng, shapes(64) if prompts is None else prompts, gain=gain)
    add_training(run, rng, 300)
    add_stages(run)


def gathered(folder: Path) -> ReportData:
    """A small run with the means of a LoRA, as the report reads it; tests put other figures in."""
    with open_run(folder / "my run", create=True) as run:
        add_evaluation(run, random.Random(0), shapes(2), gain=0.05)
        add_stages(run)
        lora = run.path("lora", "craft.safetensors")
        lora.parent.mkdir()
        lora.write_bytes(b"not read by the report")
        return gather(run, SETTINGS, KEYS)


def judged(name: str, low: float, high: float, *, held_out: bool = False, n: int = 64, wins: float = 0.55) -> EvalRow:
    """A metric whose mean moved to the middle of this interval."""
    return EvalRow(name, held_out, 0.4, 0.4 + (low + high) / 2, wins, low, high, n)


class Page(html.parser.HTMLParser):
    """Elements and texts of a page, as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style"):
            self.code[self.lasttag] = self.code.get(self.lasttag, "") + data
        else:
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())
