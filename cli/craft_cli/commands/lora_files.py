"""What the commands of ``craft-fast lora`` share: which file is meant, which model's names it has, what is written."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from craft_cli import options as opt
from craft_cli.request import CONFIG_NAME, check
from craft_fast.errors import EnvironmentProblem, IntegrityError, UsageError

if TYPE_CHECKING:
    import torch

    from craft_fast.lora.adapter import Adapter

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("kohya", "diffusers")
_WEIGHTED = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE", autocompletion=opt.complete_runs, show_default=False,
        help="A LoRA's .safetensors file, or the name of a run.",
    ),
]  # fmt: skip
WeightedFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE[:WEIGHT]...", autocompletion=opt.complete_runs, show_default=False,
        help="LoRAs with their weights, 1 where none is given: a.safetensors:0.7, or the name of a run.",
    ),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="PATH", show_default=False,
        help="The model that the LoRA is for, where it is not of SDXL's size. Default: the run's, else SDXL.",
    ),
]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="The file to write. Default: beside FILE.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=opt.complete_from(*DTYPES),
        help=f"Of the weights: {', '.join(DTYPES)}. Default: as they are.",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask no network.")]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        "--model-config", metavar="DIR", show_default=False,
        help="Of a model in one file: folder or hub id with its tokenizers and, where they are not SDXL's, its "
        "configurations. Default: the run's, else SDXL base.",
    ),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """A LoRA of the command line.

    Attributes:
        path: its file.
        weight: as typed after the colon, else 1.
        run: the folder of the run that it is in, or None.
    """

    path: Path
    weight: float
    run: Path | None


def choose(given: str, runs: Path, *, weighted: bool = False) -> Chosen:
    """The file that is meant by a path or by a run's name.

    Args:
        given: as typed; with a weight after its last colon where ``weighted``. A file of that very name comes first.
        runs: the folder of the runs.
        weighted: whether a weight is looked for.

    Raises:
        EnvironmentProblem: there is none; names the closest one. UsageError: a run with several.
    """
    found = _WEIGHTED.fullmatch(given) if weighted else None
    if found is None or Path(given).expanduser().is_file():
        return _find(given, 1.0, runs)
    return _find(found[1], float(found[2]), runs)


def _find(given: str, weight: float, runs: Path) -> Chosen:
    path = Path(given).expanduser()
    if path.is_file():
        run = path.absolute().parent.parent
        return Chosen(path, weight, run if (run / "manifest.sqlite").is_file() else None)
    run = runs / given
    if "/" not in given and (run / "manifest.sqlite").is_file():
        return Chosen(_of_run(run), weight, run)
    names = opt.run_names(runs)
    beside = sorted(path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
    words = {
        **{one.stem: str(one) for one in beside},
        **{str(one): str(one) for one in beside},
        **{n: n for n in names},
    }
    close = [words[word] for word in difflib.get_close_matches(given, words, n=1)]
    there = f"the runs are: {', '.join(names[:10])}" if names else "give a LoRA's .safetensors file"
    if path.is_dir():
        there = "this is a folder: give a file in it"
    raise EnvironmentProblem(
        "There is no such LoRA, nor such a run",
        where=given,
        why=f"looked in {Path.cwd()} and {runs}",
        hint=f"did you mean {close[0]}?" if close else there,
    )


def _of_run(run: Path) -> Path:
    """The LoRA that a run exported; of a pair in both formats the one that all programs load."""
    files = sorted((run / "lora").glob("*.safetensors"))
    plain = [file for file in files if not file.stem.endswith("-diffusers")] or files
    if not plain:
        raise EnvironmentProblem(
            "The run has no LoRA yet", where=str(run / "lora"), hint=f"craft-fast run --name {run.name}"
        )
    if len(plain) > 1 and (run / CONFIG_NAME).is_file():
        from craft_fast.settings_io import load_settings

        # What was made of it since (resized, converted) lies beside it.
        exported = run / "lora" / f"{load_settings(config=run / CONFIG_NAME).export.name}.safetensors"
        plain = [exported] if exported in plain else plain
    if len(plain) > 1:
        names = ", ".join(file.name for file in plain)
        raise UsageError("The run has several LoRAs", where=str(run / "lora"), why=names, hint="give one file's path")
    return plain[0]


# ---- the model whose names the layers have


@dataclass(frozen=True, slots=True)
class Named:
    """The model that a LoRA is for.

    Attributes:
        path: folder, file or hub id; None: SDXL by its published configuration.
        config: of a single file; see ``open_source``.
        settings: of the run that it comes from, or None.
    """

    path: str | None
    config: str | None = None
    settings: Any = None


def model_of(model: str | None, config: str | None, chosen: Chosen | None) -> Named:
    """As typed, else that of the run which the LoRA is in, else none."""
    settings = None
    if model is None and chosen is not None and chosen.run is not None:
        saved = chosen.run / "config.yaml"
        if saved.is_file():
            from craft_fast.settings_io import load_settings

            settings = load_settings(config=saved).model
            model, config = settings.path, config or settings.config
    return Named(model, config, settings)


def unet_config(named: Named, *, offline: bool) -> Mapping[str, Any] | None:
    """The UNet's configuration, which names of blocks follow from; None: SDXL's."""
    if named.path is None:
        return None
    from craft_fast.lora.applying import open_model
    from craft_fast.sdxl.source import DEFAULT_CONFIG

    source = open_model(named.path, config=named.config or DEFAULT_CONFIG, offline=offline)
    return source.main.config("unet")


def misfits(adapter: Adapter, named: Named, *, offline: bool) -> list[str]:
    """What of a LoRA is not the model's, a line for each layer; nothing where no model is named."""
    if named.path is None:
        return []
    from craft_fast.lora import applying
    from craft_fast.lora.layouts import adapted_shapes
    from craft_fast.sdxl.source import DEFAULT_CONFIG

    source = applying.open_model(named.path, config=named.config or DEFAULT_CONFIG, offline=offline)
    return applying.misfits(adapter, adapted_shapes(source))


