"""Settings in and out: preset < file < ``--set``, every error at once, and the commented YAML that reads back.

``load_settings`` is the only door through which text becomes ``Settings``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from craft_fast.config import RewardSettings, Section, Settings, SlotSettings
from craft_fast.errors import ConfigError, closest
from craft_fast.settings_checks import cross_checks, not_finite
from craft_fast.settings_yaml import Lines, dump_inline, parse_yaml, read_yaml

NO_PRESET = "none"


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """What is known of one setting; feeds ``--help``, the commented YAML and the docs."""

    key: str
    text: str
    unit: str
    source: str
    allowed: str
    default: Any


@dataclass(slots=True)
class _Layer:
    """One source of values: a preset, a file, or the ``--set`` options."""

    name: str
    data: dict[str, Any]
    lines: Lines


def preset_names() -> list[str]:
    """Names that ``--preset`` takes, in alphabetical order, numbers by their size."""
    names = (p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _presets() -> Traversable:
    return resources.files("craft_fast").joinpath("presets")


def load_settings(preset: str = "tiny", config: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Resolve the settings of a run.

    A file that holds ``preset: NAME`` builds on that preset whatever ``preset`` says, and a preset may build on
    another in the same way; ``preset: none``, which ``render_yaml`` writes, means that the file is complete.
    ``rewards.NAME: null`` takes a reward out.

    Args:
        preset: one of ``preset_names()``, or ``none`` for the bare defaults.
        config: a YAML file whose values go over the preset's.
        overrides: texts such as ``train.rank=32``; the value is read as YAML and goes over the file's.

    Returns:
        The validated settings.

    Raises:
        ConfigError: every problem found, each with key, value found, what is allowed, and the closest known key.
    """
    problems: list[str] = []
    layers: list[_Layer] = []
    if config is not None:
        layers += _file_layer(config, problems)
        if layers and "preset" in layers[-1].data:
            preset = str(layers[-1].data.pop("preset"))
    layers = [*_preset_layers(preset, problems), *layers, _override_layer(overrides, problems)]
    merged: dict[str, Any] = {}
    for layer in layers:
        problems += _unknown_keys(layer)
        _merge(merged, layer.data)
    return _validate(merged, layers, problems)


def _preset_layers(name: str, problems: list[str]) -> list[_Layer]:
    """A preset and those it builds on by a ``preset:`` of its own, the lowest first."""
    layers: list[_Layer] = []
    chain: list[str] = []
    while name != NO_PRESET:
        by = f" (preset {chain[-1]})" if chain else ""
        if name in chain:
            problems.append(f"preset: found {name!r}{by}; it builds on itself: {' -> '.join([*chain, name])}")
            break
        known = preset_names()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"preset: found {name!r}{by}; must be one of {', '.join([*known, NO_PRESET])}{guess}")
            break
        chain.append(name)
        data, lines = parse_yaml(_presets().joinpath(f"{name}.yaml").read_text("utf-8"), where=f"preset {name}")
        layers.insert(0, _Layer(f"preset {name}", data, lines))
        name = str(data.pop("preset", NO_PRESET))
    return layers


def _file_layer(path: Path, problems: list[str]) -> list[_Layer]:
    try:
        data, lines = read_yaml(path)
    except ConfigError as err:
        problems.append(f"{err.where}: {err.what} {err.why}")
        return []
    if data is None:
        data = {}
    if not isinstance(data, dict):
        problems.append(f"{path}: found a {type(data).__name__}; must be sections such as 'train:' with keys below")
        return []
    return [_Layer(str(path), data, lines)]


def _override_layer(overrides: Sequence[str], problems: list[str]) -> _Layer:
    layer = _Layer("--set", {}, {})
    for text in overrides:
        key, equals, raw = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"--set {text}: must look like train.rank=32")
            continue
        try:
            value, _ = parse_yaml(raw, where=f"--set {key}")
        except ConfigError as err:
            problems.append(f"{err.where}: found {_show(raw)}; {err.why}")
            continue
        kind = _annotation(tuple(parts))
        if not isinstance(value, str) and (kind is str or (kind == str | None and value is not None)):
            value = raw.strip()  # a name may look like a number: --set export.name=007
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        _merge(layer.data, nested)
    return layer


