"""What a check says, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from craft_fast.config import Settings

if TYPE_CHECKING:
    import torch

Result = Literal["ok", "warn", "fail"]
GIB = 1024**3
# From here on a picture is SDXL's; the embedded default and its kind stay far below.
_FULL_SIZE_PX = 512 * 512


@dataclass(frozen=True, slots=True)
class Found:
    """One line of the doctor's list.

    Attributes:
        result: ``ok``; ``warn``: slower, larger or later than need be; ``fail``: a run cannot work.
        found: what is there.
        fix: the command to type, or what to change; empty where nothing is to do.
        check: what was looked at.
    """

    result: Result
    found: str
    fix: str = ""
    check: str = ""

    def of(self, check: str) -> Found:
        """The same finding with its check's name."""
        return replace(self, check=check)


@dataclass
class Patient:
    """What the checks know: the settings, where the runs are, and what earlier checks found.

    Attributes:
        settings: of the run that is meant.
        runs: folder of the runs.
        to_fetch: hub ids that are not in the local cache, with the GiB they take about.
        to_shelve: files of published reward models that are not here, by their places, with their bytes.
    """

    settings: Settings
    runs: Path
    to_fetch: dict[str, float] = field(default_factory=dict)
    to_shelve: dict[str, int] = field(default_factory=dict)

    @property
    def full_size(self) -> bool:
        """Whether the settings are for an SDXL of the usual size."""
        return self.settings.generate.height_px * self.settings.generate.width_px >= _FULL_SIZE_PX

    @property
    def wants_gpu(self) -> bool:
        """Whether the settings name a GPU, so that one must be there."""
        return self.settings.model.device.startswith("cuda")

    @property
    def device(self) -> torch.device:
        """Where a run would work: the GPU of the settings where it is there, else the CPU."""
        import torch

        name = self.settings.model.device
        index = int(name.partition(":")[2] or 0)
        there = name != "cpu" and torch.cuda.is_available() and index < torch.cuda.device_count()
        return torch.device("cuda", index) if there else torch.device("cpu")

    @property
    def gpu(self) -> torch.device | None:
        """The GPU that a run would work on, or None."""
        return self.device if self.device.type == "cuda" else None


def gib(count: float) -> str:
    """Bytes as GiB, one decimal."""
    return f"{count / GIB:.1f} GiB"
