"""``python -m craft_cli.reference [FOLDER]`` writes the two reference pages of the docs from the code.

What a page says is what the command's own help and the settings' own fields say; a test compares the committed pages
with what is written here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from craft_cli.main import app
from craft_fast.errors import ExitCode

if TYPE_CHECKING:
    from craft_fast.settings_io import FieldDoc

FOLDER = Path("docs/reference")
_NOTE = "*Made from the code by `make reference`; a test holds this page to it, so edit the code.*"
# Variables of the environment that are no option's; a test looks for others in the code.
VARIABLES = {
    "CRAFT_DEBUG": "1: tracebacks, and what other libraries say",
    "CRAFT_FAST_REWARDS": "folder of the reward models' files; default: `craft-fast/rewards` in the user's cache",
    "CRAFT_FAST_PACKAGES": "folder of the authors' packages; default: `craft-fast/packages` in the user's cache",
    "CRAFT_KERNELS_IMPL": "`torch` or `triton`: the form of every op, whatever would be chosen",
    "CRAFT_BENCH_COMMIT": "what rows of `craft-fast bench` name as the commit where there is no git",
    "XDG_CACHE_HOME": "the user's cache; default: `~/.cache`",
    "HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE": "as huggingface_hub reads them",
}
_EXTRAS = re.compile(r"  \[([^][]*)\]$")


def cli_reference() -> str:
    """The page of all commands, in Markdown."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="craft-fast")
    commands = list(_commands(root, context))
    rows = [(f"[`{path}`](#{anchor(path)})", _summary(command.help)) for path, command, _ in commands]
    out = ["# Commands", "", _NOTE, "", *_table(("command", "what it does"), rows), ""]
    out += ["Every command has `-h, --help`; `craft-fast --version` says which version this is.", ""]
    out += ["## Exit codes", "", *_table(("code", "meaning"), _exit_codes(str(root.epilog))), ""]
    out += ["## Environment", "", "An option's own variable is named with the option.", ""]
    names = [(", ".join(f"`{word}`" for word in name.split(", ")), text) for name, text in VARIABLES.items()]
    out += _table(("variable", "meaning"), names)
    for path, command, ctx in commands:
        out += ["", f"## {path}", "", *_command(command, ctx)]
    return "\n".join(out) + "\n"


def _commands(group: Any, context: typer.Context) -> Iterator[tuple[str, Any, typer.Context]]:
    """Every command below ``group`` with its path as typed, in the order of the help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        yield inner.command_path, command, inner
        if hasattr(command, "list_commands"):
            yield from _commands(command, inner)


def _command(command: Any, context: typer.Context) -> list[str]:
    examples: list[str] = []
    texts: list[str] = []
    for paragraph in str(command.help).split("\n\n"):
        lines = paragraph.strip("\b\n").splitlines()
        if lines[0] == "Examples:":
            examples = [line.strip() for line in lines[1:]]
        else:
            texts += [*(line.strip() for line in lines), ""]
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    rows = [_parameter(one, context) for one in command.params]
    options = [row for row in rows if row]
    out = ["```", usage, "```", "", *texts]
    if options:
        out += [*_table(("argument or option", "meaning", "default", "more"), options), ""]
    return [*out, "```", *examples, "```"]


def _parameter(parameter: Any, context: typer.Context) -> tuple[str, ...]:
    """One row: how it is written, what it means, its default, and its variable or bounds."""
    record = parameter.get_help_record(context)
    if record is None:
        return ()
    written, text = record
    found = _EXTRAS.search(text)
    default, more = "", []
    for extra in found[1].split("; ") if found else ():
        if extra.startswith("default: "):
            default = f"`{extra.removeprefix('default: ')}`"
        elif extra.startswith("env var: "):
            more.append(f"`{extra.removeprefix('env var: ')}`")
        else:
            more.append(extra.replace("x>=", "at least ").replace("x<=", "at most "))
    # An argument's type stands behind its name in angle brackets, and says no more than the text.
    written = re.sub(r" <[^>]*>$", "", written)
    return f"`{written}`", _EXTRAS.sub("", text), default, ", ".join(more)


def _exit_codes(epilog: str) -> list[tuple[str, str]]:
    rows = re.findall(r"^ +(\d+) +(.+)$", epilog, flags=re.MULTILINE)
    return [(f"{code} `{ExitCode(int(code)).name}`", text) for code, text in rows]


def _summary(text: str) -> str:
    return text.split("\n\n")[0].replace("\n", " ").strip()


# ---- settings


def settings_reference() -> str:
    """The page of all settings, in Markdown."""
    from craft_fast.config import RewardSettings, Settings, SlotSettings
    from craft_fast.settings_io import field_docs

    sections = {name: str(field.description) for name, field in Settings.model_fields.items() if name != "seed"}
    docs = field_docs()
    out = [
        "# Settings", "", _NOTE, "",
        "What a run is told, lowest first: the defaults below, the preset (`--preset`), a file (`--config`; "
        "`craft-fast init` writes one with all of this in it), `--set KEY=VALUE`. A run keeps what came out in its "
        "folder as `config.yaml`, and the next command for it starts from there. An unknown key or a value out of "
        "range is exit code 3, all of them at once, with the closest name.", "",
        "Sections: " + ", ".join(f"[{name}](#{anchor(_heading(name, text))})" for name, text in sections.items())
        + "; [presets side by side](#presets-side-by-side).", "",
        *_fields([doc for doc in docs if doc.key == "seed"]),
    ]  # fmt: skip
    for name, text in sections.items():
        found = [doc for doc in docs if doc.key.startswith(f"{name}.")]
        if name == "rewards":
            found = field_docs(RewardSettings, "rewards.NAME.")
        if name == "expand":
            found = [doc for doc in found if doc.key != "expand.slots"]
            found += field_docs(SlotSettings, "expand.slots.NAME.")
        out += ["", f"## {_heading(name, text)}", "", *_fields(found)]
    return "\n".join([*out, "", "## Presets side by side", "", *_presets()]) + "\n"


def _heading(name: str, text: str) -> str:
    return f"{name}: {text}"


def _fields(docs: Sequence[FieldDoc]) -> list[str]:
    from craft_fast.settings_yaml import dump_inline

    rows = []
    for doc in docs:
        required = doc.default is None and "null" not in doc.allowed
        default = "must be given" if required else _code(dump_inline(doc.default))
        allowed = ", ".join(f"`{word}`" for word in doc.allowed.split(" | ")) if " | " in doc.allowed else doc.allowed
        rows.append((f"`{doc.key}`", doc.text, allowed, doc.unit, default, _source(doc.source)))
    return _table(("setting", "meaning", "allowed", "unit", "default", "source"), rows)


def _code(value: str) -> str:
    return f"`{value}`" if value else ""


def _source(text: str) -> str:
    """A link to the paper, or to the item of the method's page."""
    if text.startswith("arXiv "):
        return f"[{text}](https://arxiv.org/abs/{text.removeprefix('arXiv ')})"
    item = re.fullmatch(r"design\.md 1(?: item (\d))?", text)
    if item is None:
        return text
    return (
        f"[item {item[1]}](../how-craft-works.md#item-{item[1]})" if item[1] else "[the method](../how-craft-works.md)"
    )