# ---- what is written


def output_path(output: Path | None, source: Path, ending: str, *, force: bool) -> Path:
    """Where a LoRA is written: as typed, else ``NAME-ending.safetensors`` beside its source.

    Raises:
        UsageError: it is there already, or does not end in ``.safetensors``.
    """
    path = (output or source.with_name(f"{source.stem}-{ending}.safetensors")).expanduser()
    if path.suffix != ".safetensors":
        raise UsageError("A LoRA's file ends in .safetensors", where=str(path))
    if path.is_dir():
        raise UsageError("This is a folder, not a file", where=str(path), hint="-o a name that is free")
    if path.exists() and not force:
        raise UsageError(
            "There is such a file already", where=str(path), hint="--force replaces it, or -o another name"
        )
    return path


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of a name.

    Raises:
        UsageError: another name.
    """
    if name is None:
        return None
    check("--dtype", name, DTYPES)
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def in_dtype(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """An adapter whose weights are rounded to ``dtype``; as it is without one.

    Raises:
        IntegrityError: a value leaves the dtype's range.
    """
    if dtype is None:
        return adapter
    from craft_fast.lora.resizing import in_dtype as rounded

    return rounded(adapter, dtype)


def size_text(size: int) -> str:
    """``24.3 MiB``."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size:,} bytes"


def ranks_text(ranks: Mapping[int, int]) -> str:
    """``rank 8``, or ``ranks 8 (700 layers), 4 (22)``."""
    if len(ranks) == 1:
        return f"rank {next(iter(ranks))}"
    (first, many), *more = ranks.items()
    others = "".join(f", {rank} ({n})" for rank, n in more[:4])
    rest = f" and {len(more) - 4} more" if len(more) > 4 else ""
    return f"ranks {first} ({many} layers){others}{rest}"


def counted_ranks(adapter: Adapter) -> dict[int, int]:
    """Rank to number of layers, commonest first."""
    return dict(Counter(layer.rank for layer in adapter.layers.values()).most_common())


def read(path: Path, config: Mapping[str, Any] | None, named: Named) -> Adapter:
    """A LoRA's content.

    Raises:
        IntegrityError: hostile, damaged, no LoRA, or not for this model; says what it is instead.
    """
    from craft_fast.lora.describing import read_lora

    try:
        return read_lora(path, config)
    except IntegrityError as error:
        # A LoRA of a small model, read by SDXL's names.
        if named.path is None and "an SDXL can load" in error.what:
            error.hint += "; for a model that is not of SDXL's size: --model PATH"
        raise
