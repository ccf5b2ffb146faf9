"""A folder of own pictures with captions: what is in it and what is amiss. Nothing is decoded; no torch here.

Pictures of one caption are the members 1..n of its group; member 0 is what the model draws from the caption itself,
which they must beat (design.md section 1 item 2). A folder whose metadata gives weights, as the command ``dataset``
writes it, is taken as it is: its selection and weights are the run's. ``own_groups`` makes groups of it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from craft_fast.config import ImagesSettings
from craft_fast.errors import ConfigError, CraftError, IntegrityError, UsageError
from craft_fast.own_metadata import Facts, Tables, is_finite, name_key, read_tables
from craft_fast.picture_folders import BESIDE, SUFFIXES, Found, Picture, find_pictures
from craft_fast.picture_tables import read_text
from craft_fast.progress import Progress, Silent
from craft_fast.prompt_lines import clean_text, excerpt, prompt_id
from craft_fast.store.digest import digest_json, sha256_once
from craft_fast.store.run import resolve_uri

# Held-out prompts of the run that a dataset was written from; read where prompts.heldout_file names none.
HELD_OUT = "heldout.jsonl"
_OTHER_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jfif", ".ppm", ".tga")
_VARIANT_CHARS = 4000
_SHOWN = 200

_CAPTION = "write NAME.txt beside each picture, or metadata.jsonl with file_name and text"
_WEIGH = "weigh them all, or --set images.weights=score, which scores and weighs every picture here"
_MEND = "mend them or take them out of the folder; PNG, JPEG and WebP of at most 64 megapixels are read"
_RENAME = "rename one of each, since some systems take them for one file"


@dataclass(frozen=True, slots=True)
class OwnPicture:
    """One picture of the folder.

    Attributes:
        name: path below the folder, POSIX.
        sha256: of the file; '' where nothing was to be hashed.
        prompt: what it is of, and what the rewards see.
        variant: a richer text it was made from, where the folder's metadata has one; else the prompt.
        member: its number in its group, from 1.
        weight: from the metadata; None where the folder gives none.
        advantage: likewise; None: the weight stands for it.
    """

    name: str
    sha256: str
    prompt: str
    variant: str
    member: int
    weight: float | None = None
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a picture of the folder cannot be taken.

    Attributes:
        name: of the picture, fit for a screen.
        why: what is amiss.
        remedy: what to do.
        damaged: the file itself is no picture that can be read.
    """

    name: str
    why: str
    remedy: str
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """What a folder of own pictures holds.

    Attributes:
        root: the folder.
        pictures: by group, in the order in which their captions come.
        weighted: the metadata's weights and selection are taken as they are.
        problems: pictures that cannot be taken; ``require_sound`` refuses them all at once.
        notes: what a person should know.
    """

    root: Path
    pictures: tuple[OwnPicture, ...]
    weighted: bool
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """Digest of everything that decides the candidates, never of where the folder is or what a file is called."""
        rows = [[p.sha256, p.prompt, p.variant, p.member] for p in self.pictures]
        return digest_json([rows, self.weighted, [[p.name, p.why] for p in self.problems]])

    @property
    def digest(self) -> str:
        """The same with the weights."""
        return digest_json([self.content, [[p.weight, p.advantage] for p in self.pictures]])


# ---- the folder


def own_root(settings: ImagesSettings) -> Path:
    """The folder that ``images.folder`` names.

    Raises:
        ConfigError: there is none.
    """
    named = settings.folder or ""
    root = Path(resolve_uri(named)) if named.startswith("package:") else Path(named).expanduser().absolute()
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, beside, n=1)
        guess = f"did you mean {root.parent / close[0]}? " if close else ""
        raise ConfigError(
            "There is no such folder of pictures", where=f"images.folder={excerpt(named, 200)}",
            hint=f"{guess}--images DIR names it; one that was moved may be named anew: nothing is done again",
        )  # fmt: skip
    return root


