"""``craft-fast doctor``: does this machine have what a run needs? Each check is a function that tries the thing itself.

Nothing is downloaded, and nothing stays behind: one temporary file is written where the runs are, and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from craft_fast.config import Settings
from craft_fast.doctor import gpu, machine, weights
from craft_fast.doctor.found import Found, Patient
from craft_fast.errors import CraftError

__all__ = ["Found", "examine"]

Probe = Callable[[Patient], Found | None]


def examine(settings: Settings, runs: Path) -> Iterator[Found]:
    """Look at the machine with a run's settings in mind; the cheap checks come first, each as it is known.

    Args:
        settings: of the run that is meant: they say which device, which models, which packages.
        runs: the folder that holds the runs' folders; it need not be there.

    Yields:
        One finding a check. A check that breaks is a finding too; nothing is raised.
    """
    patient = Patient(settings, runs)
    for name, probe in _before_torch():
        yield from _look(name, probe, patient)
    for found in _look("torch", gpu.torch_itself, patient):
        yield found
        if found.result == "fail":
            return  # everything below needs it
    for name, probe in _with_torch(settings):
        yield from _look(name, probe, patient)


def _before_torch() -> list[tuple[str, Probe]]:
    return [
        ("python", machine.python),
        ("packages", machine.packages),
        ("memory", machine.memory),
        ("disk", machine.disk),
        ("fsync", machine.fsync),
    ]


def _with_torch(settings: Settings) -> list[tuple[str, Probe]]:
    return [
        ("driver", gpu.driver),
        ("gpu", gpu.card),
        ("gpu memory", gpu.memory),
        ("spill", gpu.spill),
        ("threads", machine.threads),
        ("model", weights.model),
        *((f"reward {name}", partial(weights.reward, name=name, spec=spec)) for name, spec in settings.rewards.items()),
        ("expander", weights.expander),
        ("reward shelf", weights.reward_shelf),
        ("hub cache", weights.hub_cache),
        ("arithmetic", gpu.arithmetic),
        ("bitsandbytes", gpu.bitsandbytes),
        ("xformers", gpu.xformers),
        ("triton", gpu.triton),
    ]


def _look(name: str, probe: Probe, patient: Patient) -> Iterator[Found]:
    try:
        found = probe(patient)
    except CraftError as error:
        why = f": {error.why}" if error.why else ""
        found = Found("fail", f"{error.what.rstrip('.')} ({error.where}){why}", error.hint or "correct the setting")
    except ModuleNotFoundError as error:  # a distribution's metadata that is not there is one, too
        found = Found("fail", f"a package is missing: {error.name}", f"pip install {error.name}")
    except Exception as error:  # what a broken installation raises has no bounds; the other checks go on
        text = " ".join(str(error).split())[:300]
        found = Found("fail", f"the check itself broke: {type(error).__name__}: {text}", "report it, with this line")
    if found is not None:
        yield found.of(name)
