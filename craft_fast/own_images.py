"""Own pictures as candidates: looked at all at once, fitted to buckets, encoded; ``own_folder`` lists them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.buckets import buckets, fit
from craft_fast.config import GenerateSettings, ImagesSettings
from craft_fast.errors import ConfigError, CraftError, IntegrityError
from craft_fast.own_folder import OwnFolder, Problem, require_sound
from craft_fast.own_groups import own_members
from craft_fast.picture_folders import find_pictures
from craft_fast.progress import Progress, Silent
from craft_fast.prompt_lines import excerpt
from craft_fast.records import Candidate, FileRef, Group, Variant
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json, sha256_once
from craft_fast.store.run import Run

if TYPE_CHECKING:
    import torch

    from craft_fast.sdxl.load import SdxlModel
    from craft_fast.sdxl.vae import Concessions

FOLDER = "candidates"
_BATCH = 8
# A picture of which the bucket cuts off more than this is said to a person.
_MOST_CUT = 0.25
_MEND = "mend them or take them out of the folder; PNG, JPEG and WebP of at most 64 megapixels are read"
_SMALL = "take out what is too small, raise images.max_enlargement, or draw smaller (generate.width_px, height_px)"

# Pillow names what it was given, which is no file here.
_ADDRESS = re.compile(r" <_io\.BytesIO[^>]*>")

Sizes = list[tuple[int, int]]


def bucket_sizes(settings: ImagesSettings, generate: GenerateSettings, multiple: int = 8) -> Sizes:
    """The buckets of a run: of the area that its model draws.

    Args:
        settings: step and aspect.
        generate: the size that is drawn.
        multiple: what the model's sides must be multiples of, see ``side_multiple``.

    Raises:
        ConfigError: the step is larger than what is drawn.
    """
    step, area = math.lcm(settings.bucket_step_px, multiple), generate.width_px * generate.height_px
    if step * step > area:
        raise ConfigError(
            "The buckets' step is larger than the pictures",
            where=f"images.bucket_step_px={settings.bucket_step_px}",
            why=f"sides are multiples of {step} px, pictures are {generate.width_px} x {generate.height_px} px",
            hint=f"--set images.bucket_step_px={multiple}",
        )
    return buckets(area, step, settings.max_aspect)


def side_multiple(unet: Mapping[str, Any], vae_scale_factor: int) -> int:
    """Sides of pictures that a UNet can halve at each of its levels: 32 px for SDXL (8 x 2 x 2).

    Args:
        unet: its configuration.
        vae_scale_factor: pixels of a latent pixel's side.
    """
    return vae_scale_factor << (len(unet["block_out_channels"]) - 1)


# ---- looked at


def check_pictures(
    folder: OwnFolder,
    settings: ImagesSettings,
    sizes: Sizes,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Decode every picture once and see that it fits a bucket; everything that is amiss is said at once.

    Args:
        folder: as ``read_folder`` gave it, with what it found amiss.
        settings: how much a picture may be enlarged.
        sizes: the buckets.
        progress: counts pictures.
        should_stop: asked between pictures; when true, the rest is not looked at.

    Returns:
        What a person should know.

    Raises:
        IntegrityError: among others there are files that are damaged or too large.
        ConfigError: captions, weights or sizes alone are amiss.
    """
    problems: list[Problem] = []
    cut: list[str] = []
    with (progress or Silent()).task("look at pictures", len(folder.pictures), "pictures") as task:
        for picture in folder.pictures:
            if should_stop():
                return []
            name = excerpt(picture.name, 100)
            try:
                height, width = _read(folder.root / picture.name).shape[-2:]
            except CraftError as error:
                told = _ADDRESS.sub("", error.why)
                why = f"{error.what[0].lower()}{error.what[1:]} ({excerpt(told, 120)})"
                problems.append(Problem(name, why, _MEND, damaged=True))
                continue
            finally:
                task.advance()
            place = fit(width, height, sizes)
            if place.enlargement > settings.max_enlargement:
                why = (
                    f"{width} x {height} px would be enlarged {place.enlargement:.2f} times "
                    f"for its bucket of {place.width} x {place.height}"
                )
                problems.append(Problem(name, why, _SMALL))
            elif place.kept < 1 - _MOST_CUT:
                cut.append(f"{name} ({1 - place.kept:.0%} of {width} x {height})")
    require_sound(folder, problems)
    if not cut:
        return []
    more = f" and {len(cut) - 5} more" if len(cut) > 5 else ""
    return [f"{len(cut)} pictures lose a part at two sides; images.max_aspect: {', '.join(cut[:5])}{more}"]


def _read(path: Path) -> torch.Tensor:
    from craft_fast.store.safe_load import read_image

    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise IntegrityError("A picture cannot be read", where=str(path), why=str(error.strerror)) from error
    if empty:
        raise IntegrityError("A picture is damaged or of a kind that is not read", where=str(path), why="it is empty")
    return read_image(path)


