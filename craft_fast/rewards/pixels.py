"""Pictures to a reward network's pixels, bit for bit as the published implementations make them.

Shapes: B batch, H, W picture, S the network's image side in pixels.

crop and stretch are bytes into bytes: PIL's bicubic, which rounds between its two passes. On a CPU Pillow itself does
it; elsewhere ``resample`` does the same integers in tensors. pad is floats into floats, as HPSv2's transform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError, CraftError
from craft_fast.rewards.base import CLIP_MEAN, CLIP_STD, REWARD_FILE, Preprocessing
from craft_fast.rewards.resample import TALL_FIRST, resample

_WORKING_BYTES = 256 * 1024 * 1024
_BYTES_PER_RESULT = 12  # of the first pass, for every number it makes: the int32 sum, a tap and its product
# Pillow resizes the whole picture before the crop; a strip of 1 x 64,000,000 pixels would become 224 x 14 billion.
_WHOLE_RESIZE_LIMIT = 8
# torch's antialiased bicubic on CUDA keeps windows in 48 KiB of shared memory, which making 75 times smaller fills.
_SHRINK_LIMIT = 32


@dataclass(frozen=True, slots=True)
class PixelForm:
    """What of a ``Preprocessing`` decides the pixels before they are normalised; equal forms share pixels.

    Attributes:
        size: S.
        fit: none, crop, stretch or pad.
        antialias: of pad.
        rounding: of crop: floor or round.
    """

    size: int
    fit: str
    antialias: bool = True
    rounding: str = "floor"

    @property
    def id(self) -> str:
        """Name for a score's provenance, such as ``pil-bicubic/crop-floor/224``; pil13 where Pillow's passes differ."""
        if self.fit == "none":
            return f"none/{self.size}"
        if self.fit == "pad":
            return f"tensor-bicubic{'-antialias' if self.antialias else ''}/pad/{self.size}"
        how = f"{self.fit}-{self.rounding}" if self.fit == "crop" else self.fit
        return f"{'pil13' if TALL_FIRST else 'pil'}-bicubic/{how}/{self.size}"


def pixel_form(spec: Preprocessing) -> PixelForm:
    """The form of a spec's pixels; settings that do not matter for its fit are left out."""
    if spec.resize == "none":
        return PixelForm(spec.image_size, "none")
    if spec.fit == "pad":
        return PixelForm(spec.image_size, "pad", antialias=spec.antialias)
    return PixelForm(spec.image_size, spec.fit, rounding=spec.crop_rounding if spec.fit == "crop" else "floor")


def preprocessing_id(spec: Preprocessing) -> str:
    """``PixelForm.id``, and a digest of mean and std where they are not CLIP's; for ``Provenance.preprocessing``."""
    name = pixel_form(spec).id
    if (spec.mean, spec.std) == (CLIP_MEAN, CLIP_STD):
        return name
    return f"{name}/norm-{hashlib.sha256(repr((spec.mean, spec.std)).encode()).hexdigest()[:8]}"


def prepare(images: Tensor, spec: Preprocessing) -> Tensor:
    """Pictures to a network's pixels: resized, cropped or padded, normalised.

    Args:
        images: uint8 [B, 3, H, W].
        spec: how.

    Returns:
        float32 [B, 3, S, S] on the pictures' device.

    Raises:
        ConfigError: ``resize`` is none and the pictures are not S x S.
    """
    return normalise(shape(images, pixel_form(spec)), spec)


