"""``craft-fast rewards score``: rate any pictures against texts, without a run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.request import Request, check, resolve
from craft_cli.signals import StopRequest
from craft_cli.ui.output import Mode, choose_mode, print_result, progress
from craft_cli.ui.text import clean, table, write_line
from craft_fast.errors import EnvironmentProblem, IntegrityError, Interrupted, UsageError, closest
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_cli.ui.sinks import Sink
    from craft_fast.config import RewardSettings, Settings
    from craft_fast.picture_folders import Found
    from craft_fast.rewards.base import Reward
    from craft_fast.rewards.rating import Failure, Rating

HELP = opt.help_text(
    "Rate any folder of pictures.",
    "IMAGES are files, folders with all below (PNG, JPEG, WebP), or lists (csv, jsonl) with a column image. Texts come "
    "from --prompt, from --captions, or from beside the pictures: NAME.txt, NAME.caption, metadata.jsonl. Rewards are "
    "published models by name, or those of a preset, a settings file or a run; by default every published one whose "
    "files are here. Without --output a table is shown, best mean rank first. A score once made is kept in the user's "
    "cache, so the same command goes on where it was stopped and costs nothing when all is known. Pictures that cannot "
    "be read are named, the others rated; the exit code is then 6.",
    examples=(
        "craft-fast rewards score pictures/ --prompt 'a red circle'",
        "craft-fast rewards score pictures/ --captions captions.csv --reward hpsv2.1 --output scores.csv",
        "craft-fast rewards score runs/sea/samples --name sea --prompt 'a ship at sea'",
        "craft-fast rewards score shapes/ --preset tiny --output scores.jsonl --json",
    ),
)
DTYPES = ("auto", "float32", "float16", "bfloat16")
BACKENDS = ("native", "package")
_FAILURES_SHOWN = 10


Images = Annotated[
    list[str], typer.Argument(metavar="IMAGES", help="Pictures, folders of them, or lists.", show_default=False)
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="Text for all pictures; of many, each picture against each."),
]
Captions = Annotated[
    Path | None,
    typer.Option(
        "--captions",
        metavar="FILE",
        help="Texts by picture: csv, tsv or jsonl with image (or file, path) and prompt (or caption, text); "
        "json of name to text.",
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        metavar="NAME",
        autocompletion=opt.complete_rewards,
        help="A published model, as craft-fast rewards list has them, or a name from the settings; give it many times.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", "-n", metavar="NAME", autocompletion=opt.complete_runs, help="Rewards and settings of this run."
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Rewards and settings of this YAML file.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", autocompletion=opt.complete_presets,
        help=f"Rewards and settings of a preset: {', '.join(opt.preset_names())}.",
    ),
]  # fmt: skip
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        autocompletion=opt.complete_from("native", "package"),
        help="native, or package: the authors' own (craft-fast rewards install).",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", autocompletion=opt.complete_from(*opt.DEVICES), help="auto, cpu, cuda or cuda:N."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="NAME", autocompletion=opt.complete_from(*DTYPES), help=f"One of {', '.join(DTYPES)}."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", min=1, help="Pictures scored together at most.")
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write a row for each picture, text and reward; - is stdout."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        autocompletion=opt.complete_from("csv", "jsonl", "json"),
        help="csv, jsonl or json. Default: by the file's suffix; without --output, to stdout.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Score anew what is known already.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first picture that cannot be read.")]


def score(
    images: Images,
    prompts: Prompt = None,
    captions: Captions = None,
    rewards: Rewards = None,
    output: Output = None,
    form: Format = None,
    name: Name = None,
    config: Config = None,
    preset: Preset = None,
    overrides: opt.Set = None,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    offline: opt.Offline = None,
    fresh: Fresh = False,
    strict: Strict = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rate, write the rows, and say which pictures could not be read."""
    from craft_fast.picture_folders import find_pictures, give_prompts
    from craft_fast.rewards.rating_output import check_output, choose_format

    mode = choose_mode(as_json=as_json, quiet=quiet)
    output = "-" if output is None and form is not None else output
    form = choose_format(output, form)
    if output == "-" and as_json:
        raise UsageError("--output - and --json both write to stdout", hint="give --output a file's name")
    check("--backend", backend or "native", BACKENDS)
    check("--dtype", dtype or "auto", DTYPES)
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    shorts = {"model.device": device, "score.dtype": dtype, "score.batch_size": batch_size}
    given = [*(overrides or ()), *(f"{key}={value}" for key, value in shorts.items() if value is not None)]
    settings = _settings(Request(name, runs, config, preset, given, offline=offline))
    found = find_pictures(images)
    chosen = choose(settings, rewards or (), backend, whole=bool(name or config or preset), overrides=given)
    sees_text = [reward for reward, spec in chosen.items() if looks_at_text(spec)]
    give_prompts(found, prompts=prompts or (), captions=captions, needed=bool(sees_text))
    if output not in (None, "-"):
        check_output(Path(str(output)), found.sources)
    with progress(mode) as sink:
        for note in found.notes:
            sink.warn(note)
        rating = _rate(found, chosen, settings, sink, fresh=fresh, strict=strict, blind=set(chosen) - set(sees_text))
    if rating.rows:
        _write(rating, output, form)
    _tell(mode, rating, found, output, form)
    if rating.failures:
        raise _not_all(rating.failures, len(found.pictures), written=bool(rating.rows))


