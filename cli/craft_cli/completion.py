"""What the shell is offered for a word: runs, presets, stages, settings and their values. Nothing here loads torch."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import craft_fast

if TYPE_CHECKING:
    from craft_fast.settings_io import FieldDoc

DEFAULT_PRESET = "tiny"
DEFAULT_RUNS = Path("runs")
# craft_fast.pipeline has them too, but brings torch; a test holds the two together.
STAGES = ("expand", "generate", "score", "filter", "cache", "train", "export", "evaluate", "report")
DEVICES = ("auto", "cpu", "cuda")

Complete = Callable[..., list[str]]
_SIZES_GIB = ("4", "6", "8", "10", "11", "12", "16", "20", "24", "32")
# Free texts of which the usual values are worth offering.
_USUAL = {"model.device": DEVICES, "filter.rewards": ("[]",)}
_ASKED = "_CRAFT_FAST_COMPLETE"


def preset_names() -> list[str]:
    """Names of the presets, read from their folder: ``settings_io`` would bring pydantic and YAML into every help."""
    names = (path.stem for path in Path(craft_fast.__file__).with_name("presets").glob("*.yaml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def run_names(runs: Path) -> list[str]:
    """Names of the runs in the folder ``runs``, in alphabetical order."""
    return sorted(path.parent.name for path in runs.glob("*/manifest.sqlite")) if runs.is_dir() else []


def complete_from(*words: str) -> Complete:
    """Completion of an option that takes one of some words."""

    def complete(incomplete: str) -> list[str]:
        return _begin(words, incomplete)

    return complete


def complete_runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs in the folder of ``--runs`` as typed before, else of CRAFT_RUNS; those named already are left out."""
    folder = Path(ctx.params.get("runs") or DEFAULT_RUNS).expanduser()
    lists = [value for value in ctx.params.values() if isinstance(value, list | tuple)]
    named = {str(word).partition(":")[0] for words in lists for word in words}  # sea:0.5 is a run with a weight
    return [name for name in _begin(run_names(folder), incomplete) if name not in named]


def complete_presets(incomplete: str) -> list[str]:
    """Names of presets."""
    return _begin(preset_names(), incomplete)


def complete_rewards(incomplete: str) -> list[str]:
    """Published reward models."""
    from craft_fast.config import OFFICIAL_REWARDS

    return _begin(OFFICIAL_REWARDS, incomplete)


def complete_set(ctx: typer.Context, incomplete: str) -> list[str]:
    """Settings as ``KEY=``; of the only one that is left also its values, so that a shell sets no space after ``=``."""
    key, equals, _ = incomplete.partition("=")
    docs = [doc for doc in _settings(ctx) if doc.key == key or (not equals and doc.key.startswith(key))]
    if len(docs) != 1:
        return [f"{doc.key}=" for doc in docs]
    values = [f"{docs[0].key}={value}" for value in _values(docs[0])]
    return _begin(values if equals else [f"{docs[0].key}=", *values], incomplete)


def complete_vram(incomplete: str) -> list[str]:
    """Sizes of cards, GiB."""
    return _begin(_SIZES_GIB, incomplete)


def _begin(words: Any, incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _settings(ctx: typer.Context) -> Iterator[FieldDoc]:
    """Every setting; of ``rewards`` those of the preset's."""
    from craft_fast.config import RewardSettings
    from craft_fast.errors import CraftError
    from craft_fast.settings_io import field_docs, load_settings

    for doc in field_docs():
        if doc.key != "rewards":
            yield doc
            continue
        with contextlib.suppress(CraftError):
            for name in load_settings(str(ctx.params.get("preset") or DEFAULT_PRESET)).rewards:
                yield from field_docs(RewardSettings, f"rewards.{name}.")


def _values(doc: FieldDoc) -> list[str]:
    """Values to offer for a setting: its choices, else the usual ones, else its default."""
    from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES
    from craft_fast.settings_yaml import dump_inline

    if re.fullmatch(r"rewards\.\w+\.kind", doc.key):
        return list(dict.fromkeys([*OFFICIAL_REWARDS, *REWARD_FAMILIES, "function"]))
    if doc.key in _USUAL:
        return list(_USUAL[doc.key])
    if isinstance(doc.default, bool):
        return ["true", "false"]
    if re.fullmatch(r"[\w.-]+( \| [\w.-]+)*", doc.allowed):
        return doc.allowed.split(" | ")
    value = dump_inline(doc.default)
    return [value] if re.fullmatch(r"[\w.:/-]+", value) else []


# ---- bash


def rejoin(words: list[str], at: int) -> tuple[list[str], int, str]:
    """Put together what bash took apart: to it ``=`` and ``:`` end a word (COMP_WORDBREAKS).

    Args:
        words: the command line, as bash's COMP_WORDS has it.
        at: which of them the cursor is in (COMP_CWORD).

    Returns:
        The words up to the cursor's, the index of that one, and what of its beginning bash does not replace.
    """
    whole: list[str] = []
    kept = ""
    glue = False
    # An empty word at the end is lost where the words are joined and taken apart.
    for word in [*words, *[""] * (at + 1 - len(words))][: at + 1]:
        breaks = re.fullmatch(r"[=:]+", word) is not None
        kept = ""
        if whole[1:] and (glue or breaks):
            kept = whole[-1] + (word if breaks else "")
            whole[-1] += word
        else:
            whole.append(word)
        glue = breaks
    return whole, len(whole) - 1, kept


def answer(app: Callable[..., Any]) -> None:
    """Answer a shell that asks for completions; return where none asks.

    Args:
        app: the command; it finds the words in the environment.
    """
    asked = os.environ.get(_ASKED, "")
    if not asked:
        return
    # Typer renders the options' texts for a terminal of this width, and fish takes a second line for another word.
    os.environ["COLUMNS"] = "10000"
    if asked == "complete_bash":
        _answer_bash(app)


def _answer_bash(app: Callable[..., Any]) -> None:
    kept = ""
    with contextlib.suppress(KeyError, ValueError):
        words, at, kept = rejoin(os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"]))
        os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(at))
    # Of --set=train.ra the option is no part of what is offered.
    offered = kept.partition("=")[2] if kept.startswith("-") else kept
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        app(prog_name="craft-fast", args=[])
    sys.stdout.write("".join(f"{line.removeprefix(offered)}\n" for line in said.getvalue().splitlines()))
    raise SystemExit(0)
