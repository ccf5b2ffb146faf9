"""YAML as settings need it: plain scalars, lists and maps, every key once, every value with its line.

PyYAML's own safe loader follows YAML 1.1, where ``no`` is false, ``1e-4`` is a text and ``12:30`` a number, keeps
the last of two equal keys, and expands aliases without a limit. Here the resolver is YAML 1.2's core schema, and
tags, anchors, equal keys, deep nesting and large files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from craft_fast.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    """Starts without YAML 1.1's readings of plain words; the core schema's are added below."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the core schema or YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line ends, Unicode's among them, are escaped; other styles would fold them into spaces.
    broken = bool(text) and text.splitlines() != [text]
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if broken else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dump_inline(value: Any) -> str:
    """One value as one line of YAML that ``parse_yaml`` reads back as the same value."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """Parse a settings file.

    Args:
        path: a regular file of at most 256 KiB, UTF-8.

    Returns:
        The value and the line (from 1) of every key path in it.

    Raises:
        ConfigError: not there, not a file, too large, not UTF-8, or refused by ``parse_yaml``.
    """
    if not path.is_file():
        raise ConfigError(
            "The settings file cannot be read.",
            where=str(path),
            why="it is a folder or a device" if path.exists() else "there is no such file",
            hint="craft-fast init writes one to start from",
        )
    size = path.stat().st_size
    if size > MAX_BYTES:
        why = f"it has {size:,} bytes; at most {MAX_BYTES:,} are read"
        raise ConfigError("The settings file is too large.", where=str(path), why=why)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        why = f"byte {err.start}: {err.reason}"
        raise ConfigError("The settings file is not UTF-8 text.", where=str(path), why=why) from None
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> tuple[Any, Lines]:
    """Parse YAML text of the core schema; see the module's docstring for what is refused.

    Args:
        text: the YAML document.
        where: what to call it in errors, such as the file's name.

    Returns:
        The value and the line (from 1) of every key path in it.

    Raises:
        ConfigError: with the line, and what was found there.
    """

    def refuse(mark: Any, why: str) -> ConfigError:
        line = f", line {mark.line + 1}" if mark is not None else ""
        return ConfigError("The settings are not plain YAML.", where=where + line, why=why)

    try:
        _check_events(text, refuse)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as err:
        raise refuse(err.problem_mark, err.problem or "syntax error") from None
    except yaml.YAMLError as err:
        raise refuse(None, " ".join(str(err).split())) from None
    lines: Lines = {}
    value = None if node is None else _construct(node, (), lines, refuse)
    return value, lines


def _check_events(text: str, refuse: Callable[[Any, str], ConfigError]) -> None:
    """Refuse what plain settings never need, before anything is built from it."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise refuse(event.start_mark, "a second document begins here; one is read")
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise refuse(event.start_mark, "anchors and aliases (& and *) are not read; write the value out")
        elif tag := getattr(event, "tag", None):
            raise refuse(event.start_mark, f"the tag {tag!r} is not read; write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise refuse(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _construct(node: Any, path: tuple[str, ...], lines: Lines, refuse: Callable[[Any, str], ConfigError]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise refuse(key_node.start_mark, "a key must be a word")
            key = str(key_node.value)
            if key in found:
                raise refuse(key_node.start_mark, f"the key {key!r} is here a second time")
            lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = _construct(value_node, (*path, key), lines, refuse)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, str(i)), lines, refuse) for i, item in enumerate(node.value)]
    return _scalar(node, refuse)


def _scalar(node: Any, refuse: Callable[[Any, str], ConfigError]) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > 30:
            raise refuse(node.start_mark, f"a number of {len(text)} digits")
        return int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
