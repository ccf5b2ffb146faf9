"""What tables beside own pictures say of each: texts, weights, and how they came about. No torch here.

The tables are ``metadata.jsonl`` and ``metadata.csv`` of Hugging Face's imagefolder layout, in any folder above a
picture; the command ``dataset`` writes such a table with weights.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craft_fast.picture_folders import METADATA
from craft_fast.picture_tables import TEXT_KEYS, read_rows

# Weights are divided by their mean |w| in float32; beyond this, sums of them would not be finite.
MAX_WEIGHT = 1e9
MAX_MEMBER = 10**6


@dataclass(frozen=True, slots=True)
class Facts:
    """One row of a table.

    Attributes:
        where: file and line.
        text: under ``text``, ``prompt`` or ``caption``; '' where there is none.
        prompt: under ``prompt`` beside ``text``: what the picture is of, where ``text`` says more.
        variant: a richer text it was made from.
        member: its number in its group; 0 is what the model drew from the prompt itself.
        weight: as it stands, which may be no number at all.
        advantage: likewise, None where it is no finite number.
        rejected: ``accepted`` is false and there is no weight.
        exported: the command ``dataset`` wrote it.
    """

    where: str
    text: str = ""
    prompt: str = ""
    variant: str = ""
    member: int | None = None
    weight: Any = None
    advantage: float | None = None
    rejected: bool = False
    exported: bool = False


@dataclass(slots=True)
class Tables:
    """All tables of a folder.

    Attributes:
        rows: facts by the picture's path below the folder.
        twice: pictures that one table names more than once, with the line.
        sources: tables that were read.
    """

    rows: dict[str, Facts] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)


def read_tables(root: Path, pictures: list[Path]) -> Tables:
    """Read the tables in the folders of ``pictures`` and above, up to ``root``; the nearest one counts.

    Raises:
        ConfigError: a table that cannot be read, with its line.
    """
    found = Tables()
    folders = {root} | {above for path in pictures for above in path.parents if above.is_relative_to(root)}
    # Deepest last: what lies nearer to a picture takes the place of what lies above.
    for folder in sorted(folders, key=lambda one: len(one.parts)):
        # Of two tables in one folder the first name counts, as everywhere.
        for name in reversed(METADATA):
            if (folder / name).is_file():
                _read(folder / name, root, found)
    return found


def name_key(name: str) -> str:
    """A picture's name as it is looked up: some systems decompose accents in file names, others compose them."""
    return unicodedata.normalize("NFC", os.path.normpath(name)).replace(os.sep, "/")


def _read(path: Path, root: Path, found: Tables) -> None:
    found.sources.append(path)
    seen: set[str] = set()
    for row in read_rows(path, "metadata"):
        if not row.image:
            continue
        name = name_key((path.parent.relative_to(root) / row.image).as_posix())
        where = f"{path.relative_to(root)}, line {row.line}"
        if name in seen:
            found.twice[name] = where
        seen.add(name)
        # A cell of a csv is always text; JSON has numbers of its own.
        values = {key: _number(cell) for key, cell in row.values.items()} if path.suffix == ".csv" else row.values
        found.rows[name] = _facts(values, row.values, where)


def _facts(row: Mapping[str, Any], texts: Mapping[str, Any], where: str) -> Facts:
    def text(*names: str) -> str:
        return next((texts[name] for name in names if isinstance(texts.get(name), str) and texts[name].strip()), "")

    weight: Any = row.get("weight")
    member: Any = row.get("member")
    advantage: Any = row.get("advantage")
    accepted = row.get("accepted")
    no = accepted is False or str(accepted).strip().lower() == "false"
    return Facts(
        where=where,
        text=text("text", *TEXT_KEYS),
        prompt=text("prompt"),
        variant=text("variant"),
        member=int(member) if is_finite(member) and member in range(MAX_MEMBER) else None,
        weight=weight,
        advantage=float(advantage) if is_finite(advantage) else None,
        rejected=no and weight is None,
        exported="craft_fast" in row,
    )


def _number(cell: Any) -> Any:
    """A csv's cell as a number where it is one; an empty one is None."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def is_finite(value: Any) -> bool:
    """Whether it is a finite number of bearable size."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= MAX_WEIGHT and math.isfinite(value)
