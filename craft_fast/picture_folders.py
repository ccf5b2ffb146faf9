"""Pictures and their texts: folders, files, lists, captions. No torch here.

A picture's name in all results is its path below the closest folder that all arguments share, so that a table of
scores means the same on another machine.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from craft_fast.errors import ConfigError, UsageError
from craft_fast.picture_tables import LISTS, Row, read_rows, read_text
from craft_fast.prompt_lines import excerpt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BESIDE = (".txt", ".caption")  # kohya's two names of a caption's file
METADATA = ("metadata.jsonl", "metadata.csv")  # the imagefolder layout of Hugging Face datasets
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to rate.

    Attributes:
        name: path below the folder that all pictures share, POSIX.
        path: the file.
        prompts: texts it is judged against, each once.
        top: the folder it was found in by its argument; captions are looked for up to there.
        typed: its path as the command line or the list has it.
    """

    name: str
    path: Path
    prompts: tuple[str, ...] = ()
    top: Path = Path()
    typed: str = ""


@dataclass(slots=True)
class Found:
    """What arguments led to.

    Attributes:
        pictures: each file once, in natural order within an argument.
        folder: that the names are below.
        sources: tables that pictures and texts were read from; none of them may be overwritten.
        notes: what a person should know.
    """

    pictures: list[Picture] = field(default_factory=list)
    folder: Path = Path()
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which 9.png comes before 10.png."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part), part) if part.isdigit() and part.isascii() else (1, 0, part.casefold()) for part in parts]


def find_pictures(arguments: Sequence[str | Path]) -> Found:
    """The pictures of files, folders (with all below, hidden ones left out) and lists (csv, tsv, jsonl, json).

    Raises:
        UsageError: an argument is not there, or there is no picture at all.
        ConfigError: a list cannot be read.
    """
    found = Found()
    pictures: dict[Path, Picture] = {}
    tops: list[Path] = []
    given = [Path(argument).expanduser() for argument in arguments]
    stems = {path.with_suffix("").absolute() for path in given if path.suffix.lower() in SUFFIXES}
    for argument in given:
        if argument.suffix.lower() in BESIDE and argument.with_suffix("").absolute() in stems:
            continue  # of a shell's pictures/*
        top, listed = _pictures_of(argument, found)
        tops.append(top)
        for picture in listed:
            before = pictures.get(picture.path.absolute(), picture)
            prompts = tuple(dict.fromkeys((*before.prompts, *picture.prompts)))
            pictures[picture.path.absolute()] = replace(before, prompts=prompts)
    if not pictures:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        where = ", ".join(map(str, given[:_SHOWN]))
        raise UsageError("No picture was found", where=where, why=f"looked for {kinds}; hidden files are left out")
    found.folder = Path(os.path.commonpath([os.path.normpath(top.absolute()) for top in tops]))
    found.pictures = [replace(picture, name=_name(picture.path, found.folder)) for picture in pictures.values()]
    return found


def _name(path: Path, folder: Path) -> str:
    # A list may name pictures of other folders; ".." says so without this machine's own folders.
    return Path(os.path.relpath(os.path.normpath(path.absolute()), folder)).as_posix()


def _pictures_of(argument: Path, found: Found) -> tuple[Path, list[Picture]]:
    """The folder that an argument's names are below, and its pictures."""
    if argument.is_dir():
        walked = [path.relative_to(argument) for path in _walk(argument, found.notes)]
        walked.sort(key=lambda path: [natural(part) for part in path.parts])
        return argument, [Picture("", argument / path, (), argument, str(argument / path)) for path in walked]
    if not os.path.lexists(argument):
        beside = os.listdir(argument.parent) if argument.parent.is_dir() else []
        close = difflib.get_close_matches(argument.name, beside, n=1)
        hint = f"did you mean {argument.parent / close[0]}?" if close else "check the path"
        raise UsageError("There is no such file or folder", where=str(argument), hint=hint)
    top = argument.parent
    if argument.suffix.lower() not in LISTS:
        return top, [Picture("", argument, (), top, str(argument))]
    found.sources.append(argument)
    pictures = []
    for row in read_rows(argument, "list of pictures"):
        if not row.image:
            raise ConfigError(
                "A line of the list names no picture.",
                where=f"{argument}, line {row.line}",
                hint="a column (or key) named image, file, path or file_name holds it",
            )
        # NUL cannot be in a path: opening one raises ValueError.
        path = top / Path(row.image.replace("\0", "�")).expanduser()
        pictures.append(Picture("", path, () if row.text is None else (row.text,), path.parent, row.image))
    return top, pictures


