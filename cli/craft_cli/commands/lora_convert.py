"""``craft-fast lora convert``: from one program's key names to another's."""

from __future__ import annotations

from typing import Annotated

import typer

from craft_cli import options as opt
from craft_cli.commands import lora_files as files
from craft_cli.request import check
from craft_cli.ui.output import choose_mode, print_result
from craft_fast.quiet import quiet_third_party

HELP = opt.help_text(
    "Write a LoRA in kohya's or diffusers' key names; values stay to the bit.",
    "kohya: what ComfyUI, A1111, Forge and diffusers all load. diffusers: PEFT's names, which ComfyUI and A1111 do not "
    "load. What is written is held against every program's rules and read back.",
    examples=(
        "craft-fast lora convert sea-peft.safetensors --to kohya",
        "craft-fast lora convert sea --to diffusers -o sea-diffusers.safetensors --dtype float16",
    ),
)
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="NAME",
        autocompletion=opt.complete_from(*files.FORMATS),
        help="kohya or diffusers.",
        show_default=False,
    ),
]


def convert(
    file: files.File,
    to: To,
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
    """Read, write, check, say what was written."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    check("--to", to, files.FORMATS)
    chosen = files.choose(file, runs)
    out = files.output_path(output, chosen.path, to, force=force)
    wanted = files.dtype_of(dtype)
    quiet_third_party()
    named = files.model_of(model, model_config, chosen)
    config = files.unet_config(named, offline=offline)
    adapter = files.in_dtype(files.read(chosen.path, config, named), wanted)
    from craft_fast.lora.describing import listed_entries
    from craft_fast.lora.writing import write_adapter

    written = write_adapter(
        out, adapter, format="kohya" if to == "kohya" else "diffusers", unet_config=config,
        metadata=listed_entries(adapter.metadata),
    )  # fmt: skip
    data = {"output": str(out), "format": to, "layers": len(adapter.layers), **written._asdict()}
    whose = "kohya's" if to == "kohya" else "diffusers'"
    lines = [f"{out}: {len(adapter.layers)} layers in {whose} names, {files.size_text(written.size)}"]
    print_result(mode, lines, data, event="result")
