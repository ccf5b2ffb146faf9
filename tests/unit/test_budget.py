"""Memory budgets, caps, and what ``auto`` comes to on cards of several sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast import budget
from craft_fast.budget import GIB, Machine, ModelShape
from craft_fast.config import EngineSettings, Settings
from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError
from craft_fast.plan.stages import Costs
from craft_fast.sdxl import published
from craft_fast.settings_io import load_settings

CPU = torch.device("cpu")
SDXL = ModelShape(published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2)


def card(gib: float) -> Machine:
    return Machine(f"a card of {gib} GiB", True, int(gib * GIB))


def sdxl(**changes: Any) -> Settings:
    decided = {"train.method": "auto", "train.micro_batch_size": 1, "engine.resident": "auto"}
    return budget.with_changes(load_settings("sdxl"), {**decided, **changes})


def test_a_cpu_has_the_machines_memory() -> None:
    total = budget.total_memory(CPU)
    machine = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    assert 0.05 * GIB < total <= machine * 1.01
    assert budget.memory_budget(CPU, EngineSettings()) == total
    assert budget.memory_budget(CPU, EngineSettings(vram_gib=0.5)) == GIB // 2


def test_a_cap_on_a_cpu_is_said_to_do_nothing() -> None:
    assert budget.apply_cap(CPU, EngineSettings()) == []
    [note] = budget.apply_cap(CPU, EngineSettings(vram_gib=8))
    assert "nothing on a CPU" in note


def test_a_cap_counts_the_context_in() -> None:
    whole, capped = card(24).budget(EngineSettings()), card(24).budget(EngineSettings(vram_gib=8))
    assert whole - capped == 16 * GIB
    assert 7 * GIB < capped < 7.7 * GIB
    # A graph takes memory outside of the allocator.
    assert card(8).budget(EngineSettings(graph=False)) > card(8).budget(EngineSettings())


def test_a_cap_above_the_card_is_refused_and_one_below_the_context_too() -> None:
    with pytest.raises(ConfigError, match="larger than the GPU's memory") as raised:
        card(8).check_cap(EngineSettings(vram_gib=12))
    assert "the card has 8.0 GiB" in raised.value.why
    card(8).check_cap(EngineSettings(vram_gib=8))
    with pytest.raises(ConfigError, match="no room"):
        card(8).budget(EngineSettings(vram_gib=0.3))


@pytest.mark.parametrize(
    ("gib", "method", "resident"), [(80, "lora", "always"), (24, "lora", "always"), (8, "lora", "never"),
                                    (6, "qlora", "never"), (4, "qlora", "never")],
)  # fmt: skip
def test_auto_goes_by_the_card(gib: float, method: str, resident: str) -> None:
    found, notes = budget.resolve_auto(sdxl(), shape=SDXL, machine=card(gib))
    assert (found.train.method, found.engine.resident) == (method, resident)
    assert notes[0].startswith(f"train.method: {method}")
    assert budget.resolve_auto(found, shape=SDXL, machine=card(gib)) == (found, [])


@pytest.mark.parametrize(
    ("gib", "batch", "form"), [(24, 5, "dense"), (8, 5, "dense"), (6, 1, "dense"), (6, 5, "nf4"), (4, 1, "nf4")]
)
def test_the_drawing_unet_goes_by_the_card(gib: float, batch: int, form: str) -> None:
    auto = sdxl(**{"generate.unet": "auto", "generate.batch_size": batch})
    found, notes = budget.resolve_auto(auto, shape=SDXL, machine=card(gib))
    assert found.generate.unet == form
    assert any(note.startswith(f"generate.unet: {form}, ") for note in notes)
    assert budget.resolve_auto(found, shape=SDXL, machine=card(gib)) == (found, [])
    alone = budget.with_changes(found, {"generate.unet": "auto"})
    [note] = budget.resolve_auto(alone, shape=SDXL, machine=card(gib))[1]
    assert note.startswith("generate.unet")


def test_the_drawing_unet_goes_by_the_cap_and_is_dense_on_a_cpu() -> None:
    auto = sdxl(**{"generate.unet": "auto", "generate.batch_size": 1, "engine.vram_gib": 5.25})
    for gib in (6, 24):
        assert budget.resolve_auto(auto, shape=SDXL, machine=card(gib))[0].generate.unet == "nf4"
    tiny = budget.with_changes(load_settings("tiny"), {"generate.unet": "auto"})
    found, notes = budget.resolve_auto(tiny)
    assert found.generate.unet == "dense"
    assert "generate.unet: dense, as always on a CPU" in notes
    # What the user wrote is never changed.
    assert budget.resolve_auto(sdxl(), shape=SDXL, machine=card(4))[0].generate.unet == "dense"


def test_the_dense_unet_is_chosen_exactly_where_it_draws() -> None:
    decided = {"generate.unet": "dense", "engine.resident": "never", "engine.vae_tiling": "always"}
    needed = Costs.of(sdxl(**decided, **{"train.method": "lora"}), card(80), SDXL).drawing_peak().reserved
    outside = 80 * GIB - card(80).budget(EngineSettings())
    auto = sdxl(**{"generate.unet": "auto", "train.method": "lora"})
    for extra, form in ((GIB // 100, "dense"), (-GIB // 100, "nf4")):
        machine = Machine("just", True, needed + outside + extra)
        assert budget.resolve_auto(auto, shape=SDXL, machine=machine)[0].generate.unet == form


def test_auto_goes_by_the_cap_as_by_a_card_of_that_size() -> None:
    capped, _ = budget.resolve_auto(sdxl(**{"engine.vram_gib": 6.0}), shape=SDXL, machine=card(24))
    assert (capped.train.method, capped.engine.resident) == ("qlora", "never")


def test_lora_is_chosen_exactly_where_it_fits() -> None:
    needed = Costs.of(sdxl(**{"train.method": "lora"}), card(80), SDXL).training().reserved
    outside = 80 * GIB - card(80).budget(EngineSettings())
    for extra, method in ((GIB // 100, "lora"), (-GIB // 100, "qlora")):
        machine = Machine("just", True, needed + outside + extra)
        assert budget.resolve_auto(sdxl(), shape=SDXL, machine=machine)[0].train.method == method


def test_where_qlora_does_not_fit_nf4_convs_are_suggested() -> None:
    costs = Costs.of(sdxl(**{"train.method": "qlora"}), card(80), SDXL)
    outside = 80 * GIB - card(80).budget(EngineSettings())
    machine = Machine("small", True, costs.training().reserved + outside - GIB // 10)
    _, notes = budget.resolve_auto(sdxl(), shape=SDXL, machine=machine)
    assert "train.nf4_convs=true" in notes[0]


def test_on_a_cpu_auto_is_qlora_and_all_stays() -> None:
    tiny = budget.with_changes(load_settings("tiny"), {"train.method": "auto", "engine.resident": "auto"})
    found, notes = budget.resolve_auto(tiny)
    assert (found.train.method, found.engine.resident) == ("qlora", "always")
    assert notes == ["train.method: qlora, as always on a CPU"]


def test_the_shape_is_the_models_own_where_it_is_here(tmp_path: Path) -> None:
    tiny = budget.model_shape(load_settings("tiny"))
    assert tiny.unet["block_out_channels"] == [48, 64, 96]
    assert (tiny.vae_scale_factor, tiny.tokens, tiny.note) == (4, 32, "")
    missing = budget.model_shape(load_settings("tiny", None, ["model.path=nobody/has-this"]))
    assert missing.unet == published.UNET
    assert "nobody/has-this" in missing.note
    assert budget.model_shape(load_settings("tiny", None, [f"model.path={tmp_path / 'not-there'}"])).note
    with pytest.raises(EnvironmentProblem):
        budget.model_shape(load_settings("tiny", None, [f"model.path={tmp_path}"]))
    pickle = tmp_path / "model.safetensors"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(IntegrityError):
        budget.model_shape(load_settings("tiny", None, [f"model.path={pickle}"]))


def test_training_has_what_the_models_that_stay_leave() -> None:
    settings = with_tiny(**{"engine.resident": "never", "engine.vram_gib": 1.0})
    stays = with_tiny(**{"engine.resident": "always", "engine.vram_gib": 1.0})
    assert budget.training_budget(settings, CPU) == GIB
    # Two text encoders and a VAE of a few megabytes.
    assert GIB - 20 * 2**20 < budget.training_budget(stays, CPU) < GIB - 2**20


def with_tiny(**changes: Any) -> Settings:
    return budget.with_changes(load_settings("tiny"), changes)
