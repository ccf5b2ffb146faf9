"""Options that commands share: each is written once, as an annotated type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from craft_cli import completion

DEFAULT_PRESET, DEFAULT_RUNS = completion.DEFAULT_PRESET, completion.DEFAULT_RUNS
STAGES, DEVICES = completion.STAGES, completion.DEVICES
preset_names, run_names = completion.preset_names, completion.run_names
complete_from, complete_runs = completion.complete_from, completion.complete_runs
complete_presets, complete_rewards = completion.complete_presets, completion.complete_rewards

Prompts = Annotated[
    str | None,
    typer.Argument(metavar="PROMPTS", help="Training prompts: txt, csv, tsv or jsonl.", show_default=False),
]
Texts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A training prompt; give it many times.")
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Own pictures with captions (NAME.txt or metadata.jsonl) in place of the model's variants.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        "-n",
        metavar="NAME",
        autocompletion=complete_runs,
        help="The run's name; the same name continues it. Default: the preset's or the settings file's name.",
    ),
]
Runs = Annotated[
    Path, typer.Option("--runs", metavar="DIR", envvar="CRAFT_RUNS", help="Folder that holds the runs' folders.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Settings in YAML, as craft-fast init writes them. "
        "Default: the ones saved in the run's folder, else the preset.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        autocompletion=complete_presets,
        help=f"Settings to start from: {', '.join(preset_names())}. Default: {DEFAULT_PRESET}.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        autocompletion=completion.complete_set,
        help="Change one setting (train.rank=32); give it many times.",
    ),
]
MaxImages = Annotated[
    int | None, typer.Option("--max-images", metavar="N", min=1, help="Budget: make at most N candidate images.")
]
MaxMinutes = Annotated[
    float | None, typer.Option("--max-minutes", metavar="M", help="Budget: make candidates for at most M minutes.")
]
Vram = Annotated[
    float | None,
    typer.Option(
        "--vram",
        metavar="GIB",
        autocompletion=completion.complete_vram,
        help="Hard cap: use at most so many GiB of the GPU.",
    ),
]
Offline = Annotated[
    bool | None,
    typer.Option(
        "--offline/--online",
        help="Ask no network: all models must be local. Default: online, or what the run was started with.",
        show_default=False,
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until",
        metavar="STAGE",
        autocompletion=complete_from(*STAGES),
        help=f"Stop after this stage: {', '.join(STAGES)}.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def help_text(summary: str, *paragraphs: str, examples: tuple[str, ...]) -> str:
    """A command's help: what it does, then examples that can be pasted."""
    # The backspace tells the formatter to keep the lines of a paragraph as they are.
    shown = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return "\n\n".join([summary, *paragraphs, shown])
