"""Own pictures as candidates: checked all at once, fitted to buckets, encoded; ``own_folder`` lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from craft_fast.buckets import Fit, buckets, fit
from craft_fast.config import GenerateSettings, ImagesSettings
from craft_fast.errors import ConfigError, CraftError, IntegrityError
from craft_fast.own_folder import OwnFolder, listed
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


def check_pictures(
    folder: OwnFolder, settings: ImagesSettings, generate: GenerateSettings, progress: Progress | None = None
) -> None:
    """Decode every picture once and see that it fits a bucket; everything that is amiss is said at once.

    Raises:
        IntegrityError: pictures that are damaged or too large, by name.
        ConfigError: pictures that are too small for their bucket, by name.
    """
    sizes = bucket_sizes(settings, generate)
    broken, small = [], []
    with (progress or Silent()).task("look at pictures", len(folder.pictures), "pictures") as task:
        for picture in folder.pictures:
            name = excerpt(picture.name, 100)
            try:
                image = _read(folder.root / picture.name)
            except CraftError as error:
                broken.append(f"{name}: {error.what[0].lower()}{error.what[1:]} ({excerpt(error.why, 120)})")
                continue
            finally:
                task.advance()
            height, width = image.shape[-2:]
            place = fit(width, height, sizes)
            if place.enlargement > settings.max_enlargement:
                small.append(
                    f"{name}: {width} x {height} px would be enlarged {place.enlargement:.2f} times "
                    f"for its bucket of {place.width} x {place.height}"
                )
    if broken:
        also = f"; {len(small)} others are too small" if small else ""
        raise IntegrityError(
            f"{len(broken)} pictures cannot be used{also}", where=str(folder.root), why=listed(broken),
            hint="mend them or take them out of the folder; PNG, JPEG and WebP of at most 64 megapixels are read",
        )  # fmt: skip
    if small:
        raise ConfigError(
            f"{len(small)} pictures are too small", where=str(folder.root), why=listed(small),
            hint="take them out, or raise images.max_enlargement, or draw smaller (generate.width_px, height_px)",
        )  # fmt: skip


def bucket_sizes(settings: ImagesSettings, generate: GenerateSettings) -> list[tuple[int, int]]:
    """The buckets of a run: of the area that its model draws."""
    return buckets(generate.width_px * generate.height_px, settings.bucket_step_px, settings.max_aspect)


def _read(path: Path) -> torch.Tensor:
    from craft_fast.store.safe_load import read_image

    if path.stat().st_size == 0:
        raise IntegrityError("A picture is damaged or of a kind that is not read", where=str(path), why="it is empty")
    return read_image(path)


# ---- candidates


def bring_in(
    run: Run,
    model: SdxlModel,
    root: Path,
    groups: Sequence[Group],
    *,
    settings: ImagesSettings,
    generate: GenerateSettings,
    key: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    concessions: Concessions | None = None,
) -> None:
    """Fit, encode and record the own pictures of ``groups`` that the run does not have yet.

    The run keeps its own copy: the picture as its bucket has it, and the mode of the VAE's posterior, float32
    [4, h, w].

    Raises:
        IntegrityError: a picture is not what was listed; CraftError: the VAE overflowed.
    """
    progress = progress or Silent()
    done = {(row.prompt_id, row.member) for row in run.manifest.candidates(key)}
    wanted = [
        (group, variant)
        for group in groups
        for variant in group.variants
        if str(variant.member) in group.prompt.meta["own"] and (variant.prompt_id, variant.member) not in done
    ]
    if not wanted:
        return
    sizes = bucket_sizes(settings, generate)
    with progress.task("own pictures", len(wanted), "pictures") as task:
        for start in range(0, len(wanted), _BATCH):
            if should_stop():
                return
            batch = wanted[start : start + _BATCH]
            images = [_fitted(root, group, variant, sizes) for group, variant in batch]
            rows = _write(run, model, batch, images, key, concessions, progress)
            run.manifest.put_candidates(key, rows)
            task.advance(len(rows))
    model.rest()


def _fitted(root: Path, group: Group, variant: Variant, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """The picture as its bucket has it, uint8 [3, H, W]: scaled by Lanczos to cover it, cut at its centre."""
    import numpy as np
    import torch
    from PIL import Image

    own = group.prompt.meta["own"][str(variant.member)]
    path = root / own["file"]
    pixels = _read(path)
    if sha256_once(path) != own["sha256"]:
        raise IntegrityError(
            "A picture changed after it was listed", where=str(path), hint="the same command again takes the new one"
        )
    place: Fit = fit(pixels.shape[2], pixels.shape[1], sizes)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scaled = image.resize((place.scaled_width, place.scaled_height), Image.Resampling.LANCZOS).crop(place.box)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()


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
            own = group.prompt.meta["own"][str(variant.member)]
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