def read_folder(
    settings: ImagesSettings, max_chars: int = 2000, *, hashed: bool = True, progress: Progress | None = None
) -> OwnFolder:
    """List the pictures with their captions and weights; nothing is decoded.

    Args:
        settings: ``folder`` and ``weights``.
        max_chars: longest caption.
        hashed: take the sha256 of every picture.
        progress: counts what is hashed.

    Raises:
        ConfigError: no such folder, or a table that cannot be read; UsageError: no picture at all.
    """
    root = own_root(settings)
    problems, notes = _strange(root)
    found = _found(root, problems)
    tables = read_tables(root, [picture.path for picture in found.pictures])
    problems += [
        Problem(excerpt(name, 100), f"named twice ({where})", _CAPTION) for name, where in tables.twice.items()
    ]
    problems += _same_names(found.pictures)
    listed = [(picture, tables.rows.get(name_key(picture.name), Facts(""))) for picture in found.pictures]
    weighted = settings.weights == "auto" and any(facts.weight is not None for _, facts in listed)
    rows, left_out = _wanted(listed, weighted)
    notes += [*found.notes, *left_out, *_gone(tables, found.pictures)]
    if weighted:
        problems += _bad_weights(rows)
    pictures = _in_groups(rows, weighted, max_chars, problems, hashed, progress or Silent())
    if not rows and not problems:
        raise UsageError("No picture is left", where=str(root), why="; ".join(left_out))
    if not weighted and (alone := _alone(pictures)):
        notes.append(
            f"{alone} captions have one picture alone: its advantage is +1 or -1, however good it is "
            "(several pictures a caption say more)"
        )
    return OwnFolder(root, tuple(pictures), weighted, tuple(dict.fromkeys(problems)), tuple(notes))


def _found(root: Path, problems: Sequence[Problem]) -> Found:
    try:
        return find_pictures([root])
    except UsageError:
        if problems:  # pictures that cannot be read are all there are
            return Found()
        raise


def _strange(root: Path) -> tuple[list[Problem], list[str]]:
    """Names of pictures that are no files that can be read, and folders that are not looked into."""
    problems, notes = [], []
    for here, folders, files in os.walk(root):
        shown = [name for name in folders if not name.startswith(".")]
        if linked := [Path(here, name) for name in shown if Path(here, name).is_symlink()]:
            names = ", ".join(excerpt(path.relative_to(root).as_posix(), 60) for path in linked[:5])
            notes.append(f"{len(linked)} linked folders are not looked into: {names}")
        folders[:] = [name for name in shown if Path(here, name) not in linked]
        for name in sorted(files):
            if why := _why_strange(Path(here, name)):
                problems.append(Problem(_shown(Path(here, name).relative_to(root).as_posix()), why, _MEND, True))
    return problems, notes


