"""Scores as a file (csv, jsonl, json) and as a table on the screen. No torch here.

A file's texts and names are what they were, also such as a spreadsheet takes for a formula (``=``, ``+``, ``-``,
``@`` first): they are data, and changing them would break the way back to the picture. CSV is RFC 4180's, UTF-8;
JSON escapes control characters. Scores are written with the fewest digits that give the same float32 back.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from craft_fast.errors import EnvironmentProblem, UsageError, closest
from craft_fast.prompt_lines import excerpt
from craft_fast.store import atomic

if TYPE_CHECKING:
    from craft_fast.rewards.rating import Rating, ScoredRow

FORMATS = ("csv", "jsonl", "json")
COLUMNS = (
    "image", "image_sha256", "width_px", "height_px", "prompt", "reward", "score", "held_out", "backend", "checkpoint",
    "preprocessing", "tokenizer", "precision", "note", "tokens_cut",
)  # fmt: skip
MOST_SHOWN = 50
_WIDEST = 40
# What json leaves as it is and a terminal or a line-wise reader may act on: DEL, C1 controls, U+2028, U+2029, and
# direction overrides.
_LIVELY = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200e\u200f]")


def choose_format(output: str | None, wanted: str | None) -> str:
    """The format of ``output``: as wanted, else by its suffix; csv for ``-``.

    Raises:
        UsageError: neither says one that there is.
    """
    suffix = Path(output).suffix[1:].lower() if output and output != "-" else ""
    chosen = wanted or suffix or "csv"
    if chosen not in FORMATS:
        where = f"--format {wanted}" if wanted else f"--output {output}"
        raise UsageError(
            "Scores are not written in this format", where=where, why=f"it is one of {', '.join(FORMATS)}",
            hint=f"{closest(chosen, FORMATS)}--output scores.csv, or --format csv",
        )  # fmt: skip
    return chosen


def check_output(path: Path, sources: Iterable[Path]) -> None:
    """Find out before hours of work whether the file can be written.

    Raises:
        UsageError: it is a folder, or a file that pictures or texts are read from.
        EnvironmentProblem: its folder cannot be written to.
    """
    if path.is_dir():
        raise UsageError("A file is wanted, this is a folder", where=f"--output {path}", hint=f"{path}/scores.csv")
    if any(path.exists() and source.exists() and path.samefile(source) for source in sources):
        raise UsageError("Scores would overwrite what they are made from", where=f"--output {path}")
    there = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise EnvironmentProblem(
            "A file cannot be written", where=str(path), why=f"{there} is not a folder that may be written to",
            hint="give another --output",
        )  # fmt: skip


def record(row: ScoredRow) -> dict[str, Any]:
    """One score with everything that says how it came about; keys are ``COLUMNS``."""
    values = {
        "image": row.picture.name,
        "image_sha256": row.sha256,
        "width_px": row.judgement.width_px,
        "height_px": row.judgement.height_px,
        "prompt": row.prompt,
        "reward": row.judge.name,
        "score": shortest(row.judgement.score),
        "held_out": row.judge.held_out,
        **asdict(row.judge.provenance),
        "tokens_cut": row.judgement.tokens_cut,
    }
    return {name: values[name] for name in COLUMNS}


def shortest(score: float) -> float:
    """The number of the fewest digits that is the same float32."""
    return float(str(np.float32(score)))


def chunks(rows: Iterable[ScoredRow], form: str) -> Iterator[str]:
    """The file's text, piece by piece: csv, jsonl (an object a line), or json (a list of objects)."""
    if form == "csv":
        yield _csv(COLUMNS)
        for row in rows:
            values = record(row)
            yield _csv([str(value).lower() if isinstance(value, bool) else value for value in values.values()])
        return
    between = start = "" if form == "jsonl" else "["
    for row in rows:
        yield between + ("" if form == "jsonl" else "\n") + _json(record(row)) + ("\n" if form == "jsonl" else "")
        between = "" if form == "jsonl" else ","
    if form == "json":
        yield (start if between == start else "") + "\n]\n"


def write_scores(path: Path, rows: Iterable[ScoredRow], form: str) -> None:
    """Write the file: whole, or not at all.

    Raises:
        ResourceError: the disk is full. EnvironmentProblem: it may not be written.
    """
    # A name's bytes that are not UTF-8 are escaped; in JSON that is the escape of a lone surrogate.
    atomic.write_chunks(path, (text.encode("utf-8", "backslashreplace") for text in chunks(rows, form)))


def _csv(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


def _json(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    return _LIVELY.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# ---- for a person


@dataclass(slots=True)
class _Line:
    """One picture and text with the scores of all rewards."""

    image: str
    prompt: str
    scores: list[float]
    rank: float = 0.0


def wide_table(rating: Rating) -> list[list[str]]:
    """Cells of a table: a line for each picture and text, best mean rank first, at most ``MOST_SHOWN``."""
    width = len(rating.judges)
    lines = [
        _Line(rows[0].picture.name, rows[0].prompt, [row.judgement.score for row in rows])
        for rows in (rating.rows[at : at + width] for at in range(0, len(rating.rows), width or 1))
    ]
    for at in range(width):
        for line, rank in zip(lines, _ranks([line.scores[at] for line in lines]), strict=True):
            line.rank += rank / width
    lines.sort(key=lambda line: line.rank)
    several = len({line.prompt for line in lines}) > 1
    header = ["image", *(["prompt"] if several else []), *(judge.name for judge in rating.judges), "mean rank"]
    cells = [
        [
            _end(line.image),
            *([excerpt(line.prompt, _WIDEST)] if several else []),
            *(f"{score:.4f}" for score in line.scores),
            f"{line.rank:.1f}",
        ]
        for line in lines[:MOST_SHOWN]
    ]
    return [header, *cells]


def _ranks(scores: Sequence[float]) -> list[float]:
    """Rank of each score, 1 for the highest; equal ones share the mean of theirs."""
    order = sorted(range(len(scores)), key=lambda at: -scores[at])
    ranks = [0.0] * len(scores)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        for at in order[start:end]:
            ranks[at] = (start + end + 1) / 2
        start = end
    return ranks


def _end(name: str) -> str:
    """The last part of a long name, which tells pictures of one folder apart; fit for a terminal."""
    name = excerpt(name, 5000)
    return name if len(name) <= _WIDEST else "..." + name[-(_WIDEST - 3) :]


def summary(rating: Rating) -> list[dict[str, Any]]:
    """For each reward: how many scores, their mean, lowest and highest, how many texts were cut, and how they came."""
    found = []
    for at, judge in enumerate(rating.judges):
        rows = rating.rows[at :: len(rating.judges)]
        scores = [row.judgement.score for row in rows]
        found.append(
            {
                "reward": judge.name,
                "held_out": judge.held_out,
                "n": len(scores),
                "mean": sum(scores) / len(scores) if scores else None,
                "min": shortest(min(scores)) if scores else None,
                "max": shortest(max(scores)) if scores else None,
                "texts_cut": len({row.prompt for row in rows if row.judgement.tokens_cut}),
                **asdict(judge.provenance),
            }
        )
    return found