def _settings(request: Request) -> Settings:
    """The settings asked for; without a run, preset or file the bare ones, whose rewards then do not count."""
    if request.name is not None:
        request.existing_root()
    if request.name or request.config or request.preset:
        return resolve(request).settings
    # A preset that is named, so that the settings of a run in ./runs/tiny are not looked at.
    return resolve(replace(request, preset=opt.DEFAULT_PRESET)).settings


def choose(
    settings: Settings, wanted: Sequence[str], backend: str | None, *, whole: bool, overrides: Iterable[str] = ()
) -> dict[str, RewardSettings]:
    """The rewards to ask, by name.

    Args:
        settings: their section of rewards counts when ``whole``, else only what ``overrides`` put there.
        wanted: names; empty: all of the section, or every published one whose files are here.
        backend: asked for, or None: as the settings have it.
        whole: a run, preset or settings file was named.
        overrides: the ``--set`` texts.

    Raises:
        UsageError: an unknown name. EnvironmentProblem: no reward's files are here.
    """
    from craft_fast.config import OFFICIAL_REWARDS

    put = {text.partition("=")[0].split(".")[1] for text in overrides if text.startswith("rewards.")}
    section = {name: spec for name, spec in settings.rewards.items() if whole or name in put}
    names = list(dict.fromkeys(wanted)) or list(section) or _here(backend)
    known = [*section, *OFFICIAL_REWARDS]
    for name in names:
        if name not in known:
            raise UsageError(
                "There is no such reward", where=f"--reward {name}", why=f"known are {', '.join(known)}",
                hint=f"{closest(name, known)}--preset, --config or --name bring the rewards of settings",
            )  # fmt: skip
    chosen = {name: section[name] if name in section else _official(name) for name in names}
    if backend is None:
        return chosen
    return {name: spec.model_copy(update={"backend": backend}) for name, spec in chosen.items()}


def _official(name: str) -> RewardSettings:
    from craft_fast.config import RewardSettings
    from craft_fast.rewards.catalog import get

    return RewardSettings(kind=name, held_out=get(name).held_out_advised)


def _here(backend: str | None) -> list[str]:
    """Published rewards whose files are on this machine, and that have the backend."""
    from craft_fast.rewards.catalog import OFFICIALS
    from craft_fast.rewards.shelf import find, shelf

    fitting = [one for one in OFFICIALS.values() if backend != "package" or one.package]
    names = [one.name for one in fitting if not (have := find(one)).missing and not have.problems]
    if not names:
        raise EnvironmentProblem(
            "No reward model's files are on this machine",
            where=str(shelf()),
            why="none was named, and none of the published ones is here",
            hint="craft-fast rewards fetch hpsv2.1; or, without a download, --preset tiny --reward h, which knows "
            "coloured shapes and takes pictures of 64x64 px",
        )
    return names


def looks_at_text(spec: RewardSettings) -> bool:
    """Whether a reward needs a text; of functions and plug-ins it is not known, so they do."""
    return spec.kind not in ("aesthetic", "aesthetic-v2")


