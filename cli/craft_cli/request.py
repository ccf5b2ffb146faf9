"""What a command line asks for: which run, which settings."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from craft_cli.options import DEFAULT_PRESET, DEFAULT_RUNS, run_names
from craft_fast.errors import ConfigError, UsageError, closest

if TYPE_CHECKING:
    from craft_fast.config import Settings

CONFIG_NAME = "config.yaml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Request:
    """The options of one command line that choose a run and its settings."""

    name: str | None = None
    runs: Path = DEFAULT_RUNS
    config: Path | None = None
    preset: str | None = None
    overrides: Sequence[str] = ()
    prompts: str | None = None
    texts: Sequence[str] = ()
    max_images: int | None = None
    max_minutes: float | None = None
    vram_gib: float | None = None
    offline: bool | None = None
    images: Path | None = None

    @property
    def run_name(self) -> str:
        """The run's name: as given, else that of the settings file, else that of the preset."""
        name = self.name or (self.config.stem if self.config else self.preset) or DEFAULT_PRESET
        if not _NAME.fullmatch(name):
            raise UsageError(
                "This name cannot be a run's",
                where=f"--name {name}",
                why="a name has letters, digits, '_', '-' and '.', begins with a letter or digit, at most 100 in all",
                hint="give another with --name; another folder for all runs with --runs",
            )
        return name

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.runs / self.run_name

    def command(self, verb: str) -> str:
        """A command line for the same run: ``craft-fast train --name sea``."""
        words = ["craft-fast", verb, "--name", self.run_name]
        if self.runs != DEFAULT_RUNS:
            words += ["--runs", str(self.runs)]
        return shlex.join(words)

    def existing_root(self) -> Path:
        """The run's folder, which must hold a run.

        Raises:
            UsageError: it does not; names the runs that are there.
        """
        if (self.root / "manifest.sqlite").exists():
            return self.root
        others = run_names(self.runs)
        there = f"; there are: {', '.join(others[:10])}" if others else ""
        hint = f"{closest(self.run_name, others)}start one: {self.command('run')}{there}"
        raise UsageError("There is no such run", where=str(self.root), hint=hint)


def check(option: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that an option does not have.

    Raises:
        UsageError: names the allowed ones and the closest.
    """
    if value not in allowed:
        raise UsageError(
            f"{option} {value} is unknown",
            where=option,
            why=f"it is one of {', '.join(allowed)}",
            hint=closest(value, allowed).strip(),
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings of a run with what the user should know of how they came about."""

    settings: Settings
    notes: tuple[str, ...]


def resolve(request: Request) -> Resolved:
    """Settings of the run: the file or preset asked for, else those saved in its folder, then the options.

    Where they say offline, Hugging Face's libraries in this process are told so too: call before importing them.

    Raises:
        ConfigError: any setting is wrong; all of them are named.
        UsageError: prompts were given in two ways.
    """
    from craft_fast.settings_io import load_settings

    root = request.root
    saved = root / CONFIG_NAME
    notes = []
    if request.name is None:
        notes.append(f"run: {root} (choose another with --name)")
    overrides = [*request.overrides, *_shortcuts(request)]
    if request.config or request.preset or not saved.exists():
        settings = load_settings(request.preset or DEFAULT_PRESET, request.config, overrides)
    else:
        settings = load_settings(config=saved, overrides=[*_moved_prompts(saved, root), *overrides])
    if saved.exists():
        notes += _changes(load_settings(config=saved), settings)
    if settings.model.offline:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    return Resolved(settings, tuple(notes))


def _shortcuts(request: Request) -> Iterator[str]:
    """The options that are short for a setting, as ``--set`` texts; JSON is YAML, so any text survives."""
    if request.images is not None and (request.prompts is not None or request.texts):
        raise UsageError(
            "Own pictures bring their prompts as captions", where=str(request.images),
            hint="leave the prompts out; held-out ones go to --set prompts.heldout_file=FILE",
        )  # fmt: skip
    if request.prompts is not None and request.texts:
        raise UsageError("Prompts come from a file or from --prompt, not from both", where=request.prompts)
    if request.prompts is not None:
        yield f"prompts.file={json.dumps(_prompt_file(request.prompts), ensure_ascii=False)}"
    if request.texts:
        yield f"prompts.file={json.dumps(str(write_prompts(request.root, request.texts)), ensure_ascii=False)}"
    if request.images is not None:
        folder = request.images.expanduser().absolute()
        yield f"images.folder={json.dumps(str(folder), ensure_ascii=False)}"
    if request.max_images is not None:
        yield f"generate.max_images={request.max_images}"
    if request.max_minutes is not None:
        yield f"generate.max_minutes={float(request.max_minutes)}"
    if request.vram_gib is not None:
        yield f"engine.vram_gib={float(request.vram_gib)}"
    if request.offline is not None:
        yield f"model.offline={json.dumps(request.offline)}"


def _prompt_file(given: str) -> str:
    """The absolute path of a prompt file, so that the run's saved settings mean the same file from any folder.

    Raises:
        ConfigError: there is no such file; found out before a run's folder is made for it.
    """
    if given.startswith("package:"):
        return given
    path = Path(given).expanduser().absolute()
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {path.parent / close[0]}?" if close else "a prompt itself is given with --prompt TEXT"
        raise ConfigError("There is no such prompt file", where=str(path), hint=hint)
    if path.is_dir():
        raise ConfigError("A prompt file is wanted, this is a folder", where=str(path), hint="give one file in it")
    return str(path)


def write_prompts(root: Path, texts: Sequence[str]) -> Path:
    """Keep prompts of the command line in the run's folder, under a name that their content gives."""
    from craft_fast.store import atomic
    from craft_fast.store.digest import sha256_bytes

    lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    path = root.absolute() / f"prompts-{sha256_bytes(lines.encode('utf-8', 'replace'))[:12]}.jsonl"
    if not path.exists():
        atomic.make_folder(path.parent)
        atomic.write_text(path, lines)
    return path


def _moved_prompts(saved: Path, root: Path) -> Iterator[str]:
    """Find the prompts of the command line again after the run's folder was moved."""
    from craft_fast.settings_io import load_settings

    old = Path(load_settings(config=saved).prompts.file)
    here = root.absolute() / old.name
    if re.fullmatch(r"prompts-[0-9a-f]{12}\.jsonl", old.name) and not old.exists() and here.exists():
        yield f"prompts.file={json.dumps(str(here), ensure_ascii=False)}"


def _changes(before: Settings, after: Settings) -> list[str]:
    """One line that names the settings that differ from the run's saved ones."""
    from craft_fast.settings_io import flat

    old, new = flat(before.model_dump()), flat(after.model_dump())
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not changed:
        return []
    shown = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:4]]
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return [f"settings changed since this run was last started: {'; '.join(shown)}{more}"]
