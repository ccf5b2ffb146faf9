"""``craft-fast rewards list``: the published reward models, what their numbers mean, and which files are here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.ui.output import choose_mode, print_result
from craft_cli.ui.text import table

if TYPE_CHECKING:
    from craft_fast.rewards.catalog import Official

HELP = opt.help_text(
    "List reward models and their files.",
    "What each model's number means, whether it is better kept to judge than to filter, its licence, and which of its "
    "files are on this machine. Looked for on the shelf ($CRAFT_FAST_REWARDS, or the user's cache folder) and in the "
    "hub's cache. Nothing is fetched or loaded.",
    examples=(
        "craft-fast rewards list",
        "craft-fast rewards list --verbose",
        "craft-fast rewards list --json",
    ),
)
_GROUP = "craft_fast.rewards"

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every file with its address and its exact path.")]


def list_(verbose: Verbose = False, as_json: opt.Json = False, quiet: opt.Quiet = False) -> None:
    """Print the table."""
    from craft_fast.rewards import shelf
    from craft_fast.rewards.catalog import OFFICIALS

    mode = choose_mode(as_json=as_json, quiet=quiet)
    models = [model_data(official) for official in OFFICIALS.values()]
    data = {"shelf": str(shelf.shelf()), "rewards": models, "plug_ins": plug_ins()}
    print_result(mode, lines(data, verbose=verbose), data, event="result")


def model_data(official: Official) -> dict[str, Any]:
    """One model for a script."""
    from craft_fast.rewards import fetching, shelf
    from craft_fast.rewards.packages.install import installed
    from craft_fast.rewards.transfer import part_of

    have = shelf.find(official)
    files = []
    for asset, path in shelf.pairs(official, have):
        problem = have.problems.get(path, "") if path else ""
        begun = part_of(shelf.place(asset))
        files.append(
            {
                "role": asset.role,
                "file": asset.name,
                "state": "missing" if path is None else "damaged" if problem else "here",
                "problem": problem,
                "path": str(path or shelf.place(asset)),
                "url": fetching.address(asset),
                "bytes": path.stat().st_size if path else asset.size,
                "bytes_are_exact": path is not None or asset.exact,
                "begun_bytes": begun.stat().st_size if path is None and begun.is_file() else 0,
                "sha256": asset.sha256,
                "what": asset.why,
            }
        )
    return {
        "name": official.name,
        "title": official.title,
        "says": official.says,
        "note": official.note,
        "held_out_advised": official.held_out_advised,
        "licence": official.licence,
        "paper": official.paper,
        "family": official.spec.family,
        "package": official.package,
        "package_installed": installed(official.package) if official.package else None,
        "complete": all(file["state"] == "here" for file in files),
        "files": files,
    }


def plug_ins() -> list[dict[str, Any]]:
    """Rewards that installed packages bring; they are not imported."""
    found = []
    for one in sorted(entry_points(group=_GROUP), key=lambda one: one.name):
        package = f"{one.dist.name} {one.dist.version}" if one.dist else ""
        found.append({"name": one.name, "object": one.value, "package": package})
    return found


def lines(data: dict[str, Any], *, verbose: bool) -> list[str]:
    """The list for a person: two lines a model, at most 100 columns unless it is verbose."""
    rows = [["name", "files", "advised for", "licence", "authors' package"]]
    for model in data["rewards"]:
        # Which torch it was made with is in the JSON; here it would make the line too long.
        made = (model["package_installed"] or "").partition(" (")[0]
        package = made or (f"{model['package']}: not installed" if model["package"] else "-")
        advised = "held out" if model["held_out_advised"] else "filter"
        rows.append([model["name"], files_text(model["files"]), advised, model["licence"], package])
    head, *body = table(rows)
    shown = [head]
    for line, model in zip(body, data["rewards"], strict=True):
        shown += [line, f"  {model['says']}"]
        if verbose:
            shown += [f"  {model['title']}, {model['paper']}"]
            shown += [f"  {model['note']}"] if model["note"] else []
            shown += [text for file in model["files"] for text in _file_lines(file)]
        else:
            shown += [f"  damaged: {file['path']}: {file['problem']}" for file in _in(model["files"], "damaged")]
    for one in data["plug_ins"]:
        shown.append(f"plug-in {one['name']}: {one['object']}" + (f", of {one['package']}" if one["package"] else ""))
    shown.append(f"files go to {data['shelf']}; craft-fast rewards fetch NAME gets them")
    return shown


def _in(files: list[dict[str, Any]], state: str) -> list[dict[str, Any]]:
    return [file for file in files if file["state"] == state]


def files_text(files: list[dict[str, Any]]) -> str:
    """``1.97 GB here``, ``1.71 GB here, 3.71 MB missing``; about sizes are told as such."""
    from craft_fast.rewards.shelf import size_text

    parts = []
    for state in ("here", "damaged", "missing"):
        some = _in(files, state)
        if some:
            about = "" if all(file["bytes_are_exact"] for file in some) else "~"
            parts.append(f"{about}{size_text(sum(file['bytes'] for file in some))} {state}")
    begun = sum(file["begun_bytes"] for file in files)
    return ", ".join(parts) + (f" ({size_text(begun)} begun)" if begun else "")


def _file_lines(file: dict[str, Any]) -> Iterable[str]:
    from craft_fast.rewards.shelf import size_text

    size = ("" if file["bytes_are_exact"] else "~") + size_text(file["bytes"])
    yield f"    {file['state']:8} {size:>8}  {Path(file['path'])}" + (f": {file['problem']}" if file["problem"] else "")
    if file["state"] != "here":
        yield f"             from  {file['url']}"