def _merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put ``over`` on top of ``into``: maps are merged, everything else is replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _model_at(path: tuple[str, ...]) -> type[BaseModel] | Mapping[str, type[BaseModel]] | None:
    """The model whose fields live at ``path``; for ``rewards`` and ``expand.slots`` any name leads to one."""
    if path in {("rewards",), ("expand", "slots")}:
        return {}
    if path[:1] == ("rewards",):
        return RewardSettings if len(path) == 2 else None
    if path[:2] == ("expand", "slots"):
        return SlotSettings if len(path) == 3 else None
    model: type[BaseModel] = Settings
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return model


def _annotation(path: tuple[str, ...]) -> Any:
    """The type of the setting at ``path``; None when there is no such setting."""
    model = _model_at(path[:-1])
    if not isinstance(model, type) or path[-1] not in model.model_fields:
        return None
    return model.model_fields[path[-1]].annotation


def _unknown_keys(layer: _Layer) -> list[str]:
    """One line for each key that no section has; the key is dropped so that the rest is still checked."""
    found: list[str] = []

    def walk(data: dict[str, Any], path: tuple[str, ...]) -> None:
        model = _model_at(path)
        if model is None:
            return
        for key in list(data):
            here = (*path, key)
            if isinstance(model, type) and key not in model.model_fields:
                dotted, known = ".".join(here), [".".join((*path, k)) for k in model.model_fields]
                where = _where(layer, here)
                found.append(f"{dotted}: unknown key{where}, found {_show(data.pop(key))}{_closest(dotted, known)}")
            elif isinstance(data[key], dict):
                walk(data[key], here)

    walk(layer.data, ())
    return found


def _closest(name: str, known: Sequence[str]) -> str:
    """`` ; did you mean X?`` by spelling, or by the last word among all settings (``rank`` -> ``train.rank``)."""
    tails: dict[str, str] = {}
    for doc in field_docs():
        tails.setdefault(doc.key.rpartition(".")[2], doc.key)
    if name.rpartition(".")[2] in tails and tails[name.rpartition(".")[2]] not in known:
        close = [tails[name.rpartition(".")[2]]]
    else:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        close = [tails[tail] for tail in difflib.get_close_matches(name, list(tails), n=1, cutoff=0.75)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known[:20])}" if "." in name or len(known) < 20 else ""


def _where(layer: _Layer, path: tuple[str, ...]) -> str:
    line = layer.lines.get(path)
    return f" ({layer.name}, line {line})" if line else f" ({layer.name})"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _validate(data: dict[str, Any], layers: Sequence[_Layer], problems: list[str]) -> Settings:
    _drop_removed(data)
    # Without its preset a file may lack rewards; saying so would hide what is wrong.
    bad_sections = {"rewards", "filter"} if any(text.startswith("preset:") for text in problems) else set()
    for path, text in not_finite(data):
        problems.append(f"{'.'.join(path)}: {text}{_origin(layers, path)}")
        bad_sections.add(path[0])
    settings, failures = _typed(data)
    for path, text in failures:
        problems.append(f"{'.'.join(path)}: {text}{_origin(layers, path)}")
        bad_sections.add(path[0])
    if settings is None:
        settings, _ = _typed({name: part for name, part in data.items() if name not in bad_sections})
    if settings is not None:
        problems += [text for sections, text in cross_checks(settings) if not bad_sections & sections]
    if problems or settings is None:
        count = f"{len(problems)} settings are" if len(problems) > 1 else "A setting is"
        raise ConfigError(
            f"{count} not right.",
            why="\n    " + "\n    ".join(problems),
            hint="craft-fast init writes every setting with its meaning and default",
        )
    return settings


def _typed(data: dict[str, Any]) -> tuple[Settings | None, list[tuple[tuple[str, ...], str]]]:
    """Validate strictly: through JSON, so that maps become sections and nothing else is converted."""
    try:
        return Settings.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as err:
        return None, [_failure(dict(e)) for e in err.errors(include_url=False)]


