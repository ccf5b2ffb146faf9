"""What to try next: plain rules, each a pure function of the run's figures, with the figure that triggered it.

A rule says nothing unless its figure is beyond its threshold; what is said comes with the command to type.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from craft_fast.records import EvalRow, StageRow
from craft_fast.report import figures
from craft_fast.report.inputs import ReportData
from craft_fast.report.text import duration, number, percent, points, signed

MOST = 5
ALL_PASS = 0.90
"""Above this share of variants a filter hardly filters."""
SAME_VERDICT = 0.95
FEWEST_VERDICTS = 50
ONE_STAGE = 0.60
LONG_S = 600.0
"""Nobody needs a shorter run than ten minutes."""
ENOUGH_PROMPTS = 200
GOOD_WIN_RATE = 0.60
SPIKE = 5.0
"""A step whose loss is so many times the median of all is a spike; timesteps alone make two to three of it."""
LOW_PEAK = 0.60


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try.

    Attributes:
        rule: its name, for scripts.
        title: what to do, plain text.
        why: the figure that triggered it, plain text.
        commands: what to type, one line each; empty where there is no command for it.
    """

    rule: str
    title: str
    why: str
    commands: tuple[str, ...] = ()


Rule = Callable[[ReportData], Advice | None]


def advise(data: ReportData) -> list[Advice]:
    """At most ``MOST`` pieces of advice, the most important first; none when nothing asks for any.

    Args:
        data: the gathered run; ``evaluation`` holds measured rows alone.
    """
    said = [rule(data) for rule in RULES]
    return [item for item in said if item is not None][:MOST]


def command(data: ReportData, *settings: str, options: Sequence[str] = ()) -> str:
    """The command that continues this run with other settings: ``craft-fast run --name sea --set train.steps=75``."""
    words = ["craft-fast", "run", "--name", data.name, *options]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)


# ---- rules, the most important first


def unfinished(data: ReportData) -> Advice | None:
    """Without an evaluation nothing else can be said."""
    if data.evaluation:
        return None
    done = ", ".join(row.name for row in data.stages) or "none"
    return Advice("unfinished", "Let the run finish", f"Stages done so far: {done}.", (command(data),))


