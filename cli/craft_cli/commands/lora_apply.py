"""``craft-fast lora apply``: LoRAs put into a whole model for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from craft_cli import options as opt
from craft_cli.commands import lora_files as files
from craft_cli.request import check
from craft_cli.ui.output import choose_mode, print_result, progress
from craft_fast.errors import UsageError
from craft_fast.quiet import quiet_third_party

HELP = opt.help_text(
    "Write a whole SDXL with LoRAs in it, to be used without them.",
    "The model may be a folder in diffusers' layout, one .safetensors file, or a hub id; OUT is one file where it ends "
    "in .safetensors, else a folder. Weights keep their number format, those that no LoRA touches their bytes; the "
    "model is read and written tensor by tensor. The header names the LoRAs and their strengths.",
    examples=(
        "craft-fast lora apply sea.safetensors --model sdxl.safetensors -o sdxl-sea.safetensors",
        "craft-fast lora apply sea:0.8 style.safetensors:0.4 --model models/sdxl -o models/sdxl-sea",
    ),
)
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="PATH", show_default=False,
        help="The base model: folder, .safetensors file, package:NAME/FOLDER or hub id. Default: the run's.",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", show_default=False, help="A folder, or a file that ends in .safetensors."
    ),
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", metavar="PATH", show_default=False, help="Another VAE to put in: folder, file or hub id."),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        "--prediction", metavar="NAME", autocompletion=opt.complete_from("epsilon", "v_prediction"), show_default=False,
        help="epsilon or v_prediction: where a single file becomes a folder and does not say so itself.",
    ),
]  # fmt: skip


def apply(
    loras: files.WeightedFiles,
    output: Out,
    model: Model = None,
    model_config: files.ModelConfig = None,
    vae: Vae = None,
    prediction: Prediction = None,
    dtype: files.Dtype = None,
    force: files.Force = False,
    offline: files.Offline = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read the LoRAs, write the model, say what changed."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    check("--prediction", prediction or "epsilon", ("epsilon", "v_prediction"))
    chosen = [files.choose(one, runs, weighted=True) for one in loras]
    wanted = files.dtype_of(dtype)
    named = files.model_of(model, model_config, next((one for one in chosen if one.run), None))
    if named.path is None:
        raise UsageError(
            "No model is named to put the LoRA into", hint="--model sdxl.safetensors, a folder or a hub id"
        )
    of_run = named.settings
    quiet_third_party()
    with progress(mode) as sink:
        sink.stage("apply", 1, 1)
        from craft_fast.lora.applying import apply_adapters
        from craft_fast.sdxl.source import DEFAULT_CONFIG
        from craft_fast.store.digest import sha256_once

        config = files.unet_config(named, offline=offline)
        parts = [(files.read(one.path, config, named), one.weight) for one in chosen]
        done = apply_adapters(
            named.path, parts, output, dtype=wanted, config=named.config or DEFAULT_CONFIG,
            vae=vae or (of_run.vae if of_run else None), offline=offline,
            prediction_type=prediction or (of_run.prediction_type if of_run else "auto"),
            zero_terminal_snr=of_run.zero_terminal_snr if of_run else "auto",
            merged=[{"lora": one.path.name, "sha256": sha256_once(one.path)} for one in chosen], force=force,
            progress=sink,
        )  # fmt: skip
    lines = [f"{done.path}: {done.changed} of {done.tensors} weights changed, {files.size_text(done.size)}"]
    data = {
        "output": str(done.path), "form": done.form, "changed": done.changed, "tensors": done.tensors,
        "size": done.size, "sha256": done.sha256, "model": named.path,
        "merged": [{"file": str(one.path), "strength": one.weight} for one in chosen],
    }  # fmt: skip
    print_result(mode, lines, data, event="result")
