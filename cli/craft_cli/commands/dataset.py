"""``craft-fast dataset``: the accepted pictures as an ordinary dataset."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from craft_cli import options as opt
from craft_cli.request import Request, check
from craft_cli.ui.output import choose_mode, print_result, progress

HELP = opt.help_text(
    "Write the accepted pictures as a folder, with weights.",
    "Pictures, a caption beside each (NAME.txt), and metadata.jsonl: what kohya's trainers and Hugging Face's "
    "imagefolder read. craft-fast run --images OUT takes it back with the same selection and weights.",
    examples=(
        "craft-fast dataset accepted --name sea",
        "craft-fast dataset all --name sea --all --caption expanded",
    ),
)


def dataset(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    name: opt.Name = None,
    caption: Annotated[
        str,
        typer.Option(
            "--caption", metavar="TEXT", autocompletion=opt.complete_from("base", "expanded"),
            help="base: the prompt; expanded: the variant that drew the picture.",
        ),
    ] = "base",
    everything: Annotated[bool, typer.Option("--all", help="The rejected pictures, too, without weights.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a folder that is there.")] = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Read a run, write a folder; the run is not changed."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    check("--caption", caption, ("base", "expanded"))
    request = Request(name, runs)
    root = request.existing_root()
    from craft_fast.pipeline import CONFIG_NAME, export_dataset

    with progress(mode) as sink:
        written = export_dataset(root, out, caption=caption, everything=everything, force=force, progress=sink)
    # The run's own settings, among them which model, which held-out prompts and which buckets.
    words = ["craft-fast", "run", "--config", str(root / CONFIG_NAME), "--images", str(out), "--name", "NEW"]
    retry = shlex.join(words)
    lines = [
        f"wrote {written.pictures} pictures, {written.accepted} of them accepted, to {written.path}",
        f"to train on them here: {retry}",
    ]
    data = {"path": str(written.path), "pictures": written.pictures, "accepted": written.accepted,
            "bytes": written.size, "next": retry}  # fmt: skip
    print_result(mode, lines, data, event="result")
