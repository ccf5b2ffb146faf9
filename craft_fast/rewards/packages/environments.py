"""Which environments there are: the finished ones of today's pins. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_fast.errors import EnvironmentProblem
from craft_fast.rewards.packages import table

# Written last: an environment without it was not finished, and counts as not there.
COMPLETE = "COMPLETE.json"


@dataclass(frozen=True, slots=True)
class Environment:
    """A finished environment.

    Attributes:
        package: its name, such as ``hpsv2``.
        folder: of the virtual environment.
        versions: of the distributions that decide scores, such as torch, torchvision, hpsv2x.
        made: seconds since 1970 when it was finished.
        bytes: that it took on its disk then.
        seconds: that making it took.
    """

    package: str
    folder: Path
    versions: dict[str, str]
    made: float
    bytes: int = 0
    seconds: float = 0.0

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return interpreter(self.folder)

    @property
    def label(self) -> str:
        """For the provenance: ``package hpsv2x 1.2.0 (torch 2.14.1)``."""
        distribution = table.get(self.package).distribution
        return f"package {distribution} {self.versions[distribution]} (torch {self.versions['torch']})"


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / "bin" / "python"


def read(folder: Path) -> Environment | None:
    """The environment in ``folder``, None where it is not finished, damaged, or of other pins than today's."""
    try:
        found: dict[str, Any] = json.loads((folder / COMPLETE).read_bytes())
        package = table.PACKAGES[found["package"]]
        current = found["pins"] == table.pins_digest(package) and interpreter(folder).exists()
        versions = {str(name): str(version) for name, version in found["versions"].items()}
        took = int(found.get("bytes", 0)), float(found.get("seconds", 0))
        environment = Environment(package.name, folder, versions, float(found["made"]), *took)
        current = current and {"torch", package.distribution} <= versions.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return environment if current else None


def all_of(package: str) -> list[Environment]:
    """The finished environments of ``package``, the newest first."""
    name = table.get(package).name
    folders = table.root().glob(f"{name}-*/{COMPLETE}")
    known = [one for one in (read(path.parent) for path in folders) if one is not None and one.package == name]
    return sorted(known, key=lambda one: (one.made, str(one.folder)), reverse=True)


def find(package: str) -> Environment | None:
    """The environment of ``package`` that was finished last, None where there is none."""
    return next(iter(all_of(package)), None)


def need(package: str) -> Environment:
    """As ``find``.

    Raises:
        EnvironmentProblem: there is none; the hint makes it.
    """
    found = find(package)
    if found is None:
        raise EnvironmentProblem(
            f"The environment of the package {package} is not there.",
            where=str(table.root()),
            why="the authors' package needs other versions than this toolkit and runs in an environment of its own",
            hint=f"craft-fast rewards install {package}",
        )
    return found
