"""The ``craft-fast`` command line: which commands there are and what all of them share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from craft_cli import completion
from craft_cli import options as opt
from craft_cli.commands import (
    bench,
    bench_rewards,
    bench_sdxl,
    cache,
    compare,
    dataset,
    doctor,
    evaluate,
    expand,
    export,
    generate,
    init,
    lora_apply,
    lora_check,
    lora_convert,
    lora_merge,
    lora_resize,
    plan,
    report,
    rewards_fetch,
    rewards_install,
    rewards_list,
    rewards_score,
    rewards_verify,
    run,
    score,
    status,
    train,
    try_,
    verify,
)
from craft_cli.commands import (
    filter as filter_,
)
from craft_cli.guard import guard
from craft_fast import __version__

_HELP = """Align SDXL to human preference on one GPU, starting from nothing but prompts.

The base model makes candidates, reward models filter them together, the survivors train a LoRA
(CRAFT, arXiv 2603.18991). Without a file or a download, craft-fast run shows it all on a tiny model.

\b
Examples:
  craft-fast run
  craft-fast run prompts.txt --name sea
"""
_EPILOG = """\b
Exit codes:
  0    done
  1    failed
  2    the command line cannot be carried out as typed
  3    a setting or a prompt file is wrong
  4    a package, driver, model file or server is missing
  5    out of memory or out of disk
  6    a file is corrupt, hostile, or not what its record says
  7    a quality gate was not met
  130  stopped by Ctrl-C (SIGINT); the same command continues
  143  stopped by SIGTERM; the same command continues

CRAFT_DEBUG=1 shows tracebacks. craft-fast COMMAND --help shows a command's options.
"""

# Plain help: importing rich would double the start-up time, and its boxes break pasted examples.
app = typer.Typer(
    name="craft-fast",
    help=_HELP,
    epilog=_EPILOG,
    rich_markup_mode=None,
    suggest_commands=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"craft-fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def craft_fast(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print the help when no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "run": (run.run, run.HELP),
    "init": (init.init, init.HELP),
    "plan": (plan.plan, plan.HELP),
    "doctor": (doctor.doctor, doctor.HELP),
    "status": (status.status, status.HELP),
    "verify": (verify.verify, verify.HELP),
    "expand": (expand.expand, expand.HELP),
    "generate": (generate.generate, generate.HELP),
    "score": (score.score, score.HELP),
    "filter": (filter_.filter, filter_.HELP),
    "cache": (cache.cache, cache.HELP),
    "train": (train.train, train.HELP),
    "export": (export.export, export.HELP),
    "evaluate": (evaluate.evaluate, evaluate.HELP),
    "report": (report.report, report.HELP),
    "dataset": (dataset.dataset, dataset.HELP),
    "compare": (compare.compare, compare.HELP),
    "try": (try_.try_, try_.HELP),
}
for _name, (_command, _help) in _COMMANDS.items():
    app.command(_name, help=_help)(guard(_command))

Commands = dict[str, tuple[Callable[..., None], str]]


def _group(name: str, text: str, commands: Commands) -> None:
    """Add ``craft-fast NAME COMMAND`` for each of ``commands``."""
    group = typer.Typer(
        name=name, help=text, rich_markup_mode=None, suggest_commands=True, no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    for command, (function, help_) in commands.items():
        group.command(command, help=help_)(guard(function))
    app.add_typer(group)


_BENCH_COMMANDS: Commands = {
    "kernels": (bench.kernels, bench.KERNELS_HELP),
    "sdxl": (bench_sdxl.sdxl, bench_sdxl.HELP),
    "rewards": (bench_rewards.rewards, bench_rewards.HELP),
}
_group("bench", bench.HELP, _BENCH_COMMANDS)

_REWARDS_HELP = opt.help_text(
    "Reward models: what is here, fetch, verify, rate pictures.",
    "Published reward models by name, where their files go, the authors' packages as a reference, and scores of any "
    "folder of pictures.",
    examples=(
        "craft-fast rewards list",
        "craft-fast rewards score pictures/ --prompt 'a red circle'",
    ),
)
_REWARD_COMMANDS: Commands = {
    "list": (rewards_list.list_, rewards_list.HELP),
    "install": (rewards_install.install, rewards_install.HELP),
    "fetch": (rewards_fetch.fetch, rewards_fetch.HELP),
    "verify": (rewards_verify.verify, rewards_verify.HELP),
    "score": (rewards_score.score, rewards_score.HELP),
}
_group("rewards", _REWARDS_HELP, _REWARD_COMMANDS)

_LORA_HELP = opt.help_text(
    "LoRA files: check, convert, merge, resize, put into a model.",
    "For any LoRA of an SDXL, whichever trainer made it, in the key names of kohya or diffusers. FILE may also be the "
    "name of a run.",
    examples=(
        "craft-fast lora check sea.safetensors",
        "craft-fast lora resize sea --rank 8",
    ),
)
_LORA_COMMANDS: Commands = {
    "check": (lora_check.check, lora_check.HELP),
    "convert": (lora_convert.convert, lora_convert.HELP),
    "merge": (lora_merge.merge, lora_merge.HELP),
    "resize": (lora_resize.resize, lora_resize.HELP),
    "apply": (lora_apply.apply, lora_apply.HELP),
}
_group("lora", _LORA_HELP, _LORA_COMMANDS)


def main() -> None:
    """Entry point of the ``craft-fast`` script."""
    completion.answer(app)
    app(prog_name="craft-fast", args=sys.argv[1:])
