"""How much memory this process may use, and what is chosen by it.

Choices go by the card's size or the cap, never by what happens to be free: the same command makes the same run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_fast.config import EngineSettings, Settings
from craft_fast.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch

GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """What planning knows of a device; a GPU that is not there can be planned for, too.

    Attributes:
        name: for people.
        gpu: whether it is one.
        total_bytes: of its memory.
        bfloat16: whether it computes in that.
        device: as torch calls it; None where it is not there.
    """

    name: str
    gpu: bool
    total_bytes: int
    bfloat16: bool = True
    device: torch.device | None = None

    def budget(self, engine: EngineSettings) -> int:
        """See ``memory_budget``."""
        total = self.total_bytes
        size = min(total, int(engine.vram_gib * GIB)) if engine.vram_gib is not None else total
        if not self.gpu:
            return size
        usable = size - _outside(engine)
        if usable <= 0:
            raise ConfigError(
                "The memory cap has no room for the GPU's own context",
                where="engine.vram_gib (--vram)",
                why=f"found {size / GIB:g} GiB; CUDA, cuBLAS and recorded graphs take {_outside(engine) / GIB:.1f}",
                hint="craft-fast plan, which says how much a run needs",
            )
        return usable

    def check_cap(self, engine: EngineSettings) -> None:
        """Refuse a cap above the card.

        Raises:
            ConfigError: says how much the card has.
        """
        if self.gpu and engine.vram_gib is not None and engine.vram_gib * GIB > self.total_bytes:
            raise ConfigError(
                "The memory cap is larger than the GPU's memory",
                where="engine.vram_gib (--vram)",
                why=f"found {engine.vram_gib:g} GiB; the card has {self.total_bytes / GIB:.1f} GiB",
                hint=f"--vram {int(self.total_bytes / GIB)}, or leave it out",
            )


def machine_of(device: torch.device) -> Machine:
    """What there is to know of a device that is there."""
    if device.type != "cuda":
        return Machine("CPU", False, total_memory(device), False, device)
    import torch

    capability = torch.cuda.get_device_capability(device)
    return Machine(torch.cuda.get_device_name(device), True, total_memory(device), capability[0] >= 8, device)


@dataclass(frozen=True)
class ModelShape:
    """Configurations of the SDXL that a run uses, without its weights.

    Attributes:
        unet: the UNet's.
        vae: the VAE's.
        text_encoder: the first text encoder's.
        text_encoder_2: the second one's.
        note: says so where they are not the model's own; else empty.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]
    note: str = ""

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def tokens(self) -> int:
        """Length of a prompt's embeddings."""
        return int(self.text_encoder["max_position_embeddings"])


def model_shape(settings: Settings) -> ModelShape:
    """Read the model's configurations; what is not on this machine is taken to be SDXL base as published.

    No network is asked and no weight is read.

    Raises:
        CraftError: there is a model and it is no SDXL, or damaged.
    """
    from craft_fast.sdxl import published
    from craft_fast.sdxl.source import open_source

    chosen = settings.model
    try:
        source = open_source(chosen.path, config=chosen.config, vae=chosen.vae, offline=True)
    except EnvironmentProblem as missing:
        _refuse_other_models(chosen.path, missing)
        note = f"{chosen.path} is not complete on this machine ({missing.what}); SDXL base's published sizes are used"
        return ModelShape(
            published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2, note
        )  # fmt: skip
    first, second = (source.of(part).config(part) for part in ("text_encoder", "text_encoder_2"))
    return ModelShape(dict(source.config("unet")), dict(source.config("vae")), first, second)


def _refuse_other_models(path: str, missing: EnvironmentProblem) -> None:
    """What is here and is no SDXL will not become one by a download."""
    from craft_fast.sdxl.identify import read_header, require_sdxl
    from craft_fast.store.run import resolve_uri

    try:
        place = resolve_uri(path)
    except EnvironmentProblem:
        return
    if isinstance(place, Path) and place.is_dir():
        raise missing
    if isinstance(place, Path):
        require_sdxl(read_header(place))


# ---- memory


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device: the GPU's, or the machine's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return min(pages * size, _container_limit() or pages * size)


def _container_limit() -> int | None:
    """The memory limit of a container, which a process inside meets before the machine's."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def memory_budget(device: torch.device, engine: EngineSettings) -> int:
    """Bytes that this process may hand out to tensors on ``device``: of the cap or the card, less the GPU's context.

    Args:
        device: where it runs; on a CPU the machine's memory, or the cap where one is set.
        engine: the ``engine`` section.

    Raises:
        ConfigError: the cap leaves nothing beside the context.
    """
    return machine_of(device).budget(engine)


def training_budget(settings: Settings, device: torch.device) -> int:
    """``memory_budget`` less the text encoders and the VAE, where they stay on the device while the UNet is trained.

    Args:
        settings: with ``train.method`` and ``engine.resident`` decided.
        device: where it runs.
    """
    from craft_fast.plan.stages import Costs

    return Costs.of(settings, machine_of(device)).training_budget


def _outside(engine: EngineSettings) -> int:
    """What the process takes on a GPU outside of PyTorch's allocator."""
    from craft_fast.sdxl.costs import CONTEXT_BYTES, GRAPH_BYTES

    return CONTEXT_BYTES + (GRAPH_BYTES if engine.graph else 0)