def _failure(error: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    path = tuple(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return path, "missing; must be given"
    message = str(error["msg"])
    for prefix in ("Input should be a valid ", "Input should be "):
        if message.startswith(prefix):
            message = "must be " + ("a " if "valid" in prefix else "") + message.removeprefix(prefix)
            break
    choices = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
    guess = closest(error["input"], choices).strip() if choices and isinstance(error["input"], str) else ""
    return path, f"found {_show(error['input'])}; {message[0].lower()}{message[1:]}{'; ' if guess else ''}{guess}"


def _origin(layers: Sequence[_Layer], path: tuple[str, ...]) -> str:
    """Which layer gave the value, the topmost that holds it."""
    for layer in reversed(layers):
        at: Any = layer.data
        for part in path:
            at = at.get(part, _ABSENT) if isinstance(at, dict) else _ABSENT
        if at is not _ABSENT:
            return _where(layer, path)
    return ""


_ABSENT = object()


def _drop_removed(data: dict[str, Any]) -> None:
    """``rewards.NAME: null`` and ``expand.slots.NAME: null`` take the entry out."""
    expand = data.get("expand")
    for entries in (data.get("rewards"), expand.get("slots") if isinstance(expand, dict) else None):
        if isinstance(entries, dict):
            for name in [name for name, value in entries.items() if value is None]:
                del entries[name]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """A settings tree by dotted keys, ``{"train.rank": 16}``; an empty map or a list is a value."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}.{key}" if path else str(key))
    return found


def field_docs(model: type[BaseModel] = Settings, prefix: str = "") -> list[FieldDoc]:
    """Every setting in the order of the YAML, with its dotted key."""
    docs: list[FieldDoc] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            docs += field_docs(inner, f"{prefix}{name}.")
        else:
            docs.append(_field_doc(prefix + name, field))
    return docs


def _field_doc(key: str, field: FieldInfo) -> FieldDoc:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    unit, source = (str(extra.get(word, "")) for word in ("unit", "source"))
    return FieldDoc(key, field.description or "", unit, source, _allowed(field), default)


def _allowed(field: FieldInfo) -> str:
    choices = [str(a) for a in get_args(field.annotation) if isinstance(a, str)]
    if choices:
        return " | ".join(choices)
    words = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in words.items() if hasattr(m, name)]
    optional = ["or null"] if type(None) in get_args(field.annotation) else []
    return ", ".join(bounds + optional)


def render_yaml(settings: Settings) -> str:
    """The settings as commented YAML: meaning, unit, allowed values, default and source of every field.

    ``load_settings(config=...)`` of the text gives equal settings.
    """
    out = [
        "# Settings of a craft-fast run. Change what you like; what you delete falls back to its default.",
        "# A name that is not known, or a value out of range, is an error that says what is allowed.",
        "",
        "# none: this file is complete. A preset's name: the values below go over that preset's",
        f"preset: {NO_PRESET}",
    ]
    for name, field in Settings.model_fields.items():
        out += ["", *_render_field(name, field, getattr(settings, name), "")]
    return "\n".join(out) + "\n"


def _render_field(name: str, field: FieldInfo, value: Any, indent: str) -> list[str]:
    if isinstance(value, BaseModel):
        return [f"{indent}# {field.description}", f"{indent}{name}:", *_render_model(value, indent + "  ")]
    out = [f"{indent}# {_comment(field)}"]
    if isinstance(value, dict) and value and not any(isinstance(inner, BaseModel) for inner in value.values()):
        out += [f"{indent}{name}:", *(f"{indent}  {dump_inline(k)}: {dump_inline(v)}" for k, v in value.items())]
    elif isinstance(value, dict) and value:
        out.append(f"{indent}{name}:")
        for key, inner in value.items():
            out += [f"{indent}  {dump_inline(key)}:", *_render_model(inner, indent + "    ")]
    elif isinstance(value, list) and len(dump_inline(value)) > 100:
        out += [f"{indent}{name}:", *(f"{indent}  - {dump_inline(item)}" for item in value)]
    else:
        out.append(f"{indent}{name}: {dump_inline(value)}")
    return out


def _render_model(model: BaseModel, indent: str) -> list[str]:
    fields = type(model).model_fields
    return [line for name, field in fields.items() for line in _render_field(name, field, getattr(model, name), indent)]


def _comment(field: FieldInfo) -> str:
    doc = _field_doc("", field)
    parts = [doc.text]
    parts += [f"unit: {doc.unit}"] if doc.unit else []
    parts += [doc.allowed] if doc.allowed else []
    if not field.is_required() and len(dump_inline(doc.default)) < 60:
        parts.append("default: " + dump_inline(doc.default))
    parts += [f"source: {doc.source}"] if doc.source else []
    return " -- ".join(parts).replace("\n", " ")


def section_digest(section: Section, exclude: Sequence[str] = ()) -> str:
    """Digest of a section's values, the settings' part of a stage key.

    Args:
        section: any section of the settings, or the whole.
        exclude: top-level fields of it that do not change the stage's result.

    Returns:
        sha256 as hex; equal values give equal digests whatever their order in the file.
    """
    from craft_fast.store.digest import digest_json

    return digest_json(section.model_dump(mode="json", exclude=set(exclude)))
