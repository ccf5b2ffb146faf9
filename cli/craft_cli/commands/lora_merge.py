"""``craft-fast lora merge``: several LoRAs as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from craft_cli import options as opt
from craft_cli.commands import lora_files as files
from craft_cli.commands.lora_resize import report_data, report_lines
from craft_cli.request import check
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_fast.quiet import quiet_third_party

HELP = opt.help_text(
    "Make one LoRA of several: the weighted sum of what they add.",
    "Weights may be negative. Ranks add up, and nothing is lost but the rounding of storage; --rank cuts the sum by "
    "singular values and says how far it is from the whole. For a path with a colon in it the last colon counts.",
    examples=(
        "craft-fast lora merge style.safetensors:0.7 sea.safetensors:0.5 -o both.safetensors",
        "craft-fast lora merge sea mountains:-0.3 -o both.safetensors --rank 32",
    ),
)
Out = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)]
Rank = Annotated[int | None, typer.Option("--rank", "-r", metavar="N", min=1, help="Cut the sum to this rank.")]
To = Annotated[
    str,
    typer.Option(
        "--to", metavar="NAME", autocompletion=opt.complete_from(*files.FORMATS), help="Key names: kohya or diffusers."
    ),
]


def merge(
    loras: files.WeightedFiles,
    output: Out,
    rank: Rank = None,
    to: To = "kohya",
    dtype: files.Dtype = None,
    model: files.Model = None,
    model_config: files.ModelConfig = None,
    force: files.Force = False,
    offline: files.Offline = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read all, add up, write, say what it is."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    check("--to", to, files.FORMATS)
    chosen = [files.choose(one, runs, weighted=True) for one in loras]
    out = files.output_path(output, chosen[0].path, "merged", force=force)
    wanted = files.dtype_of(dtype)
    quiet_third_party()
    named = files.model_of(model, model_config, next((one for one in chosen if one.run), None))
    with progress(mode) as sink:
        sink.stage("merge", 1, 1)
        config = files.unet_config(named, offline=offline)
        from craft_fast.lora.adapter import Adapter
        from craft_fast.lora.describing import merged_header, predictions
        from craft_fast.lora.merging import merge_adapters, merge_reduced
        from craft_fast.lora.writing import write_adapter
        from craft_fast.store.digest import sha256_once

        parts = [(files.read(one.path, config, named), one.weight) for one in chosen]
        if len(found := predictions(adapter for adapter, _ in parts)) > 1:
            sink.warn(f"these LoRAs say that their base models predict {' and '.join(sorted(found))}")
        report = None
        if rank is None:
            whole = merge_adapters(parts, dtype=wanted)
        else:
            whole, report = merge_reduced(parts, rank, dtype=wanted, progress=sink)
        said = [
            (one.path.name, sha256_once(one.path), one.weight, adapter)
            for one, (adapter, _) in zip(chosen, parts, strict=True)
        ]
        merged = Adapter(whole.layers, merged_header(said, whole, out.stem))
        written = write_adapter(out, merged, format="kohya" if to == "kohya" else "diffusers", unet_config=config)
    ranks = files.counted_ranks(merged)
    lines = [
        f"{out}: {len(chosen)} LoRAs, {len(merged.layers)} layers, {files.ranks_text(ranks)}, "
        f"{files.size_text(written.size)}",
        *(report_lines(report) if report else ()),
    ]
    data = {
        "output": str(out), **written._asdict(), "format": to, "ranks": {str(k): n for k, n in ranks.items()},
        "merged": [{"file": str(one.path), "weight": one.weight} for one in chosen],
        **(report_data(report) if report else {}),
    }  # fmt: skip
    print_result(mode, lines, data, event="result")
