"""Tables of pictures and texts from files that may hold anything: csv, tsv, jsonl, json. No torch here."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from craft_fast.errors import ConfigError
from craft_fast.prompt_lines import check_file, excerpt

LISTS = (".csv", ".tsv", ".jsonl", ".json")
IMAGE_KEYS = ("image", "file", "path", "file_name", "filename")
TEXT_KEYS = ("prompt", "caption", "text")
MAX_TEXT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; ``text`` is None where the table has none for it, ``values`` are all of its columns."""

    line: int
    image: str | None
    text: str | None
    values: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: Path, what: str) -> Iterator[Row]:
    """The rows of a table of pictures.

    csv and tsv have a first line of column names. json is one object of name to text (or list of texts), or a list of
    objects; jsonl has an object a line. A picture is under the first of ``IMAGE_KEYS`` that is there, a text under the
    first of ``TEXT_KEYS``.

    Args:
        path: its suffix says the format.
        what: it is, for messages.

    Raises:
        ConfigError: not a file, another format, not UTF-8, or a line that cannot be read; it is named.
    """
    check_file(path, what)
    suffix = path.suffix.lower()
    if suffix not in LISTS:
        found = suffix or "no suffix"
        raise ConfigError(f"The {what} is of a kind that is not read.", where=str(path), why=_allowed(found))
    text = _decode(path, path.read_bytes())
    try:
        if suffix in (".csv", ".tsv"):
            yield from _table(path, text, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".jsonl":
            yield from _lines(path, text)
        else:
            yield from _object(path, text)
    except RecursionError:
        raise ConfigError("A file is nested too deeply.", where=str(path)) from None


def _allowed(found: str) -> str:
    return f"found {found}; allowed: {', '.join(LISTS)}"


def read_text(path: Path) -> str:
    """The text of a caption's own file, as it is.

    Raises:
        ConfigError: it cannot be read, is larger than ``MAX_TEXT_BYTES`` or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError("A caption cannot be read.", where=str(path), why=str(error.strerror)) from error
    if len(data) > MAX_TEXT_BYTES:
        why = f"it is larger than {MAX_TEXT_BYTES:,} bytes"
        raise ConfigError("A caption's file is too large.", where=str(path), why=why)
    return _decode(path, data)


def _decode(path: Path, data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError("A text file is UTF-16.", where=str(path), why="UTF-8 is read", hint="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        why = f"{error.reason} at byte {error.start + 1}"
        raise ConfigError(
            "A text file is not UTF-8.", where=f"{path}, line {line}", why=why, hint="save it as UTF-8"
        ) from None


def _table(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    if len(text) > csv.field_size_limit():
        csv.field_size_limit(len(text))
    # split at line feeds alone: splitlines would cut a text at U+2028 and its like.
    reader = csv.reader((line + "\n" for line in text.replace("\r\n", "\n").split("\n")), delimiter=delimiter)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            line, first = first, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip().lower() for cell in cells]
                if not set(header) & set(IMAGE_KEYS):
                    raise _no_column(path, line, cells)
                continue
            yield _row(line, dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise ConfigError("A table cannot be read.", where=f"{path}, line {reader.line_num}", why=str(error)) from None


def _no_column(path: Path, line: int, cells: list[str]) -> ConfigError:
    shown = ", ".join(excerpt(cell, 20) for cell in cells[:10])
    return ConfigError(
        "The table has no column of pictures.",
        where=f"{path}, line {line}",
        why=f"found the columns {shown}; one must be named {', '.join(IMAGE_KEYS)}",
        hint="name the columns in the first line: image,prompt",
    )


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value = _json(path, line, number)
            if not isinstance(value, dict):
                raise _not_an_object(path, number, value)
            yield _row(number, value)


def _object(path: Path, text: str) -> Iterator[Row]:
    value = _json(path, text, 1)
    if isinstance(value, list):
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise _not_an_object(path, number, item)
            yield _row(number, item)
    elif isinstance(value, dict):
        for number, (name, texts) in enumerate(value.items(), 1):
            for one in texts if isinstance(texts, list) else [texts]:
                if not isinstance(one, str):
                    why = f"under {excerpt(name)} is a {type(one).__name__}, a text is wanted"
                    raise ConfigError("A caption is not a text.", where=str(path), why=why)
                yield Row(number, name, one)
    else:
        raise _not_an_object(path, 1, value)


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        at = getattr(error, "lineno", 1) + line - 1
        raise ConfigError("A file is not JSON.", where=f"{path}, line {at}", why=excerpt(str(error), 100)) from None


def _not_an_object(path: Path, line: int, value: Any) -> ConfigError:
    why = f'found a {type(value).__name__}; wanted an object such as {{"image": "a.png", "prompt": "a cat"}}'
    return ConfigError("A file does not hold what it must.", where=f"{path}, line {line}", why=why)


def _row(line: int, values: Mapping[str, Any]) -> Row:
    def first(keys: tuple[str, ...]) -> str | None:
        return next((values[key] for key in keys if isinstance(values.get(key), str)), None)

    return Row(line, first(IMAGE_KEYS), first(TEXT_KEYS), values)
