"""What there is to install: packages, pins that were tried, which torchvision belongs to which torch. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from craft_fast.errors import UsageError, closest
from craft_fast.store.digest import digest_json

# torch 2.N takes torchvision 0.(N+15), patch release by patch release: 2.10.0 and 0.25.0, 2.14.1 and 0.29.1.
# https://github.com/pytorch/vision#installation
TORCH_SERIES = ("2.10", "2.11", "2.12", "2.13", "2.14")
_VISION_MINOR = {series: 25 + index for index, series in enumerate(TORCH_SERIES)}


@dataclass(frozen=True, slots=True)
class Package:
    """One of the authors' packages.

    Attributes:
        name: as the settings and the commands say it.
        distribution: what carries it on the package index.
        pins: requirements that were tried together, torch and torchvision apart.
        note: why these.
    """

    name: str
    distribution: str
    pins: tuple[str, ...]
    note: str

    @property
    def version(self) -> str:
        """The pinned version of ``distribution``."""
        return next(pin.partition("==")[2] for pin in self.pins if pin.startswith(f"{self.distribution}=="))


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "hpsv2",
            "hpsv2x",
            ("hpsv2x==1.2.0", "open-clip-torch==3.3.0", "timm==1.0.31", "ftfy==6.3.1"),
            "hpsv2x is hpsv2 1.2.0 with the vocabulary file that hpsv2's own wheel lacks; open_clip is the reference "
            "of its tokenizer",
        ),
        Package(
            "image-reward",
            "image-reward",
            ("image-reward==1.5", "transformers==4.54.1", "timm==0.6.13", "diffusers==0.39.0"),
            "image-reward 1.5 calls what transformers 5 no longer has (github.com/zai-org/ImageReward issue 122)",
        ),
    )
}


def get(name: str) -> Package:
    """The package of that name.

    Raises:
        UsageError: there is none; the known ones are told.
    """
    if name not in PACKAGES:
        raise UsageError(
            f"There is no package {name!r}",
            why=f"known are {', '.join(PACKAGES)}",
            hint=closest(name, PACKAGES).strip(),
        )
    return PACKAGES[name]


def torch_pins(release: str) -> tuple[str, str]:
    """Requirements of torch and of the torchvision that was built for it.

    Args:
        release: such as ``2.13.0``; a local part (``+cpu``, ``+cu130``) is left out, the index decides the build.

    Raises:
        UsageError: a torch whose torchvision is not known.
    """
    public = release.partition("+")[0]
    parts = public.split(".")
    series = ".".join(parts[:2])
    if series not in _VISION_MINOR or not all(part.isdigit() for part in parts) or len(parts) > 3:
        raise UsageError(
            f"The torchvision that belongs to torch {release} is not known",
            where="--torch",
            why=f"known are torch {', '.join(TORCH_SERIES)}",
            hint=f"name one of these, such as --torch {TORCH_SERIES[-1]}.1",
        )
    patch = parts[2] if len(parts) == 3 else "0"
    return f"torch=={series}.{patch}", f"torchvision==0.{_VISION_MINOR[series]}.{patch}"


def requirements(package: Package, torch: str | None) -> list[str]:
    """All pins of an environment; ``torch`` None leaves torch and torchvision to the system's packages."""
    return [*package.pins, *(torch_pins(torch) if torch is not None else ())]


def root() -> Path:
    """Where the environments are: ``$CRAFT_FAST_PACKAGES``, else the user's cache folder."""
    if own := os.environ.get("CRAFT_FAST_PACKAGES"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "craft-fast" / "packages"


def pins_digest(package: Package) -> str:
    """What an environment must have been made from to be used for ``package``; torch may be any."""
    return digest_json([package.name, sorted(package.pins)])[:12]


def folder(package: Package, torch: str | None, python: str) -> Path:
    """Where the environment for these pins and this Python (``3.11``) lies, or will lie."""
    digest = digest_json([pins_digest(package), requirements(package, torch), python])[:12]
    return root() / f"{package.name}-{digest}"