def apply_cap(device: torch.device, engine: EngineSettings) -> list[str]:
    """Hold PyTorch's allocator to ``engine.vram_gib``, the GPU's context included; notes for the user.

    Call it before the first tensor is on the GPU.

    Raises:
        ConfigError: the card is smaller than the cap, or the cap smaller than the context.
    """
    if engine.vram_gib is None:
        return []
    if device.type != "cuda":
        return [f"engine.vram_gib = {engine.vram_gib:g} caps nothing on a CPU; it is used for planning alone"]
    import torch

    check_cap(device, engine)
    torch.cuda.set_per_process_memory_fraction(memory_budget(device, engine) / total_memory(device), device)
    return []


def check_cap(device: torch.device, engine: EngineSettings) -> None:
    """Refuse a cap above the card.

    Raises:
        ConfigError: says how much the card has.
    """
    machine_of(device).check_cap(engine)


# ---- what is chosen by it


def resolve_auto(
    settings: Settings, *, shape: ModelShape | None = None, machine: Machine | None = None
) -> tuple[Settings, list[str]]:
    """Make ``train.method: auto``, ``generate.unet: auto`` and ``engine.resident: auto`` concrete.

    On a CPU auto is qlora and dense, and everything stays in memory. On a GPU, lora where its training fits with all
    activations recomputed; dense where that UNet draws with no other model beside it and the VAE in strips; all models
    stay where they fit together.

    Args:
        settings: as the user wrote them.
        shape: of the model; read where not given.
        machine: that it is planned for; the one that ``model.device`` names where not given.

    Returns:
        Settings without these ``auto``, and a note for each choice that was made.

    Raises:
        CraftError: the device, the model or the cap is not right.
    """
    if "auto" not in (settings.train.method, settings.generate.unet, settings.engine.resident):
        return settings, []
    if machine is None:
        from craft_fast.sdxl.load import pick_device

        machine = machine_of(pick_device(settings.model.device))
    notes: list[str] = []
    if settings.train.method == "auto":
        method, why = _method(settings, machine, shape)
        settings = with_changes(settings, {"train.method": method})
        notes.append(f"train.method: {method}, {why}")
    if settings.generate.unet == "auto":
        form, why = _unet(settings, machine, shape)
        settings = with_changes(settings, {"generate.unet": form})
        notes.append(f"generate.unet: {form}, {why}")
    if settings.engine.resident == "auto":
        stays, why = _resident(settings, machine, shape)
        settings = with_changes(settings, {"engine.resident": "always" if stays else "never"})
        notes += [why] if why else []
    return settings, notes


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with some values, by dotted key, replaced and checked."""
    data = settings.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        data[section] = {**data[section], name: value}
    return Settings.model_validate(data)


def _method(settings: Settings, machine: Machine, shape: ModelShape | None) -> tuple[str, str]:
    if not machine.gpu:
        return "qlora", "as always on a CPU"
    from craft_fast.plan.stages import Costs

    budget = machine.budget(settings.engine)

    def needed(changes: dict[str, Any]) -> int:
        return Costs.of(with_changes(settings, changes), machine, shape).training().reserved

    lora, qlora = needed({"train.method": "lora"}), needed({"train.method": "qlora"})
    if lora <= budget:
        return "lora", f"whose training needs {lora / GIB:.1f} of {budget / GIB:.1f} GiB at least"
    why = f"since lora would need {lora / GIB:.1f} of {budget / GIB:.1f} GiB"
    if qlora > budget and not settings.train.nf4_convs:
        convs = needed({"train.method": "qlora", "train.nf4_convs": True})
        why += f"; qlora needs {qlora / GIB:.1f} GiB, --set train.nf4_convs=true brings it to {convs / GIB:.1f}"
    return "qlora", why


def _unet(settings: Settings, machine: Machine, shape: ModelShape | None) -> tuple[str, str]:
    if not machine.gpu:
        return "dense", "as always on a CPU"
    from craft_fast.plan.stages import Costs

    budget = machine.budget(settings.engine)
    least = {"generate.unet": "dense", "engine.resident": "never", "engine.vae_tiling": "always"}
    needed = Costs.of(with_changes(settings, least), machine, shape).drawing_peak().reserved
    if needed <= budget:
        return "dense", f"which draws in {needed / GIB:.1f} of {budget / GIB:.1f} GiB"
    return "nf4", f"since the dense one would need {needed / GIB:.1f} of {budget / GIB:.1f} GiB; its pictures differ"


def _resident(settings: Settings, machine: Machine, shape: ModelShape | None) -> tuple[bool, str]:
    if not machine.gpu:
        return True, ""
    from craft_fast.plan.stages import Costs

    budget = machine.budget(settings.engine)
    peak = Costs.of(with_changes(settings, {"engine.resident": "always"}), machine, shape).highest_peak()
    if peak <= budget:
        return True, ""
    return False, (
        f"engine.resident: never, since all models together would need {peak / GIB:.1f} of {budget / GIB:.1f} GiB"
    )
