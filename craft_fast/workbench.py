"""What stages share while a run is worked on: the model, the rewards, and the clock; loaded late, dropped early.

Where models do not stay on the device (``engine.resident``), it is here that the model makes room for the rewards and
they for it; only the workbench knows both.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from craft_fast.config import Settings

if TYPE_CHECKING:
    from craft_fast.budget import Machine
    from craft_fast.progress import Progress
    from craft_fast.rewards.base import Reward
    from craft_fast.sdxl.load import SdxlModel
    from craft_fast.sdxl.vae import Concessions

_GIB = 1024**3


class Workbench:
    """Holds at most one model and the rewards in use.

    Args:
        settings: of the run; ``engine.resident`` and ``generate.unet`` are what ``budget.resolve_auto`` made of them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._model: SdxlModel | None = None
        self._rewards: dict[str, Reward] = {}
        self._concessions: Concessions | None = None

    @property
    def resident(self) -> bool:
        """Whether models stay on the device between phases."""
        return self.settings.engine.resident != "never"

    def model(self) -> SdxlModel:
        """The SDXL, opened on the first call; where models do not stay, the rewards' networks are gone."""
        if not self.resident:
            for reward in self._rewards.values():
                reward.rest()
        if self._model is None:
            from craft_fast.sdxl.load import load_sdxl

            wanted, form = self.settings.model, self.settings.generate.unet
            if form == "auto":
                raise ValueError("generate.unet must be decided before a model is loaded")
            self._model = load_sdxl(
                wanted.path, device=wanted.device, dtype=wanted.dtype, prediction_type=wanted.prediction_type,
                config=wanted.config, vae=wanted.vae, vae_dtype=wanted.vae_dtype,
                zero_terminal_snr=wanted.zero_terminal_snr, offline=wanted.offline, engine=self.settings.engine,
                unet_form=form,
            )  # fmt: skip
        return self._model

    def concessions(self) -> Concessions:
        """What memory and precision have forced so far; one for all stages, so that it is met once."""
        if self._concessions is None:
            from craft_fast.sdxl.vae import Concessions

            self._concessions = Concessions()
        return self._concessions

    def rewards(self, *, held_out: bool, progress: Progress | None = None) -> list[Reward]:
        """The rewards that judge candidates or, with ``held_out``, all of them; opened on the first call.

        Where models do not stay on the device, the SDXL's parts are freed first, and a reward's network is there from
        its first score to its ``rest``. Where they do, the networks stay as well if all of them have room together.

        Args:
            held_out: those that only judge the result, too.
            progress: told of files that are fetched.
        """
        from craft_fast.budget import machine_of
        from craft_fast.rewards.registry import load_reward
        from craft_fast.sdxl.load import pick_device

        if self._model is not None:
            self._model.rest()
        settings = self.settings
        device = pick_device(settings.model.device)
        wanted = {name: spec for name, spec in settings.rewards.items() if held_out or not spec.held_out}
        for name, spec in wanted.items():
            if name not in self._rewards:
                self._rewards[name] = load_reward(
                    name, spec, device, offline=settings.model.offline, resident=self.resident,
                    dtype=settings.score.dtype, attention=settings.engine.attention, progress=progress,
                )  # fmt: skip
        asked = [self._rewards[name] for name in wanted]
        self._share_memory(asked, machine_of(device))
        return asked

    def _share_memory(self, rewards: list[Reward], machine: Machine) -> None:
        """Tell the networks how much memory each has on the device, and whether they stay there.

        By sizes that are known beforehand, never by what is free just now: the batch that a network takes at a time
        changes the rounding of its scores. ``craft_fast.plan.stages`` plans by the same rules.
        """
        from craft_fast.rewards.network_reward import NetworkReward

        networks = [reward for reward in self._rewards.values() if isinstance(reward, NetworkReward)]
        if not networks:
            return
        asked = [network for network in networks if network in rewards]
        room, beside_drawing = self._room_for_rewards(machine)
        weights = sum(network.need.weight_bytes for network in asked)
        most = max((network.need.image_bytes for network in asked), default=0) * self.settings.score.batch_size
        stay = machine.gpu and weights + most <= room and weights <= beside_drawing
        for network in networks:
            leaves = network.stay and not (stay and network in asked)
            network.stay = stay and network in asked
            network.memory_budget = room - (weights - network.need.weight_bytes if network.stay else 0)
            if leaves:
                network.rest()

    def _room_for_rewards(self, machine: Machine) -> tuple[int, int]:
        """Bytes that rewards may take while they score, and those that they may keep while the SDXL draws.

        All that may be used, less the SDXL's weights where they stay; nothing is kept where they do not.
        """
        from craft_fast.plan.stages import Costs
        from craft_fast.sdxl.costs import CUBLAS_BYTES, FRAGMENTATION

        budget = machine.budget(self.settings.engine)
        if machine.gpu:
            budget = int(budget / (1 + FRAGMENTATION))
        room = budget - (CUBLAS_BYTES if machine.gpu else 0)
        if not self.resident:
            return max(0, room), 0
        costs = Costs.of(self.settings, machine)
        room -= costs.text_weights() + costs.unet_weights() + costs.decode(tiled=True).weight_bytes
        return max(0, room), max(0, budget - costs.drawing_peak().allocated)

    def drop_rewards(self) -> None:
        """Free the rewards' memory; training needs it."""
        for reward in self._rewards.values():
            reward.close()
        self._rewards.clear()
        self.collect()

    def drop_model(self) -> None:
        """Free the model's memory; the next use loads it afresh."""
        if self._model is not None:
            from craft_fast.sdxl.load import unload

            unload(self._model)
            self._model = None

    def close(self) -> None:
        """Free everything."""
        self.drop_rewards()
        self.drop_model()

    @staticmethod
    def collect() -> None:
        """Give memory back that nothing refers to any more, what refers to itself in a circle among it."""
        if "torch" in sys.modules:
            from craft_fast.sdxl.load import free_memory

            free_memory()


class Meter:
    """Seconds and peak memory of one stage, over all the pieces in which it ran.

    Args:
        seconds: spent before, in calls that were interrupted.
        peak_gib: reached before.
    """

    def __init__(self, seconds: float = 0.0, peak_gib: float | None = None) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self.peak_gib = peak_gib

    @property
    def seconds(self) -> float:
        """Seconds spent so far, those of a block that still runs among them."""
        return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time and memory of the block, however it ends."""
        _reset_peak()
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, None
            self.peak_gib = max(self.peak_gib or 0.0, peak_gib())


def _gpu_in_use() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_peak() -> None:
    if _gpu_in_use():
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        # "5" resets VmHWM, so that a stage is not charged with the peak of an earlier one.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gib() -> float:
    """Peak memory since the last reset: allocated on the GPU where one is in use, else resident in this process."""
    if _gpu_in_use():
        import torch

        return float(torch.cuda.max_memory_allocated()) / _GIB
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / _GIB
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / _GIB