def _presets() -> list[str]:
    """What each preset is for, and what it changes: of the defaults, or of ``sdxl`` that those for a card build on."""
    from craft_fast.config import Settings
    from craft_fast.settings_io import load_settings, preset_names

    names = preset_names()
    found = {name: dict(_leaves(load_settings(name).model_dump(mode="json"))) for name in names}
    found["default"] = dict(_leaves(Settings().model_dump(mode="json")))
    base = {name: "sdxl" if name.startswith("sdxl-") else "default" for name in names}
    out = [f"- `{name}`: {_about(name)}" for name in names]
    for title, above in (("The two that stand alone", "default"), ("Those for a card, beside `sdxl`", "sdxl")):
        chosen = [name for name in names if base[name] == above]
        keys = dict.fromkeys(key for name in (above, *chosen) for key in found[name])
        rows = []
        for key in sorted(keys, key=lambda key: list(Settings.model_fields).index(key.partition(".")[0])):
            before = found[above].get(key)
            cells = ["" if found[name].get(key) == before else _cell(found[name].get(key)) for name in chosen]
            if any(cells):
                rows.append((f"`{key}`", _cell(before) if key in found[above] else "", *cells))
        head = ("setting", above if above == "default" else f"`{above}`", *(f"`{name}`" for name in chosen))
        out += ["", f"### {title}", "", "An empty cell is as the first column.", "", *_table(head, rows)]
    return out


def _about(name: str) -> str:
    """The first paragraph of the comment that a preset begins with."""
    from importlib import resources

    text = resources.files("craft_fast").joinpath("presets", f"{name}.yaml").read_text("utf-8")
    lines = re.match(r"(?:# .*\n)+", text)
    return " ".join(line.removeprefix("# ") for line in lines[0].splitlines()) if lines else ""


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting; a reward is one value, and so are all slots."""
    for key, value in tree.items():
        here = f"{path}{key}"
        if path == "rewards.":
            yield here, value["kind"] + (", held out" if value["held_out"] else "")
        elif isinstance(value, dict) and here != "expand.slots":
            yield from _leaves(value, f"{here}.")
        else:
            yield here, value


def _cell(value: Any) -> str:
    from craft_fast.settings_yaml import dump_inline

    if isinstance(value, dict) or (isinstance(value, list) and len(dump_inline(value)) > 40):
        return f"{len(value)} of its own" if value else "none"
    return f"`{dump_inline(value)}`"


# ---- Markdown


def anchor(heading: str) -> str:
    """The link to a heading as GitHub makes it: lower case, spaces to dashes, other marks dropped."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_reference, "settings.md": settings_reference}


def write(folder: Path) -> list[Path]:
    """Write both pages.

    Args:
        folder: made where it is missing.

    Returns:
        The files that are other than before.
    """
    from craft_fast.store import atomic

    atomic.make_folder(folder.absolute())
    changed = []
    for name, page in PAGES.items():
        path, text = folder / name, page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic.write_text(path, text)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        sys.stdout.write(f"wrote {written}\n")
