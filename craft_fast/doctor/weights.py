"""Checks of the models that the settings name: are their files here, whole and of the right kind? None is loaded."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from craft_fast.config import REWARD_FAMILIES, RewardSettings
from craft_fast.doctor.found import GIB, Found, Patient, gib
from craft_fast.doctor.machine import nearest_folder
from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError

if TYPE_CHECKING:
    from craft_fast.rewards.catalog import Official
    from craft_fast.rewards.shelf import Shelved

# About what is fetched, by the setting that names it: SDXL in half precision, a VAE in float32, CLIP ViT-H/14 as a
# family's hub id. Of published reward models the sizes are known.
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
    """One reward: a published model's files, a family's folder, a function's module, or a plug-in's package."""
    from craft_fast.rewards.function import find_function
    from craft_fast.rewards.loaders import is_published

    if spec.kind == "function":
        find_function(spec.path)
        return Found("ok", spec.path)
    if is_published(spec):
        return _published(patient, name, spec)
    if spec.kind in REWARD_FAMILIES:
        return _family(patient, name, spec)
    from craft_fast.rewards.plugin import find_plugin

    point = find_plugin(spec.kind)
    package = f"{point.dist.name} {point.dist.version}, " if point.dist else ""
    return Found("ok", f"{package}{point.value}")


def _family(patient: Patient, name: str, spec: RewardSettings) -> Found:
    """A folder: weights, preprocessing, tokenizer."""
    from craft_fast.rewards import loaders
    from craft_fast.rewards.base import read_preprocessing

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


def _published(patient: Patient, name: str, spec: RewardSettings) -> Found:
    """A published model: its files whole and the published ones, and its authors' package where that is to score."""
    from craft_fast.rewards import shelf
    from craft_fast.rewards.catalog import get
    from craft_fast.store.run import resolve_uri

    official = get(spec.kind)
    folder = resolve_uri(spec.path) if spec.path else None
    if folder is not None and not (isinstance(folder, Path) and folder.is_dir()):
        raise EnvironmentProblem(
            "A published reward model's path is not a folder",
            where=f"rewards.{name}.path: {spec.path}",
            hint=f"leave it out: --set rewards.{name}.path=",
        )
    by_package = _package(name, spec)
    have = shelf.find(official, folder=folder)
    for path, why in have.problems.items():
        raise IntegrityError(
            "A file is not what its name says",
            where=str(path),
            why=why,
            hint=f"rm {shlex.quote(str(path))} && craft-fast rewards fetch {official.name}",
        )
    _refuse_other_files(official, have)
    if have.missing:
        return _to_fetch(patient, official, have)
    places = ", ".join(sorted({str(path.parent) for path in have.found.values()}))
    size = sum(path.stat().st_size for path in have.paths)
    return Found("ok", f"{official.title}{by_package}, {places}, {_amount(size)}")


def _package(name: str, spec: RewardSettings) -> str:
    """What scores in the place of the toolkit's own network, ready to be put behind the model's name.

    Raises:
        EnvironmentProblem: its environment is not installed. ConfigError: there is no such package.
    """
    if spec.backend != "package":
        return ""
    from craft_fast.rewards.packages.client import package_of
    from craft_fast.rewards.packages.environments import need

    return f" by {need(package_of(name, spec.kind)).label}"


def _refuse_other_files(official: Official, have: Shelved) -> None:
    """Pinned files by their sha256: hashed once for all, about a second per GB, as a run does it.

    Raises:
        IntegrityError: a file is another one.
    """
    from craft_fast.store.digest import sha256_once

    for asset in official.assets:
        of_role = have.tokenizer if asset.role == "tokenizer" else [have.found.get(asset.role)]
        for path in of_role:
            if path is None or path.name != asset.name or asset.sha256 is None:
                continue
            digest = sha256_once(path)
            if digest not in (asset.sha256, *asset.also):
                raise IntegrityError(
                    "A file is not the published one",
                    where=str(path),
                    why=f"its sha256 is {digest[:12]}..., the published one {asset.sha256[:12]}...",
                    hint=f"rm {shlex.quote(str(path))} && craft-fast rewards fetch {official.name}",
                )


def _to_fetch(patient: Patient, official: Official, have: Shelved) -> Found:
    """Missing files: an error where no network may be asked, with the place of each."""
    from huggingface_hub import constants

    from craft_fast.rewards.shelf import where_to_put

    size = sum(asset.size for asset in have.missing)
    count = f"{len(have.missing)} file{'s' if len(have.missing) > 1 else ''}"
    fetch = f"craft-fast rewards fetch {official.name}"
    if patient.settings.model.offline or constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem(
            f"{count} of {official.title} are not on this machine, and no network may be asked",
            where=f"kind: {official.name}",
            why="; ".join(where_to_put(asset) for asset in have.missing),
            hint=f"put them there, or where there is a network: {fetch}",
        )
    patient.to_shelve |= {asset.key: asset.size for asset in have.missing}
    return Found(
        "warn", f"{official.title}: {count}, {_amount(size)}, not on this machine; a run fetches them first", fetch
    )


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


def reward_shelf(patient: Patient) -> Found | None:
    """Room for published reward models that are still to be fetched."""
    if not patient.to_shelve:
        return None
    from craft_fast.rewards.shelf import shelf

    place = shelf()
    free, need = shutil.disk_usage(nearest_folder(place)).free, sum(patient.to_shelve.values())
    here = f"{gib(free)} free at {place}; {gib(need)} are to be fetched"
    if free < need:
        return Found("warn", here, "export CRAFT_FAST_REWARDS=DIR, on a disk with more room")
    return Found("ok", here)


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
    return _amount(sum(file.stat().st_size for file in files))


def _amount(count: int) -> str:
    return gib(count) if count > GIB / 10 else f"{count / 1024**2:.1f} MiB"
