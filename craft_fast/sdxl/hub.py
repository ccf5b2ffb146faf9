"""Model names of a hub to local folders: what is here already is used, the network is asked only for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.quiet import quiet_third_party
from craft_fast.sdxl.identify import PARTS, TOKENIZERS, WEIGHTED
from craft_fast.sdxl.weights import weight_files

quiet_third_party()

Missing = Callable[[Path], str]


def fetch(
    hub_id: str,
    *,
    setting: str,
    patterns: Sequence[str],
    missing: Missing,
    offline: bool,
    leave_out: Sequence[str] = (),
) -> Path:
    """The local folder of a hub's model, fetched into the hub's cache where it is not whole there.

    A copy that is whole is used as it is, without asking whether the hub has a newer one: a run that goes on must
    find the model that it began with. ``hf download`` renews it.

    Args:
        hub_id: ``owner/name``.
        setting: the setting that names it, told in errors.
        patterns: of the files that are needed.
        missing: what a folder lacks, in words; empty when it is whole.
        leave_out: patterns of files that are not.
        offline: ask no network; the environment's ``HF_HUB_OFFLINE=1`` means the same.

    Raises:
        EnvironmentProblem: not here, and not to be had.
    """
    from huggingface_hub import constants, snapshot_download

    lacks = "not in the hub's cache"
    # Whatever keeps the cached copy from being found, the network is the next place to look.
    with contextlib.suppress(Exception):
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        lacks = missing(folder)
        if not lacks:
            return folder
    command = f"hf download {hub_id} " + " ".join(
        [f"--include {pattern!r}" for pattern in patterns] + [f"--exclude {pattern!r}" for pattern in leave_out]
    )
    if offline or constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem(
            "The model is not on this machine, and the network may not be asked",
            where=f"{setting}={hub_id}",
            why=f"{lacks} ({constants.HF_HUB_CACHE}), and neither a folder nor a file; the hub is not asked because "
            + ("model.offline is set" if offline else "HF_HUB_OFFLINE is set"),
            hint=f"where there is a network: {command}; or set {setting} to a local folder",
        )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=list(leave_out)))
    except Exception as error:
        raise EnvironmentProblem(
            "The model is neither a folder nor to be had from the hub",
            where=f"{setting}={hub_id}",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            hint=f"check the name and the network ({command}), or set {setting} to a local folder",
        ) from error


# ---- what is fetched: whole models, a file's tokenizers, a VAE


def fetch_model(hub_id: str, offline: bool) -> Path:
    """A whole model in diffusers' layout; errors as ``fetch``."""
    # Of files in folders alone: beside them lies the whole model once more, as one file.
    patterns = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]

    def get(*leave_out: str) -> Path:
        return fetch(
            hub_id, setting="model.path", patterns=patterns, missing=_lacks_model, offline=offline, leave_out=leave_out
        )

    # vae_1_0 is SDXL base's older VAE.
    folder = get("vae_1_0/*", "*non_ema*", "*.fp16.*", "*.fp16-*")
    # Some pages hold half-precision copies alone.
    return get("vae_1_0/*", "*non_ema*") if _lacks_model(folder) else folder


def fetch_texts(hub_id: str, file: Path, offline: bool) -> Path:
    """Tokenizers and configurations for a single file, no weights; errors as ``fetch``."""
    try:
        return fetch(hub_id, setting="model.config", patterns=("*.json", "*.txt"), missing=lacks_texts, offline=offline)
    except EnvironmentProblem as error:
        error.hint = f"{texts_hint()}; {error.hint}"
        error.why += f"; {file.name} holds no tokenizers"
        raise


def fetch_vae(hub_id: str, offline: bool) -> Path:
    """A VAE; errors as ``fetch``."""
    patterns = ["config.json", "diffusion_pytorch_model.safetensors", "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    return fetch(hub_id, setting="model.vae", patterns=patterns, missing=_lacks_vae, offline=offline)


def texts_hint() -> str:
    """Which files to put where for a single file's tokenizers."""
    files = "vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json"
    return (
        f"put {files} of SDXL base's folders tokenizer and tokenizer_2 into FOLDER/tokenizer and FOLDER/tokenizer_2 "
        "and --set model.config=FOLDER; any SDXL in diffusers' layout is such a folder"
    )


def lacks_texts(folder: Path) -> str:
    """What a folder lacks of both tokenizers, in words; empty when they are whole."""
    for name in TOKENIZERS:
        here = folder / name
        whole = (here / "vocab.json").is_file() and (here / "merges.txt").is_file()
        if not whole and not (here / "tokenizer.json").is_file():
            return f"{here} lacks vocab.json and merges.txt, or tokenizer.json"
    return ""


def _lacks_model(folder: Path) -> str:
    lacking = [part for part in PARTS if not (folder / part).is_dir()]
    if lacking:
        return f"{folder} lacks {', '.join(lacking)}"
    for part in WEIGHTED:
        if not (folder / part / "config.json").is_file():
            return f"{folder / part} lacks config.json"
        if lacks := _lacks_weights(folder / part):
            return lacks
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return f"{folder} lacks scheduler/scheduler_config.json"
    return lacks_texts(folder)


def _lacks_vae(folder: Path) -> str:
    here = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (here / "config.json").is_file():
        return f"{here} lacks config.json"
    return _lacks_weights(here)


def _lacks_weights(folder: Path) -> str:
    try:
        weight_files(folder)
    except (EnvironmentProblem, IntegrityError) as error:
        return f"{folder}: {error.what.lower()}"
    return ""