def normalise(pixels: Tensor, spec: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(x - mean) / std`` of each channel, worked out in float32.

    Args:
        pixels: [B, 3, S, S], uint8 in 0..255 or float32 in 0..1, as ``shape`` makes them.
        spec: mean and std.
        dtype: of the result.

    Returns:
        [B, 3, S, S] on the pixels' device.
    """
    values = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels
    mean = torch.tensor(spec.mean, device=pixels.device).reshape(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).reshape(1, 3, 1, 1)
    return ((values - mean) / std).to(dtype)


def shape(images: Tensor, form: PixelForm) -> Tensor:
    """Pictures to S x S, not yet normalised.

    Args:
        images: uint8 [B, 3, H, W].
        form: how.

    Returns:
        [B, 3, S, S] on the pictures' device: uint8; float32 about 0..1 for pad.

    Raises:
        ConfigError: the form is none and the pictures are not S x S.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise CraftError(
            "Pictures must be bytes in RGB.",
            where="rewards",
            why=f"found {images.dtype} {list(images.shape)}, wanted uint8 [B, 3, H, W]",
        )
    height, width = images.shape[2:]
    size = form.size
    if form.fit == "pad":
        return _pad(images, form)
    if (height, width) == (size, size):
        return images
    if form.fit == "none":
        raise ConfigError(
            "A reward takes pictures of one size only.",
            where=REWARD_FILE,
            why=f"pictures of {width}x{height} px, the reward takes {size}x{size} and its resize is none",
            hint=f"set generate.width_px and generate.height_px to {size}, or resize to bicubic",
        )
    whole, corner = _geometry(height, width, form)
    if images.device.type == "cpu" and max(whole) <= _WHOLE_RESIZE_LIMIT * size:
        return _with_pillow(images, whole, corner, size)
    return shape_in_tensors(images, form)


def shape_in_tensors(images: Tensor, form: PixelForm) -> Tensor:
    """``shape`` of crop and stretch without Pillow, on any device, in at most about 256 MiB beside its result.

    Args:
        images: uint8 [B, 3, H, W].
        form: crop or stretch.

    Returns:
        uint8 [B, 3, S, S] on the pictures' device.
    """
    height, width = images.shape[2:]
    whole, corner = _geometry(height, width, form)
    each = 3 * max(height, form.size) * form.size * _BYTES_PER_RESULT
    chunks = images.split(max(1, _WORKING_BYTES // each))
    return torch.cat([resample(chunk, whole, corner, (form.size, form.size)) for chunk in chunks])


def _geometry(height: int, width: int, form: PixelForm) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width that the whole picture is resized to, and where the square of it begins (top, left)."""
    size = form.size
    if form.fit == "stretch":
        return (size, size), (0, 0)
    long = int(size * max(height, width) / min(height, width))
    whole = (long, size) if height > width else (size, long)
    if form.rounding == "round":  # torchvision's centre crop
        return whole, (round((whole[0] - size) / 2.0), round((whole[1] - size) / 2.0))
    return whole, ((whole[0] - size) // 2, (whole[1] - size) // 2)  # transformers'


def _with_pillow(images: Tensor, whole: tuple[int, int], corner: tuple[int, int], size: int) -> Tensor:
    found = torch.empty(images.shape[0], 3, size, size, dtype=torch.uint8)
    (top, left), (height, width) = corner, whole
    for picture, result in zip(images.contiguous().numpy(), found, strict=True):
        # Channel by channel: the same bytes as of an RGB picture, without its fourth byte and the copy.
        for plane, channel in zip(picture, result, strict=True):
            small = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
            channel.copy_(torch.from_numpy(np.asarray(small)[top : top + size, left : left + size].copy()))
    return found


def _pad(images: Tensor, form: PixelForm) -> Tensor:
    """Longest side to S, the other in proportion, zeros around; as HPSv2's ResizeMaxSize on a float tensor."""
    size = form.size
    height, width = images.shape[2:]
    if images.device.type != "cpu" and max(height, width) > _SHRINK_LIMIT * size:
        return _pad(images.cpu(), form).to(images.device)
    pixels = images.contiguous().to(torch.float32).div_(255)
    scale = size / float(max(height, width))
    if scale != 1.0:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=form.antialias)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(pixels, (left, size - width - left, top, size - height - top))


def _moved(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Pictures of one size as one tensor [B, 3, H, W] on the device.

    64 pictures of 1024 px are 201 MB: from pages that may be swapped they go to a GPU at about half the speed.
    """
    if device.type != "cuda" or images[0].device.type != "cpu":
        return torch.stack(list(images)).to(device)
    # PyTorch keeps such memory for the next time, and does not give it away before the copy has ended.
    staged = torch.empty(len(images), *images[0].shape, dtype=images[0].dtype, pin_memory=True)
    return torch.stack(list(images), out=staged).to(device, non_blocking=True)


class Pictures:
    """A chunk's pictures: decoded once, shaped once for every form, shared by the rewards that look at them.

    Args:
        load: reads the pictures, uint8 [3, H, W] each; called when they are first looked at.
    """

    def __init__(self, load: Callable[[], Sequence[Tensor]]) -> None:
        self._load: Callable[[], Sequence[Tensor]] | None = load
        self._images: list[Tensor] | None = None
        self._pixels: dict[tuple[PixelForm, torch.device], Tensor] = {}
        self._count: int | None = None

    @classmethod
    def of(cls, images: Sequence[Tensor] | Tensor) -> Pictures:
        """Pictures that are in memory already: uint8 [3, H, W] each, or one tensor [B, 3, H, W]."""
        held = list(images)
        pictures = cls(lambda: held)
        pictures._load = None
        pictures._keep(held)
        return pictures

    def __len__(self) -> int:
        if self._count is None:
            self.images()
        assert self._count is not None
        return self._count

    def images(self) -> list[Tensor]:
        """The decoded pictures, uint8 [3, H, W] each.

        Raises:
            CraftError: they were dropped and cannot be read again.
        """
        if self._images is None:
            if self._load is None:
                raise CraftError("Pictures that were dropped cannot be looked at again.", where="rewards")
            self._keep(list(self._load()))
        assert self._images is not None
        return self._images

    def stacked(self) -> Tensor:
        """The decoded pictures as one tensor, uint8 [B, 3, H, W].

        Raises:
            CraftError: they differ in size.
        """
        images = self.images()
        sizes = sorted({(image.shape[2], image.shape[1]) for image in images})
        if len(sizes) > 1:
            raise CraftError(
                "Pictures of several sizes cannot be one tensor.",
                where="rewards",
                why="found " + ", ".join(f"{width}x{height}" for width, height in sizes[:5]),
                hint="score pictures of each size by themselves",
            )
        return torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)

    def pixels(self, form: PixelForm, device: torch.device | str = "cpu") -> Tensor:
        """The pictures in a form, made once and kept.

        Args:
            form: as ``shape`` takes it.
            device: where they are shaped and kept.

        Returns:
            [B, 3, S, S] on the device; uint8, or float32 for pad.
        """
        key = (form, torch.device(device))
        if key not in self._pixels:
            self._pixels[key] = self._shape(form, key[1])
        return self._pixels[key]

    def _shape(self, form: PixelForm, device: torch.device) -> Tensor:
        images = self.images()
        kind = torch.float32 if form.fit == "pad" else torch.uint8
        found = torch.empty(len(images), 3, form.size, form.size, dtype=kind, device=device)
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        for size, members in by_size.items():
            step = max(1, _WORKING_BYTES // (4 * size.numel()))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                found[part] = shape(_moved([images[index] for index in part], device), form)
        return found

    def drop_images(self) -> None:
        """Forget the decoded pictures; forms that were made stay."""
        self._images = None

    def _keep(self, images: list[Tensor]) -> None:
        self._images = images
        self._count = len(images)
