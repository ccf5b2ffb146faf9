"""Records of a prompt file, line by line: txt, csv, tsv and jsonl, from bytes that may hold anything.

Nothing here trusts the file: lines are read with a length limit, decoded strictly, and every record that cannot be
used comes out as a rejection with its line number and the reason.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.errors import ConfigError

MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024
MAX_QUOTED_LINES = 50
COLUMNS = ("prompt", "text", "caption")
FORMATS = (".txt", ".csv", ".tsv", ".jsonl")
# Characters that reorder or hide text on a screen without being visible themselves.
_DECEPTIVE = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF)}


@dataclass(frozen=True, slots=True)
class Record:
    """A text found on a line, or the reason why there is none."""

    line: int
    text: str = ""
    reason: str = ""
    fields: Mapping[str, Any] | None = None


def excerpt(text: str, length: int = 60) -> str:
    """The beginning of a text in printable ASCII-safe form, fit for a terminal and a log."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:length])
    return shown + ("..." if len(text) > length else "")


def prompt_id(text: str) -> str:
    """The id of a cleaned prompt: 20 hex digits of its sha256."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]


def check_file(path: Path, what: str) -> None:
    """Refuse what is not a regular file of a bearable size.

    Raises:
        ConfigError: with what it is instead.
    """
    if not path.is_file():
        why = "it is a folder or a device, not a file" if path.exists() else "there is no such file"
        raise ConfigError(
            f"The {what} cannot be read.", where=str(path), why=why, hint="check the path in the settings"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(
            f"The {what} is too large.",
            where=str(path),
            why=f"it has {path.stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read",
            hint="split it",
        )


def read_records(path: Path) -> Iterator[Record]:
    """Yield a record for every line (csv: row) that is not blank.

    Args:
        path: its suffix says the format; any other suffix is read as plain text, one prompt a line.

    Raises:
        ConfigError: not a file, UTF-16, or a table without a column named prompt, text or caption.
    """
    check_file(path, "prompt file")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _json_records(path)
    elif suffix == ".csv":
        yield from _csv_records(path)
    elif suffix == ".tsv":
        yield from _tsv_records(path)
    elif suffix in {".json", ".xlsx", ".parquet", ".zip", ".gz"}:
        raise ConfigError(
            "The prompt file is of a kind that is not read.",
            where=str(path),
            why=f"found {suffix}; allowed: {', '.join(FORMATS)}",
        )
    else:
        for line, text, reason in _lines(path):
            yield Record(line, text, reason)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number from 1, text without its end, reason for rejection or '') of every non-blank line."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            if number == 1:
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise ConfigError(
                        "The prompt file is UTF-16.", where=str(path), why="UTF-8 is read", hint="save it as UTF-8"
                    )
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                size = len(raw) + _skip_line(file)
                yield number, _shown(raw), f"line of {size:,} bytes; at most {MAX_LINE_BYTES:,}"
                continue
            raw = raw.rstrip(b"\r\n")
            if not raw.strip():
                continue
            if b"\0" in raw:
                yield number, _shown(raw), f"NUL byte at byte {raw.index(0) + 1}"
                continue
            try:
                yield number, raw.decode("utf-8"), ""
            except UnicodeDecodeError as err:
                yield number, _shown(raw), f"not UTF-8: {err.reason} at byte {err.start + 1}"


def _shown(raw: bytes) -> str:
    return excerpt(raw[:200].decode("utf-8", "replace"))


def _skip_line(file: Any) -> int:
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _json_records(path: Path) -> Iterator[Record]:
    for line, text, reason in _lines(path):
        if reason:
            yield Record(line, text, reason)
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as err:
            yield Record(line, excerpt(text), f"not JSON: {excerpt(str(err), 80)}")
            continue
        if isinstance(value, str):
            yield Record(line, value)
            continue
        name = next((c for c in COLUMNS if isinstance(value, dict) and isinstance(value.get(c), str)), None)
        if name is None:
            yield Record(line, excerpt(text), f"no text under any of the keys {', '.join(COLUMNS)}")
        else:
            yield Record(line, value[name], fields={k: v for k, v in value.items() if k != name})


def _tsv_records(path: Path) -> Iterator[Record]:
    """Tabs part the columns and a line is a row; a quote is an ordinary character unless it encloses a whole field."""
    rows = ((line, line, [_unquote(cell) for cell in text.split("\t")], reason) for line, text, reason in _lines(path))
    yield from _table_records(path, rows)


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _csv_records(path: Path) -> Iterator[Record]:
    yield from _table_records(path, _csv_rows(path))


def _csv_rows(path: Path) -> Iterator[tuple[int, int, list[str], str]]:
    """Rows as (first line, last line, cells, reason); rejected lines come out on their own."""
    rejected: list[tuple[int, int, list[str], str]] = []
    first = last = 0

    def usable() -> Iterator[str]:
        nonlocal first, last
        for line, text, reason in _lines(path):
            if reason:
                rejected.append((line, line, [text], reason))
                continue
            first, last = first or line, line
            yield text + "\n"

    reader = csv.reader(usable())
    while True:
        first = 0
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as err:
            rejected.append((first, last, [], f"not CSV: {err}"))
            continue
        yield from rejected
        rejected.clear()
        yield first, last, row, ""
    yield from rejected


def _table_records(path: Path, rows: Iterator[tuple[int, int, list[str], str]]) -> Iterator[Record]:
    header: list[str] = []
    column = -1
    for first, last, cells, reason in rows:
        if reason:
            yield Record(first, cells[0] if cells else "", reason)
        elif not header:
            header = [cell.strip().lower() for cell in cells]
            column = next((header.index(name) for name in COLUMNS if name in header), -1)
            if column < 0:
                found = ", ".join(excerpt(cell, 20) for cell in cells[:10])
                raise ConfigError(
                    "The prompt table has no column of prompts.",
                    where=f"{path}, line {first}",
                    why=f"found the columns {found}; one must be named {', '.join(COLUMNS)}",
                    hint="name the column in the first line, or save the prompts as .txt, one a line",
                )
        elif last - first > MAX_QUOTED_LINES:
            why = f"a quote opened here takes in {last - first + 1} lines; is its end missing?"
            yield Record(first, excerpt(cells[0]), why)
        elif len(cells) <= column:
            yield Record(first, excerpt(" ".join(cells)), f"{len(cells)} columns, the prompt is in column {column + 1}")
        else:
            others = {name: cell for name, cell in zip(header, cells, strict=False) if name != header[column]}
            yield Record(first, cells[column], fields=others)


def clean_text(text: str, max_chars: int) -> tuple[str, str]:
    """Normalise a prompt: NFC, single spaces, no ends.

    Args:
        text: as read.
        max_chars: longest text allowed, in characters.

    Returns:
        The text, and '' or the reason why it cannot be used.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text, "half of a surrogate pair"
    if len(text) > 4 * max_chars:  # before normalising: NFC of hostile text is slow
        return text, f"{len(text):,} characters; at most {max_chars:,}"
    text = " ".join(unicodedata.normalize("NFC", text).replace("\ufeff", "").split())
    if not text:
        return text, "empty"
    for char in text:
        if unicodedata.category(char) in {"Cc", "Cs"} or char in _DECEPTIVE:
            return text, f"control character U+{ord(char):04X}"
    if len(text) > max_chars:
        return text, f"{len(text):,} characters; at most {max_chars:,}"
    return text, ""