def _walk(folder: Path, notes: list[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        notes.append(f"a folder cannot be looked into: {excerpt(str(error.filename), 200)}: {error.strerror}")

    for here, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here, name)
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES and path.is_file():
                yield path


# ---- captions


def give_prompts(
    found: Found, *, prompts: Sequence[str] = (), captions: Path | None = None, needed: bool = True
) -> None:
    """Give every picture its texts: ``prompts`` for all; else those of ``captions``; else what lies beside it.

    Beside a picture are, in this order: the list that named it, NAME.txt or NAME.caption, and metadata.jsonl or
    metadata.csv in its folder or one above it, up to the argument's.

    Args:
        found: as ``find_pictures`` gave it; its pictures, sources and notes are set.
        prompts: texts for all pictures.
        captions: a file of texts by picture.
        needed: a picture without a text is an error; otherwise it gets none.

    Raises:
        ConfigError: texts are missing, cannot be read, or cannot be told apart.
        UsageError: both ways at once.
    """
    if prompts and captions:
        raise UsageError("Texts come from --prompt or from --captions, not from both", where=str(captions))
    if prompts:
        texts = tuple(dict.fromkeys(_checked(text, "--prompt") for text in prompts))
        found.pictures = [replace(picture, prompts=texts) for picture in found.pictures]
        return
    if captions is not None:
        found.sources.append(captions)
        given = _by_picture(captions, found)
        found.pictures = [replace(p, prompts=tuple(given.get(i, ()))) for i, p in enumerate(found.pictures)]
    else:
        beside = _Beside(found.sources)
        found.pictures = [p if p.prompts else replace(p, prompts=beside(p)) for p in found.pictures]
    for picture in found.pictures:
        for text in picture.prompts:
            _checked(text, excerpt(picture.name, 100))
    lacking = [picture.name for picture in found.pictures if not picture.prompts]
    if lacking and needed:
        raise _lacking(lacking, len(found.pictures), captions)
    found.pictures = [p if p.prompts else replace(p, prompts=("",)) for p in found.pictures]


def _lacking(names: list[str], of: int, captions: Path | None) -> ConfigError:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    which = "No picture has" if len(names) == of else f"{len(names)} of {of} pictures do not have"
    looked = f"{captions} has none for" if captions else "there is no NAME.txt and no metadata.jsonl for"
    return ConfigError(
        f"{which} a text to be judged against.",
        where=", ".join(excerpt(name, 100) for name in names[:_SHOWN]) + more,
        why=f"{looked} {'them' if len(names) > 1 else 'it'}",
        hint="--prompt TEXT for one text for all, --captions FILE.csv (columns image,prompt), or a NAME.txt beside "
        "each picture; --reward aesthetic-v2 alone looks at no text",
    )


def _checked(text: str, where: str) -> str:
    """A text that tokenizers and files can take; anything else of Unicode is left as it is.

    Raises:
        ConfigError: half of a surrogate pair, or a NUL.
    """
    bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        why = "a NUL character" if bad == "\0" else "bytes that are not UTF-8"
        raise ConfigError("A text cannot be used.", where=where, why=f"it holds {why}", hint="save it as UTF-8")
    return text


class _Beside:
    """Texts that lie beside pictures; metadata files are read once."""

    def __init__(self, sources: list[Path]) -> None:
        self._sources = sources
        self._metadata: dict[Path, dict[str, list[str]]] = {}

    def __call__(self, picture: Picture) -> tuple[str, ...]:
        for suffix in BESIDE:
            path = picture.path.with_suffix(suffix)
            if path.is_file():
                text = read_text(path).strip()
                return (text,) if text else ()
        folder = picture.path.parent
        for here in (folder, *folder.parents):
            for name in METADATA:
                texts = self._of(here / name).get(_name(picture.path, here.absolute()))
                if texts:
                    return tuple(dict.fromkeys(texts))
            if here == picture.top:
                break
        return ()

    def _of(self, path: Path) -> dict[str, list[str]]:
        if path not in self._metadata:
            self._metadata[path] = {}
            if path.is_file():
                self._sources.append(path)
                for row in read_rows(path, "metadata"):
                    if row.image and row.text:
                        self._metadata[path].setdefault(os.path.normpath(row.image), []).append(row.text)
        return self._metadata[path]


def _by_picture(captions: Path, found: Found) -> dict[int, list[str]]:
    """Texts of a captions file by the position of their picture; a picture may have many."""
    index = _Index(found.pictures, captions.parent)
    given: dict[int, list[str]] = {}
    unused: list[Row] = []
    for row in read_rows(captions, "captions file"):
        if not row.image or row.text is None:
            raise ConfigError(
                "A line of the captions file lacks its picture or its text.",
                where=f"{captions}, line {row.line}",
                why="a picture is under image, file, path or file_name; a text under prompt, caption or text",
            )
        at = index.find(row, captions)
        if at is None:
            unused.append(row)
        elif row.text and row.text not in given.setdefault(at, []):
            given[at].append(row.text)
    if unused:
        shown = ", ".join(repr(row.image) for row in unused[:3])
        found.notes.append(f"{len(unused)} captions belong to none of the pictures: {shown}")
    return {at: texts for at, texts in given.items() if texts}


class _Index:
    """Which picture a name in a captions file means."""

    def __init__(self, pictures: Sequence[Picture], folder: Path) -> None:
        self._folder = folder
        self._exact: dict[str, int] = {}
        self._bare: dict[str, list[int]] = {}
        for at, picture in enumerate(pictures):
            for name in (str(picture.path.absolute()), picture.name, os.path.normpath(picture.typed)):
                self._exact.setdefault(name, at)
            self._bare.setdefault(picture.path.name, []).append(at)

    def find(self, row: Row, captions: Path) -> int | None:
        """Its position: by path from the captions' folder, by name as in results, as typed, or by a bare file name.

        Raises:
            ConfigError: a bare name that several pictures have.
        """
        name = row.image or ""
        ways: Iterable[Callable[[], str]] = (
            lambda: str((self._folder / name).absolute()),
            lambda: os.path.normpath((self._folder / name).absolute()),
            lambda: os.path.normpath(name),
        )
        for way in ways:
            if (at := self._exact.get(way())) is not None:
                return at
        same = self._bare.get(PurePosixPath(name).name, []) if "/" not in name else []
        if len(same) > 1:
            raise ConfigError(
                "A caption's picture cannot be told.",
                where=f"{captions}, line {row.line}",
                why=f"{len(same)} pictures are named {name!r}",
                hint="write its path, as from the folder that is rated",
            )
        return same[0] if same else None
