"""A folder of own pictures with captions: what is in it, as groups of candidates. Nothing is decoded; no torch here.

Pictures of one caption are the members 1..n of its group; member 0 is what the model draws from the caption itself,
which they must beat (design.md section 1 item 2). A folder whose ``metadata.jsonl`` gives weights, as the command
``dataset`` writes it, is taken as it is: its selection and weights are the run's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.config import ImagesSettings
from craft_fast.errors import ConfigError
from craft_fast.picture_folders import Found, find_pictures, give_prompts
from craft_fast.prompt_lines import clean_text, excerpt, prompt_id
from craft_fast.records import Candidate, Group, Prompt, Selection, Variant
from craft_fast.store.digest import digest_json, sha256_once
from craft_fast.store.run import resolve_uri

METADATA = "metadata.jsonl"
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class OwnPicture:
    """One picture of the folder.

    Attributes:
        name: path below the folder, POSIX.
        sha256: of the file.
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
class OwnFolder:
    """What a folder of own pictures holds.

    Attributes:
        root: the folder.
        pictures: by group, in the order in which their captions come.
        weighted: the metadata's weights and selection are taken as they are.
        notes: what a person should know.
    """

    root: Path
    pictures: tuple[OwnPicture, ...]
    weighted: bool
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of everything that decides a run: content and texts, never where the folder is."""
        rows = [[p.sha256, p.prompt, p.variant, p.member, p.weight, p.advantage] for p in self.pictures]
        return digest_json([rows, self.weighted])


# ---- the folder


def read_folder(settings: ImagesSettings, max_chars: int = 2000) -> OwnFolder:
    """List the pictures with their captions; nothing is decoded.

    Args:
        settings: ``folder`` and ``weights``.
        max_chars: longest caption.

    Raises:
        ConfigError: no such folder, pictures without captions, captions that cannot be used, or metadata with weights
            for some pictures alone; UsageError: no picture at all; IntegrityError: a file that cannot be read.
    """
    root = own_root(settings)
    found = find_pictures([root])
    known = _metadata(root / METADATA)
    try:
        give_prompts(found)
    except ConfigError as error:
        error.hint = f"write NAME.txt beside each picture, or {METADATA} with file_name and text"
        raise
    weighted = settings.weights == "auto" and _all_weighted(found, known, root)
    rows, problems = [], []
    for picture in found.pictures:
        row = known.get(picture.name, {})
        text, reason = clean_text(str(row.get("prompt") or picture.prompts[0]), max_chars)
        if reason:
            problems.append(f"{excerpt(picture.name, 100)}: {reason}")
        rows.append((picture, row, text))
    if problems:
        raise ConfigError(
            f"{len(problems)} captions cannot be used", where=str(root), why=listed(problems), hint="mend them"
        )
    notes = [*found.notes, *_texts_notes(found)]
    pictures = _in_groups(rows, weighted)
    if not weighted and (alone := _alone(pictures)):
        notes.append(
            f"{alone} captions have one picture alone: its advantage is +1 or -1, however good it is "
            "(several pictures a caption say more)"
        )
    return OwnFolder(root, tuple(pictures), weighted, tuple(notes))


def own_root(settings: ImagesSettings) -> Path:
    """The folder that ``images.folder`` names.

    Raises:
        ConfigError: there is none.
    """
    named = settings.folder or ""
    root = Path(resolve_uri(named)) if named.startswith("package:") else Path(named).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(
            "There is no such folder of pictures", where=f"images.folder={settings.folder}",
            hint="--images DIR names it; a folder that was moved may be named anew: nothing is done again",
        )  # fmt: skip
    return root


def _texts_notes(found: Found) -> list[str]:
    several = sum(len(picture.prompts) > 1 for picture in found.pictures)
    return [f"{several} pictures have several captions; the first is taken"] if several else []


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of ``metadata.jsonl`` by file name; empty where there is none."""
    if not path.is_file():
        return {}
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows[str(Path(str(row["file_name"])).as_posix())] = row
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(
                    "A line of the pictures' metadata cannot be read", where=f"{path}, line {number}", why=str(error),
                    hint="each line is a JSON object with file_name and text",
                ) from error  # fmt: skip
    return rows