# ---- candidates


def bring_in(
    run: Run,
    model: SdxlModel,
    root: Path,
    groups: Sequence[Group],
    sizes: Sizes,
    *,
    key: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    concessions: Concessions | None = None,
) -> None:
    """Fit, encode and record the own pictures of ``groups`` that the run does not have yet.

    The run keeps its own copy: the picture as its bucket has it, and the mode of the VAE's posterior, float32
    [4, h, w].

    Args:
        run: the open run.
        model: the SDXL.
        root: folder of the pictures.
        groups: as ``own_groups`` made them.
        sizes: the buckets.
        key: the generate stage's key.
        progress: counts pictures.
        should_stop: asked between batches; when true, what is done by then is recorded.
        concessions: to memory and precision, of the whole run.

    Raises:
        IntegrityError: a picture is not what was listed; CraftError: the VAE overflowed.
    """
    progress = progress or Silent()
    done = {(row.prompt_id, row.member) for row in run.manifest.candidates(key)}
    wanted = [
        (group, variant)
        for group in groups
        for variant in group.variants
        if str(variant.member) in own_members(group) and (variant.prompt_id, variant.member) not in done
    ]
    if not wanted:
        return
    source = Source(root)
    with progress.task("own pictures", len(wanted), "pictures") as task:
        for start in range(0, len(wanted), _BATCH):
            if should_stop():
                break
            batch = wanted[start : start + _BATCH]
            images = [source.fitted(own_members(group)[str(variant.member)], sizes) for group, variant in batch]
            rows = _write(run, model, batch, images, key, concessions, progress)
            run.manifest.put_candidates(key, rows)
            task.advance(len(rows))
    model.rest()


class Source:
    """Pictures of a folder by what was listed of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_content: dict[str, Path] | None = None

    def fitted(self, own: Mapping[str, Any], sizes: Sizes) -> torch.Tensor:
        """The picture as its bucket has it, uint8 [3, H, W]: cut at its centre, scaled by Lanczos.

        Args:
            own: its ``file`` and ``sha256``.
            sizes: the buckets.

        Raises:
            IntegrityError: it is not there any more, or has other content.
        """
        import numpy as np
        import torch
        from PIL import Image

        path = self._path(own)
        pixels = _read(path)
        self._require(path, own)  # once more: it may have been written to while it was read
        height, width = pixels.shape[-2:]
        place = fit(width, height, sizes)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        scaled = image.resize((place.width, place.height), Image.Resampling.LANCZOS, box=place.box_in(width, height))
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()

    def _path(self, own: Mapping[str, Any]) -> Path:
        """Where the picture is now: under its name, or under another one with the same content."""
        path = self.root / str(own["file"])
        if not path.exists():
            if self._by_content is None:
                self._by_content = {sha256_once(one.path): one.path for one in find_pictures([self.root]).pictures}
            path = self._by_content.get(own["sha256"], path)
        self._require(path, own)
        return path

    def _require(self, path: Path, own: Mapping[str, Any]) -> None:
        try:
            found = sha256_once(path)
        except OSError as error:
            raise IntegrityError(
                "A picture that was listed is not there any more", where=str(path), why=str(error.strerror),
                hint="put it back, or craft-fast run again: it goes by what the folder holds then",
            ) from error  # fmt: skip
        if found != own["sha256"]:
            raise IntegrityError(
                "A picture changed after it was listed", where=str(path),
                hint="the same command again takes the new one",
            )  # fmt: skip


def _write(
    run: Run, model: SdxlModel, batch: Sequence[tuple[Group, Variant]], images: Sequence[torch.Tensor], key: str,
    concessions: Concessions | None, progress: Progress,
) -> list[Candidate]:  # fmt: skip
    from craft_fast.sdxl.vae import encode_images, png_bytes

    rows = []
    with atomic.batch(run.path(FOLDER)) as files:
        for (group, variant), image in zip(batch, images, strict=True):
            # One at a time: what a picture becomes must not depend on what is beside it.
            latents = encode_images(model, image[None], concessions=concessions, warn=progress.warn)[0].cpu()
            own = own_members(group)[str(variant.member)]
            name = digest_json([key, variant.prompt_id, variant.member, variant.text, own["sha256"]])[:20]
            latents_ref = FileRef(
                f"{FOLDER}/{name}.safetensors",
                *files.write_safetensors(f"{name}.safetensors", {str(variant.member): latents}),
            )
            image_ref = FileRef(f"{FOLDER}/{name}.png", *files.write_bytes(f"{name}.png", png_bytes(image)))
            rows.append(
                Candidate(
                    name, variant.prompt_id, variant.member, group.prompt.text, variant.text, 0, latents_ref, image_ref
                )
            )
    return rows
