"""Checks of the models that the settings name: are their files here, whole and of the right kind? None is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from craft_fast.config import RewardSettings
from craft_fast.doctor.found import GIB, Found, Patient, gib
from craft_fast.doctor.machine import nearest_folder
from craft_fast.errors import CraftError, EnvironmentProblem

# About what is fetched, by the setting that names it: SDXL in half precision, a VAE in float32, CLIP ViT-H/14.
_FETCHED_GIB = {"model.path": 6.5, "model.config": 0.01, "model.vae": 0.3, "expand.model": 4.0, "rewards": 4.0}


def model(patient: Patient) -> Found:
    """The SDXL: found, of the right kind, headers whole, and what it predicts is known."""
    from craft_fast.sdxl.source import WEIGHTED, FolderPart, open_source
    from craft_fast.sdxl.weights import weight_files

    wanted = patient.settings.model
    try:
        source = open_source(wanted.path, config=wanted.config, vae=wanted.vae, offline=True)
    except EnvironmentProblem as error:
        return _absent(patient, error)
    source.check()
    predicts = source.prediction(wanted.prediction_type, wanted.zero_terminal_snr).prediction_type
    files: set[Path] = set()
    for part in WEIGHTED:
        place = source.of(part)
        files |= set(weight_files(place.folder(part))) if isinstance(place, FolderPart) else {place.path}
    return Found("ok", f"{source.path}, {_size(files)}, predicts {predicts}")


def reward(patient: Patient, *, name: str, spec: RewardSettings) -> Found:
    """One reward's files: weights, preprocessing, tokenizer; a function's module is imported."""
    from craft_fast.rewards import loaders
    from craft_fast.rewards.base import read_preprocessing
    from craft_fast.rewards.function import find_function

    if spec.kind == "function":
        find_function(spec.path)
        return Found("ok", spec.path)
    try:
        folder = loaders.reward_folder(spec.path, offline=True, name=name)
        described = read_preprocessing(folder, spec.kind)
        if described.family != "aesthetic":
            loaders.tokenizer_folder(folder, described, offline=True)
    except EnvironmentProblem as error:
        error.hint = error.hint or f"put the reward's files there, or take it out: --set rewards.{name}=null"
        return _absent(patient, error)
    files = {folder / "model.safetensors"} | ({folder / "head.safetensors"} if spec.kind == "aesthetic" else set())
    return Found("ok", f"{folder}, {_size(files)}")


def expander(patient: Patient) -> Found | None:
    """The language model or the file that writes variants; nothing to look for where templates do."""
    wanted = patient.settings.expand
    if wanted.kind == "file":
        from craft_fast.store.run import resolve_uri

        return Found("ok", str(resolve_uri(wanted.file or "")))
    if wanted.kind == "openai":
        if not os.environ.get(wanted.api_key_env):
            local = any(host in wanted.base_url for host in ("localhost", "127.0.0.1", "[::1]"))
            told = f"{wanted.base_url}, {wanted.api_key_env} is not set"
            return Found("ok" if local else "warn", told, "" if local else f"export {wanted.api_key_env}=...")
        return Found("ok", f"{wanted.base_url} (not asked now)")
    if wanted.kind != "transformers":
        return None
    from craft_fast.expanders.transformers import local_folder

    try:
        folder = local_folder(wanted.model, offline=True)
    except EnvironmentProblem as error:
        return _absent(patient, error)
    return Found("ok", str(folder))


def hub_cache(patient: Patient) -> Found | None:
    """Room for what is still to be fetched from the hub."""
    if not patient.to_fetch:
        return None
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free, need = shutil.disk_usage(nearest_folder(cache)).free, sum(patient.to_fetch.values())
    here = f"{gib(free)} free at {cache}; about {need:.0f} GiB are to be fetched"
    if free < need * GIB:
        return Found("warn", here, "export HF_HUB_CACHE=DIR, on a disk with more room")
    return Found("ok", here)


def _absent(patient: Patient, error: CraftError) -> Found:
    """Files that are not here: an error, unless the run itself would fetch them."""
    # Only what a hub may have comes with the command that fetches it.
    if "hf download" not in error.hint:
        raise error
    from huggingface_hub import constants

    if patient.settings.model.offline or constants.HF_HUB_OFFLINE:
        raise error
    setting, _, hub_id = error.where.partition("=")
    patient.to_fetch[hub_id] = _FETCHED_GIB.get(setting, _FETCHED_GIB.get(setting.partition(".")[0], 0.01))
    return Found("warn", f"{hub_id} ({setting}) is not on this machine; a run fetches it first", error.hint)


def _size(files: set[Path]) -> str:
    """Size of safetensors files together; a header that promises more than the file holds is an error."""
    from craft_fast.sdxl.identify import read_header

    for file in sorted(files):
        read_header(file)
    count = sum(file.stat().st_size for file in files)
    return gib(count) if count > GIB / 10 else f"{count / 1024**2:.1f} MiB"