def _why_strange(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix not in (*SUFFIXES, *_OTHER_SUFFIXES):
        return ""
    if suffix in _OTHER_SUFFIXES:
        return f"{suffix[1:]} is not read"
    try:
        regular = path.is_file()
    except OSError as error:  # some loops of links
        return str(error.strerror)
    if not regular:
        return "a link that leads nowhere" if path.is_symlink() else "no regular file"
    return ""


def _same_names(pictures: Sequence[Picture]) -> Iterator[Problem]:
    by_name: dict[str, list[str]] = {}
    for picture in pictures:
        by_name.setdefault(name_key(picture.name).casefold(), []).append(picture.name)
    for names in by_name.values():
        first, *others = sorted(names)
        for name in others:
            yield Problem(_shown(name), f"the same name as {_shown(first)} but for its letters' case", _RENAME)


def _shown(name: str) -> str:
    return excerpt(name, 100)


# ---- what of it is wanted

Rows = Sequence[tuple[Picture, Facts]]


def _wanted(rows: Rows, weighted: bool) -> tuple[Rows, list[str]]:
    """Without what a dataset of a whole run (``--all``) holds besides: base pictures and rejected ones."""
    notes = []
    if weighted:
        kept = [(picture, facts) for picture, facts in rows if not facts.rejected]
        if left := len(rows) - len(kept):
            notes.append(f"{left} pictures that metadata has as rejected are left out")
    else:
        kept = [(picture, facts) for picture, facts in rows if not (facts.exported and facts.member == 0)]
        if left := len(rows) - len(kept):
            notes.append(f"{left} pictures drawn from base prompts are left out: this run's model draws its own")
    return kept, notes


def _gone(tables: Tables, pictures: Sequence[Picture]) -> list[str]:
    lost = sorted(set(tables.rows) - {name_key(picture.name) for picture in pictures})
    if not lost:
        return []
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    named = ", ".join(map(_shown, lost[:5]))
    return [f"{len(lost)} pictures that metadata names are not there, and are left out: {named}{more}"]


def _bad_weights(rows: Rows) -> Iterator[Problem]:
    """Where weights come with the pictures all must have one, and their mean must be positive."""
    bad = False
    for picture, facts in rows:
        if facts.weight is None:
            yield Problem(_shown(picture.name), f"no weight, others have one {facts.where}".rstrip(), _WEIGH)
        elif not is_finite(facts.weight):
            found = excerpt(repr(facts.weight), 40)
            yield Problem(_shown(picture.name), f"weight {found} ({facts.where}): finite, at most 1e9", _WEIGH)
        bad = bad or not is_finite(facts.weight)
    if not bad and rows and sum(facts.weight for _, facts in rows) < 1e-12 * len(rows):
        mean = sum(facts.weight for _, facts in rows) / len(rows)
        yield Problem("all", f"the mean of their weights, {mean:.3g}, is not positive", _WEIGH)


def _in_groups(
    rows: Rows, weighted: bool, max_chars: int, problems: list[Problem], hashed: bool, progress: Progress
) -> list[OwnPicture]:
    """Pictures by caption; members as the metadata numbers them where it does so without a clash."""
    groups: dict[str, list[tuple[Picture, Facts, str, str]]] = {}
    with progress.task("own pictures", len(rows), "pictures") as task:
        for picture, facts in rows:
            sha256, bad = _sha256(picture.path, hashed)
            text, reason = _prompt(picture, facts, max_chars)
            if not _utf8(picture.name):
                bad = "its name is no UTF-8"
            if bad:
                problems.append(Problem(_shown(picture.name), bad, _MEND, damaged=True))
            if reason:
                problems.append(Problem(_shown(picture.name), reason, _CAPTION))
            if not bad and not reason:
                groups.setdefault(prompt_id(text), []).append((picture, facts, text, sha256))
            task.advance()
    pictures = []
    for members in groups.values():
        told = [facts.member for _, facts, _, _ in members]
        numbered = all(told) and len({*told}) == len(told)
        for number, (picture, facts, text, sha256) in enumerate(members, 1):
            variant, bad = clean_text(facts.variant, _VARIANT_CHARS)
            given = weighted and is_finite(facts.weight)
            pictures.append(
                OwnPicture(
                    picture.name, sha256, text, text if bad else variant,
                    facts.member if numbered and facts.member else number,
                    float(facts.weight) if given else None, facts.advantage if given else None,
                )
            )  # fmt: skip
    return pictures


def _sha256(path: Path, hashed: bool) -> tuple[str, str]:
    """The digest, or why there is none."""
    try:
        return (sha256_once(path) if hashed else ""), ""
    except OSError as error:
        return "", str(error.strerror)


def _prompt(picture: Picture, facts: Facts, max_chars: int) -> tuple[str, str]:
    """What a picture is of, and '' or the reason why it cannot be used.

    NAME.txt or NAME.caption counts before a table, as kohya's trainers have it. Only where it still says what the table
    has as ``text`` does the table's ``prompt`` stand for both: a caption that was edited by hand is a new one.
    """
    beside = next((path for s in BESIDE if (path := picture.path.with_suffix(s)).is_file()), None)
    try:
        text = read_text(beside).strip() if beside is not None else facts.text
    except CraftError as error:
        told = f"{error.what[0].lower()}{error.what[1:].rstrip('.')}"
        return "", f"{beside.name if beside else ''}: {told} ({error.why})"
    if not text:
        return "", "no caption" if beside is None else f"its caption is empty ({excerpt(beside.name)})"
    if facts.prompt and text == facts.text.strip():
        text = facts.prompt
    cleaned, reason = clean_text(text, max_chars)
    return cleaned, f"its caption cannot be used: {reason}" if reason else ""


def _utf8(name: str) -> bool:
    try:
        return bool(name.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _alone(pictures: Sequence[OwnPicture]) -> int:
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.prompt] = counts.get(picture.prompt, 0) + 1
    return sum(count == 1 for count in counts.values())


# ---- refusal


def require_sound(folder: OwnFolder, more: Sequence[Problem] = ()) -> None:
    """Refuse the folder where any of its pictures cannot be taken; all are named at once.

    Args:
        folder: as ``read_folder`` gave it.
        more: what decoding found.

    Raises:
        IntegrityError: files that are damaged, too large or of another kind, and whatever else is amiss beside them.
        ConfigError: captions, weights or sizes alone.
    """
    by_name: dict[str, Problem] = {}
    for problem in (*folder.problems, *more):
        before = by_name.get(problem.name)
        why = problem.why if before is None or problem.why in before.why else f"{before.why}; {problem.why}"
        damaged = problem.damaged or (before is not None and before.damaged)
        by_name[problem.name] = Problem(problem.name, why, problem.remedy, damaged)
    if not by_name:
        return
    found = list(by_name.values())
    kind = IntegrityError if any(problem.damaged for problem in found) else ConfigError
    hints = dict.fromkeys(problem.remedy for problem in (*folder.problems, *more))
    lines = [f"\n    {problem.name}: {problem.why}" for problem in found]
    rest = f"\n    and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise kind(
        f"{len(found)} of the pictures cannot be taken; nothing was done yet",
        where=str(folder.root),
        why="".join(lines[:_SHOWN]) + rest,
        hint="; ".join(hints),
    )
