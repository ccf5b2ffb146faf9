"""``craft-fast rewards verify``: do our networks score as the authors' own code does?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.request import check
from craft_cli.signals import StopRequest
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import EnvironmentProblem, Interrupted, QualityGateError, UsageError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.rewards.parity import Parity

HELP = opt.help_text(
    "Score the same pictures both ways.",
    "hpsv2.1, hpsv2.0 and image-reward are held against their package's own score() (craft-fast rewards install), the "
    "others against plain transformers; the largest difference is printed, and what half precision does to the scores. "
    "Above the tolerance the exit code is 7. Nothing is downloaded: a reward whose files or package are missing is "
    "named with the command that gets them, exit code 4 where it was asked for, or where nothing could be compared.",
    examples=(
        "craft-fast rewards verify",
        "craft-fast rewards verify hpsv2.1 --images pictures/",
        "craft-fast rewards verify pickscore --dtype bfloat16 --json",
    ),
)
DTYPES = ("all", "none", "float16", "bfloat16")
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        autocompletion=opt.complete_rewards,
        help="Published models; all whose files are here unless named.",
    ),
]
Images = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Pictures to score. Default: a few drawn by code.")
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Texts to score them against, in turn.")
]
Tolerance = Annotated[
    float,
    typer.Option("--tolerance", metavar="X", min=0, help="Largest difference that is right, of scores up to 1."),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", autocompletion=opt.complete_from(*opt.DEVICES), help="auto, cpu or cuda."),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=opt.complete_from(*DTYPES),
        help="Half precisions to measure: all, none, float16 or bfloat16.",
    ),
]
Folder = Annotated[
    Path | None, typer.Option("--path", metavar="FOLDER", help="Where the one named reward's files are.")
]


def verify(
    names: Names = None,
    images: Images = None,
    prompts: Prompt = None,
    tolerance: Tolerance = 1e-5,
    device: Device = "cpu",
    dtype: Dtype = "all",
    path: Folder = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare, print, and refuse what differs."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    check("--device", device, ("auto", "cpu", "cuda"))
    check("--dtype", dtype, DTYPES)
    if path is not None and len(names or ()) != 1:
        raise UsageError("--path needs one NAME", where=str(path), why="it is where that reward's files are")
    # Before anything imports torch: threads that wait must not spin, and import notices stay off the screen.
    quiet_third_party()
    with progress(mode) as sink:
        stop = StopRequest(sink.stopping)
        with stop.installed():
            try:
                found, missing = _compare(names, images, prompts, tolerance, device, dtype, path, sink, stop)
            except Interrupted as stopped:
                raise Interrupted(stopped.what, exit_code=stop.exit_code, hint=stopped.hint) from stopped
    absent = [{"reward": name, "why": error.why or error.what, "fix": error.hint} for name, error in missing.items()]
    data = {"ok": all(one.ok for one in found), "compared": [one.as_dict() for one in found], "missing": absent}
    print_result(mode, report_lines(found, missing), data, event="result")
    _refuse(found, missing, names or ())


def _compare(
    names: list[str] | None,
    images: Path | None,
    prompts: list[str] | None,
    tolerance: float,
    device: str,
    dtype: str,
    path: Path | None,
    sink: Any,
    stop: StopRequest,
) -> tuple[list[Parity], dict[str, EnvironmentProblem]]:
    import torch

    from craft_fast.config import OFFICIAL_REWARDS
    from craft_fast.picture_folders import find_pictures
    from craft_fast.rewards import parity
    from craft_fast.store.safe_load import read_image

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if where == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("There is no CUDA device", where="--device cuda", hint="--device cpu")
    dtypes = {"all": parity.HALVES, "none": ()}.get(dtype, (dtype,))
    given = [read_image(one.path) for one in find_pictures([images]).pictures] if images is not None else []
    found: list[Parity] = []
    missing: dict[str, EnvironmentProblem] = {}
    wanted = list(dict.fromkeys(names or OFFICIAL_REWARDS))
    with sink.task("compare", len(wanted), "rewards") as task:
        for name in wanted:
            hostile = parity.package_for(name) is not None
            pictures, texts = parity.sample(given, prompts or (), hostile=hostile)
            try:
                source = parity.find_source(name, path)
                one = parity.compare(
                    name, source, where, pictures=pictures, prompts=texts, tolerance=tolerance, dtypes=dtypes,
                    should_stop=stop,
                )  # fmt: skip
                found.append(one)
            except EnvironmentProblem as error:
                missing[name] = error
            task.advance()
    return found, missing


def report_lines(found: list[Parity], missing: dict[str, EnvironmentProblem]) -> list[str]:
    """What was found, for a person."""
    lines: list[str] = []
    if found:
        rows = [["reward", "pairs", "scores", "largest difference", "allowed", "", "against"]]
        for one in found:
            scores = f"{one.lowest:.4g} to {one.highest:.4g}"
            verdict = "ok" if one.ok else "TOO FAR"
            rows.append(
                [one.reward, str(one.pairs), scores, f"{one.largest:.2e}", f"{one.allowed:.0e}", verdict, one.against]
            )
        lines += table(rows, right=(1, 3, 4))
    for one in found:
        for half in one.deviations:
            told = f"largest {half.largest:.2e}, mean {half.mean:.2e}"
            lines.append(f"{one.reward} in {half.dtype}: {told} from its own float32 on {one.device}")
    for name, error in missing.items():
        lines.append(f"{name}: not compared: {error.what}")
        if error.hint:
            lines.append(f"  next: {error.hint}")
    return lines


def _refuse(found: list[Parity], missing: dict[str, EnvironmentProblem], named: list[str] | tuple[str, ...]) -> None:
    far = [one for one in found if not one.ok]
    if far:
        worst = max(far, key=lambda one: one.largest / one.allowed if one.allowed else one.largest)
        raise QualityGateError(
            "A reward does not score as its reference does",
            where=", ".join(one.reward for one in far),
            why=f"{worst.reward}: {worst.largest:.2e} apart at {worst.at}, {worst.allowed:.0e} is allowed",
            hint=f"craft-fast rewards fetch {worst.reward} checks the files' sha256",
        )
    absent = [name for name in missing if name in named] or ([] if found else list(missing))
    if absent:
        first = missing[absent[0]]
        briefly = f"{absent[0]}: {first.what}; and {len(absent) - 1} more"
        raise EnvironmentProblem(
            "Not all that was asked for could be compared" if found else "No reward could be compared",
            where=", ".join(absent),
            why=f"{first.what}: {first.why}" if named else briefly,
            hint=first.hint,
        )