def exploited(data: ReportData) -> Advice | None:
    """Training rewards rose and a held-out judge surely fell: the rewards are being exploited."""
    up = [row for row in data.evaluation if not row.held_out and row.ci_low > 0]
    down = [row for row in data.evaluation if row.held_out and row.ci_high < 0]
    if not up or not down:
        return None
    why = f"Held-out {down[0].metric} moved {_moved(down[0])}, while training reward {up[0].metric} moved "
    why += f"{_moved(up[0])}."
    steps, rate = _train(data, "steps"), _train(data, "learning_rate")
    fewer, lower = max(1, steps // 2), f"train.learning_rate={_round(rate / 3)}"
    title = f"Train less: {fewer} steps in place of {steps}, or a third of the learning rate"
    return Advice("exploited", title, why, (command(data, f"train.steps={fewer}"), command(data, lower)))


def got_worse(data: ReportData) -> Advice | None:
    """A held-out judge surely fell and no training reward rose: the training itself goes wrong."""
    down = [row for row in data.evaluation if row.held_out and row.ci_high < 0]
    if not down or any(not row.held_out and row.ci_low > 0 for row in data.evaluation):
        return None
    rate = _train(data, "learning_rate")
    why = f"Held-out {down[0].metric} moved {_moved(down[0])}, and no training reward surely rose."
    title = f"Learn more slowly: a third of the learning rate of {rate:g}"
    return Advice("got_worse", title, why, (command(data, f"train.learning_rate={_round(rate / 3)}"),))


def unsteady(data: ReportData) -> Advice | None:
    """Steps that were not finite, or whose loss leapt."""
    skipped = _info(data, "train", "skipped") or 0
    losses = [loss for _, loss in data.losses]
    middle = sorted(losses)[len(losses) // 2] if losses else 0.0
    spikes = sum(loss > SPIKE * middle for loss in losses)
    if skipped:
        why = f"{skipped} of {len(losses) + skipped} steps gave no finite loss or gradient and were skipped."
    elif spikes >= max(2, len(losses) / 100):
        why = f"{spikes} of {len(losses)} steps had a loss above {SPIKE:.0f} times the median of {number(middle)}."
    else:
        return None
    rate, warmup = _train(data, "learning_rate"), _train(data, "warmup_steps")
    settings = (f"train.learning_rate={_round(rate / 2)}", f"train.warmup_steps={max(10, 2 * warmup)}")
    title = "Steady the training: half the learning rate, twice the warm-up"
    return Advice("unsteady", title, why, (command(data, *settings),))


def nobody_held_out(data: ReportData) -> Advice | None:
    """All judges trained it."""
    if not data.evaluation or any(row.held_out for row in data.evaluation):
        return None
    why = f"All {len(data.evaluation)} rewards filtered or weighted; their gains may be exploitation."
    known = {spec["kind"] for spec in data.settings["rewards"].values()}
    kind = next((name for name in ("image-reward", "mps", "hpsv2.1") if name not in known), "clipscore-b32")
    name = kind.replace("-", "_").replace(".", "_")
    # A run of the embedded model has no use for a judge of photographs; the command is for all others.
    settings = (f"rewards.{name}.kind={kind}", f"rewards.{name}.held_out=true")
    return Advice("nobody_held_out", "Ask a judge that took no part", why, (command(data, *settings),))


def too_few(data: ReportData) -> Advice | None:
    """Fewer accepted than wanted."""
    accepted, wanted = sum(row.accepted for row in data.selections), data.settings["filter"]["target_samples"]
    if not data.selections or accepted >= wanted or _given(data):
        return None
    why, commands = f"{accepted} of {wanted} wanted samples were accepted.", []
    title = "Draw more candidates"
    if accepted:
        title, more, drawn = _more_images(data, accepted, wanted)
        why, commands = f"{why} {more}", drawn
    judged = [step for step in figures.funnel(data.selections, data.filter_rewards)[1:-1] if step.asked]
    if len(judged) > 1:
        strictest = min(judged, key=lambda step: step.alone / step.asked)
        share = percent(strictest.alone / strictest.asked, 0)
        why += f" The strictest reward is {strictest.label}: by itself it lets {share} of the variants pass."
        rest = ", ".join(name for name in data.filter_rewards if name != strictest.label)
        title += f", or filter without {strictest.label}"
        commands.append(command(data, f"filter.rewards=[{rest}]"))
    if data.settings["filter"]["keep"] == "all":
        commands.append(command(data, "filter.keep=each"))
    return Advice("too_few", title, why, tuple(commands))


def _more_images(data: ReportData, accepted: int, wanted: int) -> tuple[str, str, list[str]]:
    """Title, reason and command for more candidates; where the prompts do not suffice, more prompts."""
    images = len(data.candidates)
    members = 1 + max((row.member for row in data.candidates), default=0)
    # A tenth more than the rate says: the next prompts may be harder.
    needed = math.ceil(1.1 * images * wanted / accepted / members) * members
    said = f"At this rate {wanted} take about {needed} images; {images} were made."
    prompts = _info(data, "expand", "train")
    if prompts is not None and needed > prompts * members:
        said += f" The {prompts} training prompts give {prompts * members} at most."
        return f"Add training prompts, about {math.ceil(needed / members)} in all", said, []
    return "Draw more candidates", said, [command(data, options=("--max-images", str(needed)))]


def filters_nothing(data: ReportData) -> Advice | None:
    """Nearly all variants pass."""
    steps = figures.funnel(data.selections, data.filter_rewards)
    if len(steps) < 3 or _given(data) or steps[0].left < FEWEST_VERDICTS:
        return None
    share = steps[-2].left / steps[0].left
    if share <= ALL_PASS:
        return None
    why = f"{percent(share, 0)} of {steps[0].left} variants pass, so the filter chooses next to nothing."
    if data.settings["filter"]["select"] == "top":
        if steps[-1].left <= steps[0].left / 2:
            return None  # r_total chooses
        budget = 2 * len(data.candidates)
        title = "Choose from more: twice the image budget"
        return Advice("filters_nothing", title, why, (command(data, options=("--max-images", str(budget))),))
    budget = max(len(data.candidates), 4 * data.settings["filter"]["target_samples"])
    made = command(data, "filter.select=top", options=("--max-images", str(budget)))
    return Advice("filters_nothing", "Take the best of a budget in place of the first that pass", why, (made,))


def too_few_prompts(data: ReportData) -> Advice | None:
    """The interval of the main judge includes zero, on few prompts."""
    row = figures.primary_row(data.evaluation)
    if row is None or row.n >= ENOUGH_PROMPTS or not row.ci_low <= 0 <= row.ci_high:
        return None
    change, half = row.tuned_mean - row.base_mean, (row.ci_high - row.ci_low) / 2
    there = _info(data, "expand", "heldout") or 0
    why = f"On {row.n} prompts {row.metric} moved {_moved(row)}, which includes no change."
    # The interval narrows with the root of the number of prompts.
    wanted = max(2 * row.n, ENOUGH_PROMPTS)
    if change and half:
        wanted = max(wanted, min(1000, math.ceil(1.2 * row.n * (half / change) ** 2 / 50) * 50))
    title = f"Judge on {min(wanted, there) if there > row.n else wanted} prompts before you judge at all"
    if there <= row.n:
        why += f" All {there or row.n} held-out prompts were used: the file prompts.heldout_file needs more of them."
        return Advice("too_few_prompts", title, why)
    return Advice("too_few_prompts", title, why, (command(data, f"evaluate.prompts={min(wanted, there)}"),))


def no_effect(data: ReportData) -> Advice | None:
    """No judge surely moved, not even one that trained it: it was trained too little."""
    rows = data.evaluation
    if not rows or any(row.ci_low > 0 or row.ci_high < 0 for row in rows):
        return None
    why = f"None of {len(rows)} judges surely moved, not even those that chose the training samples."
    steps = _train(data, "steps")
    title = f"Train more: {2 * steps} steps in place of {steps}"
    return Advice("no_effect", title, why, (command(data, f"train.steps={2 * steps}"),))


def still_learning(data: ReportData) -> Advice | None:
    """It surely got better, and the loss was still falling."""
    judges = [row for row in data.evaluation if row.held_out]
    fell = loss_still_falls([loss for _, loss in data.losses])
    good = [row for row in judges if row.win_rate >= GOOD_WIN_RATE and row.ci_low > 0]
    if not good or any(row.ci_high < 0 for row in judges) or fell is None:
        return None
    steps = _train(data, "steps")
    more = steps * 3 // 2
    rate = percent(good[0].win_rate, 0)
    why = (
        f"{good[0].metric} prefers the tuned model on {rate} of the prompts, and the mean loss of the last third of "
        f"the steps is {percent(fell, 0)} below that of the third before."
    )
    title = f"Train on: {more} steps in place of {steps}"
    return Advice("still_learning", title, why, (command(data, f"train.steps={more}"),))


def same_verdicts(data: ReportData) -> Advice | None:
    """Two rewards of the filter say the same: one of them adds nothing."""
    best: tuple[float, int, str, str] | None = None
    for first, second in combinations(data.filter_rewards, 2):
        rows = [row.passed for row in data.selections if first in row.passed and second in row.passed]
        same = sum(row[first] == row[second] for row in rows) / len(rows) if len(rows) >= FEWEST_VERDICTS else 0.0
        if same > SAME_VERDICT and (best is None or same > best[0]):
            best = (same, len(rows), first, second)
    if best is None:
        return None
    same, count, first, second = best
    rest = ", ".join(name for name in data.filter_rewards if name != second)
    why = f"{first} and {second} give the same verdict on {percent(same, 0)} of {count} variants; one adds nothing."
    title = f"Filter without {second}, or with another reward in its place"
    return Advice("same_verdicts", title, why, (command(data, f"filter.rewards=[{rest}]"),))


def one_stage(data: ReportData) -> Advice | None:
    """One stage takes most of a long run."""
    total = sum(row.seconds for row in data.stages)
    if not data.stages or total < LONG_S:
        return None
    row = max(data.stages, key=lambda row: row.seconds)
    cheaper = _cheaper(data, row)
    if row.seconds <= ONE_STAGE * total or cheaper is None:
        return None
    why = f"{row.name} took {duration(row.seconds)}, {percent(row.seconds / total, 0)} of all."
    return Advice("one_stage", cheaper[0], why, (command(data, *cheaper[1]),))


def _cheaper(data: ReportData, row: StageRow) -> tuple[str, tuple[str, ...]] | None:
    """What makes a stage cheaper that is not in use yet: in words, and as settings."""
    settings = data.settings
    if row.name == "generate":
        if settings["filter"]["select"] == "top" and settings["images"]["folder"] is None:
            return "Draw less: stop at the first samples that pass", ("filter.select=first",)
        if settings["generate"]["guidance_scale"] > 1 and settings["generate"]["guidance_interval"] == [0.0, 1.0]:
            text = "Draw faster: guidance in the middle of the denoising alone, half the work elsewhere"
            return text, ("generate.guidance_interval=[0.1, 0.8]",)
    if row.name == "score" and not settings["score"]["lazy"]:
        return "Ask fewer: rewards that only filter judge what others let through", ("score.lazy=true",)
    if row.name == "train" and settings["train"]["gradient_checkpointing"] == "all":
        return "Keep the activations that there is memory for", ("train.gradient_checkpointing=auto",)
    if row.name == "evaluate" and settings["evaluate"]["prompts"] > ENOUGH_PROMPTS:
        return "Evaluate on fewer prompts while you look for settings", (f"evaluate.prompts={ENOUGH_PROMPTS}",)
    return None


def memory_to_spare(data: ReportData) -> Advice | None:
    """Training stays far below the cap on memory, and more of it would save time."""
    cap, row = data.settings["engine"]["vram_gib"], _stage(data, "train")
    if not cap or row is None or row.peak_gib is None or row.peak_gib >= LOW_PEAK * cap:
        return None
    train = data.settings["train"]
    why = f"Training needed {row.peak_gib:.2f} of the {cap:g} GiB it may use."
    if train["gradient_checkpointing"] == "all":
        title, settings = "Keep activations in place of computing them again", ["train.gradient_checkpointing=auto"]
    elif train["grad_accum_steps"] > 1:
        micro, accum = 2 * train["micro_batch_size"], math.ceil(train["grad_accum_steps"] / 2)
        title = "Larger micro-batches, fewer of them"
        settings = [f"train.micro_batch_size={micro}", f"train.grad_accum_steps={accum}"]
    elif train["method"] == "qlora":
        title, settings = "Train over the unquantised model where it fits", ["train.method=auto"]
    else:
        return None
    return Advice("memory_to_spare", title, why, (command(data, *settings),))


RULES: tuple[Rule, ...] = (
    unfinished, exploited, got_worse, unsteady, nobody_held_out, too_few, no_effect, too_few_prompts,
    filters_nothing, still_learning, same_verdicts, one_stage, memory_to_spare,
)  # fmt: skip


# ---- figures


def loss_still_falls(losses: Sequence[float]) -> float | None:
    """By what share the mean loss of the last third is below that of the third before; None where it surely is not.

    Surely: by more than twice the standard error of the difference, and by at least 2 %.

    Args:
        losses: in order; fewer than thirty say nothing.
    """
    third = len(losses) // 3
    if third < 10:
        return None
    before, after = losses[-2 * third : -third], losses[-third:]
    means = [math.fsum(part) / third for part in (before, after)]
    spread = [
        math.fsum((value - mean) ** 2 for value in part) / (third - 1)
        for part, mean in zip((before, after), means, strict=True)
    ]
    fell = means[0] - means[1]
    if means[0] <= 0 or fell < 0.02 * means[0] or fell <= 2 * math.sqrt(sum(spread) / third):
        return None
    return fell / means[0]


def _moved(row: EvalRow) -> str:
    change = row.tuned_mean - row.base_mean
    if figures.is_rate(row):
        return f"{points(change)} points (95 % interval {points(row.ci_low)} to {points(row.ci_high)})"
    return f"{signed(change)} (95 % interval {signed(row.ci_low)} to {signed(row.ci_high)})"


def _stage(data: ReportData, name: str) -> StageRow | None:
    return next((row for row in data.stages if row.name == name), None)


def _info(data: ReportData, stage: str, name: str) -> int | None:
    row = _stage(data, stage)
    value = row.info.get(name) if row is not None else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _given(data: ReportData) -> bool:
    """Whether selection and weights came with own pictures."""
    row = _stage(data, "expand")
    return row is not None and row.info.get("weights") == "given"


def _train(data: ReportData, name: str) -> Any:
    section: Mapping[str, Any] = data.settings["train"]
    return section[name]


def _round(value: float) -> str:
    return f"{value:.2g}"
