"""Options that commands share: each is written once, as an annotated type."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import craft_fast

DEFAULT_PRESET = "tiny"
DEFAULT_RUNS = Path("runs")


def preset_names() -> list[str]:
    """Names of the presets, read from their folder: ``settings_io`` would bring pydantic and YAML into every help."""
    names = (path.stem for path in Path(craft_fast.__file__).with_name("presets").glob("*.yaml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def complete_from(*words: str) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of some words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _complete_presets(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


def _complete_set(incomplete: str) -> list[str]:
    from craft_fast.settings_io import field_docs

    key, equals, _ = incomplete.partition("=")
    if not equals:
        return [f"{doc.key}=" for doc in field_docs() if doc.key.startswith(key)]
    return [
        choice
        for doc in field_docs()
        if doc.key == key
        for choice in (f"{key}={value}" for value in doc.allowed.split(" | "))
        if " " not in choice and choice.startswith(incomplete)
    ]


def _complete_vram(incomplete: str) -> list[str]:
    return [size for size in ("4", "6", "8", "10", "11", "12", "16", "20", "24", "32") if size.startswith(incomplete)]


def _complete_runs(incomplete: str) -> list[str]:
    return [name for name in run_names(DEFAULT_RUNS) if name.startswith(incomplete)]


def run_names(runs: Path) -> list[str]:
    """Names of the runs in the folder ``runs``, in alphabetical order."""
    return sorted(path.parent.name for path in runs.glob("*/manifest.sqlite")) if runs.is_dir() else []


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
        autocompletion=_complete_runs,
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
        autocompletion=_complete_presets,
        help=f"Settings to start from: {', '.join(preset_names())}. Default: {DEFAULT_PRESET}.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        autocompletion=_complete_set,
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
        "--vram", metavar="GIB", autocompletion=_complete_vram, help="Hard cap: use at most so many GiB of the GPU."
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
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def help_text(summary: str, *paragraphs: str, examples: tuple[str, ...]) -> str:
    """A command's help: what it does, then examples that can be pasted."""
    # The backspace tells the formatter to keep the lines of a paragraph as they are.
    shown = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return "\n\n".join([summary, *paragraphs, shown])
