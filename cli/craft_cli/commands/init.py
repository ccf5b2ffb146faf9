"""``craft-fast init``: write settings to change."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from craft_cli import options as opt
from craft_cli.ui.output import choose_mode, print_result
from craft_fast.errors import UsageError

HELP = opt.help_text(
    "Write all settings as a commented YAML file to change.",
    examples=(
        "craft-fast init",
        "craft-fast init sea.yaml --preset sdxl --set train.rank=32",
    ),
)


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write.")] = Path("craft.yaml"),
    preset: opt.Preset = None,
    overrides: opt.Set = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that is there.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the settings of a preset with every field's meaning, unit, default and source."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    if path.is_dir():
        inside = shlex.join(["craft-fast", "init", str(path / "craft.yaml")])
        raise UsageError("This is a folder", where=str(path), hint=inside)
    if path.exists() and not force:
        raise UsageError("This file exists already", where=str(path), hint="--force replaces it; or give another path")
    from craft_fast.settings_io import load_settings, render_yaml
    from craft_fast.store import atomic

    text = render_yaml(load_settings(preset or opt.DEFAULT_PRESET, None, overrides or ()))
    atomic.make_folder(path.absolute().parent)
    atomic.write_text(path, text)
    next_command = shlex.join(["craft-fast", "run", "--config", str(path)])
    print_result(
        mode, [f"wrote {path}", f"next: {next_command}"], {"path": str(path), "next": next_command}, event="result"
    )
