"""Where an SDXL comes from: a diffusers folder, a hub id, or one file, with another VAE where one is wanted.

A source answers for every part its configuration, its weights' shapes, and the network itself; it holds no weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from craft_fast.errors import ConfigError, EnvironmentProblem
from craft_fast.quiet import import_bitsandbytes
from craft_fast.sdxl import published, single_file
from craft_fast.sdxl.hub import fetch_model, fetch_texts, fetch_vae, lacks_texts, texts_hint
from craft_fast.sdxl.identify import (
    TOKENIZERS,
    WEIGHTED,
    Header,
    kind_of,
    read_header,
    read_json,
    require_sdxl,
    require_sdxl_folder,
)
from craft_fast.sdxl.prediction import Prediction, of_file, of_folder
from craft_fast.sdxl.single_file import check_part, part_names, refuse_unknown
from craft_fast.sdxl.weights import expected_shapes, guarded, load_part, weight_files
from craft_fast.store.digest import digest_files, digest_folder, digest_json, sha256_file, sha256_once
from craft_fast.store.run import resolve_uri
from craft_fast.store.safe_load import check_header

__all__ = ["DEFAULT_CONFIG", "WEIGHTED", "FilePart", "FolderPart", "Part", "Source", "open_source", "stored_shapes"]

DEFAULT_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
_PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": published.UNET,
    "vae": published.VAE,
    "text_encoder": published.TEXT_ENCODER,
    "text_encoder_2": published.TEXT_ENCODER_2,
    "scheduler": published.SCHEDULER,
}
# Of a config.json, what says how it was saved and nothing about the network.
_SAVED_BY = {"architectures", "transformers_version", "torch_dtype", "dtype", "model_type"}


class Part(Protocol):
    """A place that one network's weights and configuration come from."""

    path: Path

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration, without entries on how it was saved."""

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name to shape of its weights, in diffusers' naming, from headers and configurations alone."""

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """The network itself; see ``weights.load_part``."""

    def part_digest(self, part: str) -> str:
        """Digest of its weights and configuration."""


class FolderPart:
    """Networks in folders of diffusers' layout: ``path/<part>``, or ``path`` itself for a VAE alone."""

    def __init__(self, path: Path, *, nested: bool = True) -> None:
        self.path = path
        self._nested = nested

    def folder(self, part: str) -> Path:
        """Where the part's own files are."""
        return self.path / part if self._nested else self.path

    def config(self, part: str) -> dict[str, Any]:  # noqa: D102 - as in Part
        return _network_config(self.folder(part) / "config.json")

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return stored_shapes(self.folder(part))

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: D102
        import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
        import diffusers
        import transformers

        classes = {
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
            "text_encoder_2": transformers.CLIPTextModelWithProjection,
        }
        return load_part(classes[part], self.folder(part), device, dtype)

    def part_digest(self, part: str) -> str:  # noqa: D102
        folder = self.folder(part)
        if part not in WEIGHTED:
            return digest_folder(folder)
        found = folder.rglob("*") if self._nested else folder.glob("*.json")
        texts = [file for file in found if file.suffix in (".json", ".txt") and file.is_file()]
        return digest_files(folder, sorted([*texts, *weight_files(folder)]))


class FilePart:
    """Networks in one safetensors file; configurations from ``configs`` where it has them, else those published."""

    def __init__(self, header: Header, configs: Path | None) -> None:
        self.header = header
        self.path = header.path
        self.configs = configs

    def config(self, part: str) -> dict[str, Any]:  # noqa: D102
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.configs / part / name if self.configs is not None else None
        if file is not None and file.is_file():
            return read_json(file) if part == "scheduler" else _network_config(file)
        return dict(_PUBLISHED[part])

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return expected_shapes(part, self.config(part))

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: D102
        return single_file.load_part(self.header, part, self.config(part), device, dtype)

    def part_digest(self, part: str) -> str:  # noqa: D102
        return digest_json([sha256_once(self.path), self.config(part)])