def _rate(
    found: Found, chosen: dict[str, RewardSettings], settings: Settings, sink: Sink, *, fresh: bool, strict: bool,
    blind: set[str],
) -> Rating:  # fmt: skip
    """Open the rewards and the memory of scores, rate, close both."""
    stop = StopRequest(sink.stopping)
    with stop.installed(), ExitStack() as stack:
        from craft_fast.rewards.memory import ScoreMemory, memory_path
        from craft_fast.rewards.rating import rate
        from craft_fast.rewards.registry import load_reward
        from craft_fast.sdxl.load import pick_device

        device = pick_device(settings.model.device)
        opened: list[Reward] = []
        sink.stage("rewards", 1, len(chosen) + 2)
        for name, spec in chosen.items():
            # Not resident: a network is read when its first picture comes, and not at all when every score is known.
            reward = load_reward(
                name, spec, device, offline=settings.model.offline, resident=False, dtype=settings.score.dtype,
                attention=settings.engine.attention, progress=sink,
            )  # fmt: skip
            stack.callback(reward.close)
            opened.append(reward)
        try:
            path = memory_path()
        except RuntimeError as error:
            path = None
            sink.warn(f"scores are not kept for a later command: {error}")
        memory = stack.enter_context(ScoreMemory(path, warn=sink.warn))
        try:
            return rate(
                found.pictures, opened, memory=memory, batch_size=settings.score.batch_size, blind=blind, fresh=fresh,
                strict=strict, progress=sink, stages_before=1, should_stop=stop,
            )  # fmt: skip
        except Interrupted as stopped:
            raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped


# ---- what comes out


def _write(rating: Rating, output: str | None, form: str) -> None:
    from craft_fast.rewards.rating_output import chunks, write_scores

    if output is None:
        return
    if output != "-":
        write_scores(Path(output), rating.rows, form)
        return
    for text in chunks(rating.rows, form):
        # A terminal must not be driven by a prompt; a pipe gets the bytes that a file would.
        if sys.stdout.isatty():
            write_line(sys.stdout, clean(text.rstrip("\r\n")))
        else:
            sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.flush()


def _tell(mode: Mode, rating: Rating, found: Found, output: str | None, form: str) -> None:
    from craft_fast.rewards.rating_output import MOST_SHOWN, summary, wide_table

    rewards = summary(rating)
    texts = len({row.prompt for row in rating.rows})
    pairs = len(rating.rows) // max(1, len(rating.judges))
    data = {
        "ok": not rating.failures,
        "output": output,
        "format": form if output else None,
        "folder": str(found.folder),
        "pictures": len(found.pictures),
        "rated": len(found.pictures) - len(rating.failures),
        "texts": texts,
        "scores": len(rating.rows),
        "scores_known": rating.known,
        "scores_made": rating.made,
        "rewards": rewards,
        "failures": [{"image": one.image, "why": one.why} for one in rating.failures],
    }
    lines: list[str] = []
    if rating.rows and output is None:
        cells = wide_table(rating)
        lines += [*table(cells, right=range(len(cells[0]) - len(rating.judges) - 1, len(cells[0]))), ""]
        if pairs > MOST_SHOWN:
            lines.append(f"the best {MOST_SHOWN} of {pairs} are shown")
    if rating.rows:
        lines += [*table(_summary_cells(rewards), right=range(1, 5)), ""]
    lines += _cut_lines(rewards)
    rated = f"{data['rated']} of {data['pictures']} pictures rated"
    lines.append(f"{rated}: {rating.made} scores made, {rating.known} known before")
    if rating.rows:
        lines.append(f"scores: {output}" if output else "--output scores.csv writes every score with how it came about")
    if output == "-":
        # Stdout is the file.
        if mode == "human":
            for line in lines:
                write_line(sys.stderr, clean(line))
        return
    print_result(mode, lines, data, event="result")


def _summary_cells(rewards: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["reward", "mean", "lowest", "highest", "scores", "how"]]
    for one in rewards:
        how = ", ".join(filter(None, [one["backend"], one["precision"], one["preprocessing"]]))
        rows.append([one["reward"], *(f"{one[key]:.4f}" for key in ("mean", "min", "max")), str(one["n"]), how])
    return rows


def _cut_lines(rewards: list[dict[str, Any]]) -> list[str]:
    cut = [one for one in rewards if one["texts_cut"]]
    return [
        f"{one['reward']}: {one['texts_cut']} texts are longer than it reads; it saw their beginning" for one in cut
    ]


def _not_all(failures: Sequence[Failure], pictures: int, *, written: bool) -> IntegrityError:
    from craft_fast.prompt_lines import excerpt

    shown = "".join(f"\n    {excerpt(one.image, 200)}: {excerpt(one.why, 300)}" for one in failures[:_FAILURES_SHOWN])
    more = f"\n    and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
    others = "; the scores of the others are there" if written else ""
    return IntegrityError(
        f"{len(failures)} of {pictures} pictures could not be rated{others}",
        why=shown + more,
        hint="mend or take away these files, then type the same command: what was scored is not scored again",
    )