def _all_weighted(found: Found, known: Mapping[str, Mapping[str, Any]], root: Path) -> bool:
    """Whether the metadata weighs the pictures; then it must weigh all of them, with finite numbers."""
    weights = {picture.name: known.get(picture.name, {}).get("weight") for picture in found.pictures}
    there = {name: value for name, value in weights.items() if value is not None}
    if not there:
        return False
    lacking = [name for name in weights if name not in there]
    bad = [name for name, value in there.items() if not _is_number(value)]
    if lacking or bad:
        what = "have no weight" if lacking else "have a weight that is no finite number"
        names = lacking or bad
        raise ConfigError(
            f"{len(names)} of {len(weights)} pictures {what}",
            where=str(root / METADATA),
            why=listed([excerpt(name, 100) for name in names]),
            hint="weigh them all, or --set images.weights=score, which scores and weighs every picture here",
        )
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _in_groups(rows: Sequence[tuple[Any, Mapping[str, Any], str]], weighted: bool) -> list[OwnPicture]:
    """Pictures by caption; members as the metadata numbers them where it does so without a clash."""
    groups: dict[str, list[tuple[Any, Mapping[str, Any], str]]] = {}
    for one in rows:
        groups.setdefault(prompt_id(one[2]), []).append(one)
    pictures = []
    for members in groups.values():
        told = [row.get("member") for _, row, _ in members]
        own = all(isinstance(m, int) and not isinstance(m, bool) and m >= 1 for m in told) and len({*told}) == len(told)
        for number, (picture, row, text) in enumerate(members, 1):
            member = int(row["member"]) if own else number
            variant, bad = clean_text(str(row.get("variant") or text), 4000)
            pictures.append(
                OwnPicture(
                    picture.name, sha256_once(picture.path), text, text if bad else variant, member,
                    float(row["weight"]) if weighted else None,
                    float(row["advantage"]) if weighted and _is_number(row.get("advantage")) else None,
                )
            )  # fmt: skip
    return pictures


def _alone(pictures: Sequence[OwnPicture]) -> int:
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.prompt] = counts.get(picture.prompt, 0) + 1
    return sum(count == 1 for count in counts.values())


def listed(items: Sequence[str]) -> str:
    """Lines of an error, the first ones and how many more."""
    more = f"\n    and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "".join(f"\n    {item}" for item in items[:_SHOWN]) + more


# ---- groups


def own_groups(folder: OwnFolder) -> list[Group]:
    """One group a caption; its picture files and weights are in the prompt's ``meta`` under ``own``, by member."""
    by_prompt: dict[str, list[OwnPicture]] = {}
    for picture in folder.pictures:
        by_prompt.setdefault(prompt_id(picture.prompt), []).append(picture)
    groups = []
    for line, (key, pictures) in enumerate(by_prompt.items(), 1):
        own = {
            str(p.member): {"file": p.name, "sha256": p.sha256, "weight": p.weight, "advantage": p.advantage}
            for p in pictures
        }
        prompt = Prompt(key, pictures[0].prompt, "train", line, {"own": own})
        drawn = () if folder.weighted else (Variant(key, 0, prompt.text),)
        groups.append(Group(prompt, (*drawn, *(Variant(key, p.member, p.variant) for p in pictures))))
    return groups


def drawn_part(group: Group) -> Group | None:
    """What the model draws of a group: member 0, or nothing where the folder's weights are taken."""
    drawn = tuple(variant for variant in group.variants if str(variant.member) not in group.prompt.meta["own"])
    return Group(group.prompt, drawn) if drawn else None


# ---- weights that the folder gives


def given_selections(groups: Sequence[Group], rows: Sequence[Candidate]) -> list[Selection]:
    """Verdicts of a folder whose weights are taken as they are: all accepted, advantages as given."""
    own = {(g.prompt.prompt_id, int(m)): entry for g in groups for m, entry in g.prompt.meta["own"].items()}
    selections = []
    for row in rows:
        entry = own[row.prompt_id, row.member]
        advantage = entry["weight"] if entry["advantage"] is None else entry["advantage"]
        selections.append(Selection(row.candidate_id, row.prompt_id, row.member, True, {}, 0.0, float(advantage)))
    return selections


def given_weights(groups: Sequence[Group], rows: Sequence[Candidate]) -> dict[str, float]:
    """Weight of each candidate, as the folder's metadata gives it."""
    own = {(g.prompt.prompt_id, int(m)): entry for g in groups for m, entry in g.prompt.meta["own"].items()}
    return {row.candidate_id: float(own[row.prompt_id, row.member]["weight"]) for row in rows}