@dataclass(frozen=True)
class Source:
    """A whole SDXL.

    Attributes:
        main: where all parts come from, but the VAE where ``vae`` is set.
        texts: folder of the tokenizers.
        vae: another VAE, or None.
    """

    main: FolderPart | FilePart
    texts: Path
    vae: Part | None = None

    @property
    def path(self) -> Path:
        """The model's folder or file."""
        return self.main.path

    def of(self, part: str) -> Part:
        """Where one part comes from."""
        return self.vae if part == "vae" and self.vae is not None else self.main

    def config(self, part: str) -> Any:
        """A network's configuration with all defaults filled in, as its ``config`` will be; also by attribute."""
        import_bitsandbytes()
        import diffusers
        from diffusers.configuration_utils import FrozenDict

        cls = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return FrozenDict({**defaults, **self.of(part).config(part)})

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """One network on ``device``."""
        return self.of(part).load(part, device, dtype)

    def tokenizer(self, name: str) -> Any:
        """``tokenizer`` or ``tokenizer_2``."""
        import transformers

        folder = self.texts / name
        return guarded(folder, lambda: transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True))

    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule; of a single file, without what only the file itself can say."""
        if isinstance(self.main, FolderPart):
            return read_json(self.path / "scheduler" / "scheduler_config.json")
        config = self.main.config("scheduler")
        return {key: config[key] for key in config if key not in ("prediction_type", "rescale_betas_zero_snr")}

    def prediction(self, prediction_type: str, zero_terminal_snr: str) -> Prediction:
        """What the UNet predicts; see ``prediction``."""
        if isinstance(self.main, FilePart):
            return of_file(self.main.header, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
        return of_folder(
            self.scheduler_config(), self.path / "scheduler", prediction_type=prediction_type,
            zero_terminal_snr=zero_terminal_snr,
        )  # fmt: skip

    def force_zeros(self) -> bool:
        """Whether the empty prompt is all zeros."""
        index = self.texts / "model_index.json"
        return bool(read_json(index).get("force_zeros_for_empty_prompt", True)) if index.is_file() else True

    def digest(self) -> str:
        """Digest of everything that is used: weights, configurations, tokenizers, noise schedule."""
        parts: dict[str, Any] = {name: digest_folder(self.texts / name) for name in TOKENIZERS}
        parts |= {part: self.of(part).part_digest(part) for part in WEIGHTED}
        if isinstance(self.main, FilePart):
            return digest_json({**parts, "scheduler": self.scheduler_config(), "force_zeros": self.force_zeros()})
        index = self.path / "model_index.json"
        parts |= {"scheduler": self.main.part_digest("scheduler")}
        return digest_json({**parts, "model_index": sha256_file(index) if index.is_file() else None})

    def check(self) -> None:
        """Compare every network of a file with its configuration, before anything is loaded.

        Raises:
            IntegrityError: a weight is missing, too many, or of another shape.
        """
        for part in WEIGHTED:
            place = self.of(part)
            if isinstance(place, FilePart):
                check_part(place.header, part, place.config(part))


def open_source(
    path: Path | str, *, config: str = DEFAULT_CONFIG, vae: Path | str | None = None, offline: bool = False
) -> Source:
    """Find a model and tell whether it is an SDXL; nothing is loaded.

    Args:
        path: diffusers folder, ``package:NAME/FOLDER``, hub id, or one safetensors file.
        config: of a file: folder or hub id with its tokenizers and, where they are not SDXL's, its configurations.
        vae: another VAE: folder, hub id or file.
        offline: ask no network.

    Raises:
        EnvironmentProblem: missing, or not an SDXL; IntegrityError: pickled or damaged files; ConfigError: a VAE of
            another kind of model.
    """
    place = resolve_uri(str(path))
    if isinstance(place, Path) and place.is_file():
        source = _open_file(place, config, other_vae=vae is not None, offline=offline)
    else:
        source = _open_folder(place if isinstance(place, Path) else fetch_model(place, offline))
    if vae is None:
        return source
    return Source(source.main, source.texts, _open_vae(vae, source, offline=offline))


def _open_folder(folder: Path) -> Source:
    require_sdxl_folder(folder)
    for part in WEIGHTED:
        for file in weight_files(folder / part):
            check_header(file)
    return Source(FolderPart(folder), folder)


def _open_file(path: Path, config: str, *, other_vae: bool, offline: bool) -> Source:
    header = read_header(path)
    require_sdxl(header)
    refuse_unknown(header)
    if not other_vae and not header.has(single_file.PREFIXES["vae"]):
        raise EnvironmentProblem(
            "The file holds no VAE",
            where=str(path),
            why="no tensor named first_stage_model.*",
            hint="--set model.vae=madebyollin/sdxl-vae-fp16-fix, or a VAE's folder or file",
        )
    place = resolve_uri(config)
    folder = place if isinstance(place, Path) else fetch_texts(place, path, offline)
    lacks = lacks_texts(folder)
    if lacks:
        raise EnvironmentProblem(
            "A single file needs its tokenizers beside it",
            where=f"model.config={config}",
            why=lacks,
            hint=texts_hint(),
        )
    return Source(FilePart(header, folder), folder)


def _open_vae(vae: Path | str, source: Source, *, offline: bool) -> Part:
    place = resolve_uri(str(vae))
    if isinstance(place, Path) and place.is_file():
        header = read_header(place)
        kind, _ = kind_of(header)
        if kind not in ("a VAE alone", "SDXL") or not part_names(header, "vae"):
            raise EnvironmentProblem("Not a VAE", where=f"model.vae={vae}", why=f"this is {kind}", hint=_VAE_HINT)
        # A VAE of Stable Diffusion 1 has the very shapes of SDXL's; only its maker's word tells them apart.
        word = header.metadata.get("modelspec.architecture", "").lower()
        if word.startswith(("stable-diffusion-v1", "stable-diffusion-v2", "stable-diffusion-v3")):
            raise ConfigError(
                "A VAE of another model", where=f"model.vae={vae}", why=f"made for {word}", hint=_VAE_HINT
            )
        return FilePart(header, _vae_configs(source))
    folder = place if isinstance(place, Path) else fetch_vae(place, offline)
    part = FolderPart(folder, nested=(folder / "vae").is_dir())
    for file in weight_files(part.folder("vae")):
        check_header(file)
    _require_same_latents(part.config("vae"), source.main, vae)
    return part


def _vae_configs(source: Source) -> Path | None:
    return source.path if isinstance(source.main, FolderPart) else source.main.configs


_VAE_HINT = "use a VAE made for SDXL, such as madebyollin/sdxl-vae-fp16-fix"


def _require_same_latents(config: Mapping[str, Any], main: Part, vae: Path | str) -> None:
    """A UNet reads the latents of the VAE it was trained with; another scale makes grey or burnt pictures."""
    own = main.config("vae")
    defaults: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}
    for name, default in defaults.items():
        found, wanted = config.get(name, default), own.get(name, default)
        if found != wanted:
            raise ConfigError(
                "A VAE of another model", where=f"model.vae={vae}", why=f"its {name} is {found}, the model's {wanted}",
                hint=_VAE_HINT,
            )  # fmt: skip


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of the weights in a part's folder, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        shapes.update(read_header(path).shapes)
    return shapes


def _network_config(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(path).items() if not key.startswith("_") and key not in _SAVED_BY}
