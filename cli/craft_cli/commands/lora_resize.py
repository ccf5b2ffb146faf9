"""``craft-fast lora resize``: a lower rank, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.commands import lora_files as files
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_cli.ui.text import table
from craft_fast.errors import UsageError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.lora.resizing import ResizeReport

HELP = opt.help_text(
    "Lower a LoRA's rank by singular values, and say how far it is from what it was.",
    "Each layer becomes the closest one of its new rank. The error is |after - before| / |before| of what the LoRA "
    "adds to the weights (Frobenius norms), rounding included: 0.05 means that 5 % of the change is lost. Layers that "
    "are small enough stay to the bit.",
    examples=(
        "craft-fast lora resize sea.safetensors --rank 8",
        "craft-fast lora resize sea --max-error 0.05 -o sea-small.safetensors",
    ),
)
Rank = Annotated[int | None, typer.Option("--rank", "-r", metavar="N", help="The rank of every layer at most.")]
MaxError = Annotated[
    float | None,
    typer.Option("--max-error", metavar="E", help="Of each layer the lowest rank whose error is at most E, 0 to 1."),
]
_WORST = 5


def resize(
    file: files.File,
    rank: Rank = None,
    max_error: MaxError = None,
    output: files.Output = None,
    dtype: files.Dtype = None,
    model: files.Model = None,
    model_config: files.ModelConfig = None,
    force: files.Force = False,
    offline: files.Offline = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read, cut, write, say what was lost."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    if rank is None and max_error is None:
        raise UsageError("Neither a rank nor an error to stay under is given", hint="--rank 8 or --max-error 0.05")
    chosen = files.choose(file, runs)
    ending = f"rank{rank}" if rank is not None else f"error{max_error:g}"
    out = files.output_path(output, chosen.path, ending, force=force)
    wanted = files.dtype_of(dtype)
    quiet_third_party()
    named = files.model_of(model, model_config, chosen)
    with progress(mode) as sink:
        sink.stage("resize", 1, 1)
        config = files.unet_config(named, offline=offline)
        adapter = files.read(chosen.path, config, named)
        from craft_fast.lora.describing import listed_entries, network_entries, written_as
        from craft_fast.lora.resizing import resize_adapter
        from craft_fast.lora.writing import write_adapter

        resized, report = resize_adapter(adapter, rank, max_error=max_error, dtype=wanted, progress=sink)
        resized = files.in_dtype(resized, wanted)
        header = {**listed_entries(resized.metadata), **network_entries(resized, out.stem)}
        written = write_adapter(out, resized, format=written_as(chosen.path), unet_config=config, metadata=header)
    lines = [
        f"{out}: {report.changed} of {len(report.layers)} layers cut, {files.size_text(written.size)} "
        f"(before {files.size_text(chosen.path.stat().st_size)})",
        *report_lines(report),
    ]
    data = {"output": str(out), **written._asdict(), **report_data(report)}
    print_result(mode, lines, data, event="result")


def report_lines(report: ResizeReport) -> list[str]:
    """The error of all layers together, and those that lost most."""
    lines = [f"error {report.error:.3g} of what the LoRA adds; {report.kept:.2%} of its norm is kept"]
    worst = report.worst(_WORST)
    if worst:
        rows = [["worst layers", "rank", "error"]]
        rows += [[name, f"{one.rank_before} -> {one.rank_after}", f"{one.error:.3g}"] for name, one in worst]
        lines += table(rows, right=(2,))
    return lines


def report_data(report: ResizeReport) -> dict[str, Any]:
    """The same for a script, with every layer."""
    layers = {
        name: {"rank_before": one.rank_before, "rank_after": one.rank_after, "error": one.error, "kept": one.kept}
        for name, one in report.layers.items()
    }
    return {"error": report.error, "kept": report.kept, "changed": report.changed, "layers": layers}
