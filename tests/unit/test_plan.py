"""Plans: peaks by stage, counts, disk, states, and what to change on cards that are too small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from craft_fast.budget import GIB, Machine, ModelShape, with_changes
from craft_fast.config import Settings
from craft_fast.errors import ConfigError
from craft_fast.pipeline import CONFIG_NAME, STAGES
from craft_fast.pipeline_keys import input_keys, output_keys
from craft_fast.plan import Plan, free_disk, plan, plan_data
from craft_fast.plan.amounts import ASSUMED_ACCEPTANCE, amounts, disk_bytes, seconds
from craft_fast.plan.fit import over, ways_to_fit
from craft_fast.plan.stages import Costs
from craft_fast.plan.states import known_of, settings_by_stage
from craft_fast.probe import Probe
from craft_fast.sdxl import published
from craft_fast.sdxl.costs import lora_parameters
from craft_fast.settings_io import load_settings, render_yaml
from craft_fast.store.run import open_run

SDXL = ModelShape(published.UNET, published.VAE, published.TEXT_ENCODER, published.TEXT_ENCODER_2)
ONE = {"train.micro_batch_size": 1, "generate.batch_size": 4}


def card(gib: float) -> Machine:
    return Machine(f"a card of {gib} GiB", True, int(gib * GIB))


def sdxl(**changes: Any) -> Settings:
    """Full size, with the tiny rewards, which are on this machine."""
    base = load_settings("sdxl")
    tiny = load_settings("tiny")
    data = {**base.model_dump(), "rewards": tiny.model_dump()["rewards"], "prompts": tiny.model_dump()["prompts"]}
    resolved = {"train.method": "qlora", "engine.resident": "never"}
    return with_changes(Settings.model_validate(data), {**resolved, **ONE, **changes})


def costs(gib: float, **changes: Any) -> Costs:
    return Costs.of(sdxl(**changes), card(gib), SDXL)


# ---- memory by stage


def test_peaks_of_the_full_sdxl() -> None:
    peaks = costs(24, **{"train.gradient_checkpointing": "all"}).peaks()
    assert list(peaks) == list(STAGES)
    gib = {name: peak.allocated / GIB for name, peak in peaks.items() if peak is not None}
    # bf16 UNet of 4.78 GiB and the activations of 2 x 4 images; NF4 UNet, rank 32, all recomputed.
    assert 4.9 < gib["generate"] < 7
    assert 2.2 < gib["train"] < 3.2
    assert 1.5 < gib["cache"] < 1.6
    assert gib["export"] == gib["report"] == 0.0


def test_the_figures_asked_of_training_are_within_reach() -> None:
    """Issue: 4.0 GiB for NF4, 6.3 for bf16 LoRA checkpointed, 16 for a full fine-tune, at batch 1 and rank 16."""
    options = {"train.gradient_checkpointing": "all", "train.rank": 16, "train.grad_accum_steps": 1}
    for method, limit in (("qlora", 4.0), ("lora", 6.3), ("full", 16.0)):
        memory = costs(80, **options, **{"train.method": method}).training()
        assert memory.total / GIB < limit
        assert memory.total == sum(vars(memory).values())


def test_resident_models_add_up_and_guidance_doubles_the_batch() -> None:
    stays, goes = costs(80, **{"engine.resident": "always"}), costs(80)
    assert stays.peaks()["generate"].allocated > goes.peaks()["generate"].allocated + GIB  # type: ignore[union-attr]
    plain = costs(80, **{"generate.guidance_scale": 1.0})
    assert goes.denoise_bytes(4) == pytest.approx(2 * plain.denoise_bytes(4), rel=0.1)
    unguided = costs(80, **{"generate.guidance_interval": [0.5, 0.5]})
    assert unguided.denoise_bytes(4) == plain.denoise_bytes(4)


def test_a_small_card_decodes_in_pieces_and_recomputes_more() -> None:
    assert not costs(24).tiled()
    assert costs(3.5).tiled()
    assert costs(3.5, **{"engine.vae_tiling": "never"}).tiled() is False
    small, middle, large = (len(costs(gib).kept) for gib in (4, 6, 24))
    assert small < middle < large == 87
    for gib in (4, 5, 6, 8):
        planned = costs(gib)
        assert planned.peaks()["train"].reserved <= planned.budget  # type: ignore[union-attr]


# ---- what to change


def names_of(changes: list[Any]) -> list[str]:
    return [key for change in changes for key in change.settings]


def test_what_fits_needs_no_change() -> None:
    assert over(costs(24)) == {}
    assert ways_to_fit(costs(24)) == ([], True)


def test_the_cheapest_change_that_helps_comes_first_and_needless_ones_are_left_out() -> None:
    many = costs(8, **{"generate.batch_size": 64})
    changes, fits = ways_to_fit(many)
    assert fits
    assert names_of(changes) == ["generate.batch_size"]
    size = changes[0].settings["generate.batch_size"]
    assert over(costs(8, **{"generate.batch_size": size})) == {}
    assert over(costs(8, **{"generate.batch_size": 2 * size})) != {}


def test_recomputing_comes_before_smaller_batches_and_those_before_quantising() -> None:
    changes, fits = ways_to_fit(costs(8, **{"train.gradient_checkpointing": "none", "train.method": "lora"}))
    assert fits
    assert names_of(changes) == ["train.gradient_checkpointing"]
    assert "1.3" in changes[0].time
    big = {"train.gradient_checkpointing": "all", "train.micro_batch_size": 16, "train.grad_accum_steps": 2}
    changes, fits = ways_to_fit(costs(8, **big))
    assert fits
    assert names_of(changes) == ["train.micro_batch_size", "train.grad_accum_steps"]
    settings = changes[0].settings
    assert settings["train.micro_batch_size"] * settings["train.grad_accum_steps"] == 32
    changes, fits = ways_to_fit(
        costs(6, **{"train.method": "lora", "train.gradient_checkpointing": "all", **ONE, "generate.batch_size": 1})
    )
    assert fits
    assert names_of(changes) == ["train.method"]


def test_models_one_at_a_time_before_anything_slower() -> None:
    changes, fits = ways_to_fit(costs(8, **{"engine.resident": "always", "train.gradient_checkpointing": "all"}))
    assert fits
    assert names_of(changes) == ["engine.resident"]
    # Cheaper, and it helps; but once models come one at a time, it is not needed.
    whole = {"engine.resident": "always", "engine.vae_tiling": "never", "train.gradient_checkpointing": "all"}
    changes, fits = ways_to_fit(costs(8, **whole))
    assert fits
    assert names_of(changes) == ["engine.resident"]


def test_where_nothing_helps_that_is_said() -> None:
    changes, fits = ways_to_fit(costs(2))
    assert not fits
    assert names_of(changes)
    assert over(replace(costs(2), settings=with_changes(costs(2).settings, changes[0].settings)))
    assert all(change.peak_gib > 1.5 for change in changes)


def test_drawing_in_nf4_comes_after_smaller_batches_and_before_changes_of_the_training() -> None:
    changes, fits = ways_to_fit(costs(6))
    assert (names_of(changes), fits) == (["generate.batch_size"], True)
    changes, fits = ways_to_fit(costs(4))
    # Strips help only beside the smaller UNet.
    assert (names_of(changes), fits) == (["engine.vae_tiling", "generate.unet"], True)
    assert changes[-1].options() == ["--set generate.unet=nf4"]
    assert "other pictures" in changes[-1].time
    # The last resort is another training.
    assert names_of(ways_to_fit(costs(3))[0])[:2] == ["generate.batch_size", "generate.unet"]


def test_peaks_of_drawing_in_nf4() -> None:
    strips = {"engine.vae_tiling": "always"}
    dense, nf4 = costs(24, **strips), costs(24, **strips, **{"generate.unet": "nf4"})
    assert dense.unet_weights() == dense.dense_unet_weights() == nf4.dense_unet_weights()
    saved = dense.unet_weights() - nf4.unet_weights()
    assert saved / GIB == pytest.approx(4.78 - 1.24, abs=0.01)
    before, after = dense.peaks(), nf4.peaks()
    assert before["generate"].allocated - after["generate"].allocated == pytest.approx(saved)  # type: ignore[union-attr]
    assert "NF4 UNet" in after["generate"].what  # type: ignore[union-attr]
    assert after["train"] == before["train"]
    # The adapter is not in bf16 beside NF4.
    lora = published_lora_parameters(rank=dense.settings.train.rank)
    assert nf4.drawing_peak().allocated - after["generate"].allocated == 4 * lora  # type: ignore[union-attr]
    assert dense.drawing_peak().allocated - before["generate"].allocated == 2 * lora  # type: ignore[union-attr]


def test_a_resident_nf4_unet_gives_way_to_a_dense_one_for_training() -> None:
    """Where models stay, training quantises on the device: that needs the room that drawing in NF4 does not."""
    stays = {"engine.resident": "always", "generate.batch_size": 1, "train.gradient_checkpointing": "all"}
    dense, nf4 = costs(24, **stays), costs(24, **stays, **{"generate.unet": "nf4"})
    assert nf4.peaks()["train"] == dense.peaks()["train"]
    assert nf4.peaks()["train"].allocated > nf4.dense_unet_weights()  # type: ignore[union-attr]


def published_lora_parameters(*, rank: int) -> int:
    return lora_parameters(published.UNET, rank=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


# ---- counts, disk, time


def counted(acceptance: float | None = 0.5, **changes: Any) -> Any:
    tiny = load_settings("tiny", None, ["filter.select=first", "generate.max_images=null"])
    return amounts(with_changes(tiny, changes), acceptance=acceptance)


def test_images_follow_from_samples_and_acceptance() -> None:
    made = counted(**{"filter.target_samples": 96, "expand.variants": 3, "filter.block_groups": 16})
    # 96 samples of 3 x 0.5 a prompt are 64 prompts, four whole blocks, each with its base image.
    assert (made.groups, made.images, made.accepted) == (64, 256, 96)
    assert counted(**{"filter.target_samples": 97}).groups == 80
    assert counted(**{"filter.target_samples": 9000}).groups == 400
    assert counted(**{"filter.select": "top"}).groups == 400
    assert counted(**{"generate.max_images": 100}).images == 100
    assert counted(**{"train.condition_on": "both"}).texts == 201


def test_an_assumption_is_named() -> None:
    assert f"{ASSUMED_ACCEPTANCE:.0%}" in counted(None).notes[0]
    assert counted(0.5).notes == ()
    assert "9000" in counted(**{"filter.target_samples": 9000}).notes[0]
    assert "cannot be counted" in counted(**{"prompts.file": "/not/there.txt"}).notes[0]


def test_disk_counts_candidates_and_checkpoints() -> None:
    planned = costs(24)
    disk = disk_bytes(planned, counted())
    images = counted().images
    assert disk["generate"] == images * (int(1024 * 1024 * 1.8) + 128 * 128 * 4 * 4)
    adapter = 4 * 2 * 23_224_320  # rank 32
    assert 3 * adapter < disk["train"] < 6 * adapter
    assert disk["export"] == adapter // 2  # float16
    full = disk_bytes(costs(80, **{"train.method": "full"}), counted())
    assert full["train"] > 3 * 10 * 10**9


def probe_of(**changes: Any) -> Probe:
    values: dict[str, Any] = {
        "device": "a card", "copy_gbps": 1000.0, "matrix_tflops": 500.0, "launch_us": 5.0, "train_s": 0.1,
        "update_s": 0.01, "denoise_s": 0.4, "denoise_plain_s": 0.2, "decode_s": 0.1, "png_s": 0.05,
        "rate_flops": 300e12, "measured": 9, "shapes": 9, "seconds": 3.0,
    }  # fmt: skip
    return Probe(**{**values, **changes})


def test_time_adds_up_what_was_measured() -> None:
    planned = costs(24, **{"train.sample_every": 0, "train.steps": 100, "train.grad_accum_steps": 4})
    made = counted()
    times = seconds(planned, made, probe_of())
    steps = planned.settings.generate.num_inference_steps
    image = steps * 0.4 / 4 + 0.1 + 0.05
    assert times["train"] == pytest.approx(100 * (4 * 0.1 + 0.01), abs=6)
    assert times["generate"] == pytest.approx(made.images * image, rel=0.05)
    half = seconds(costs(24, **{"generate.guidance_interval": [0.0, 0.5]}), made, probe_of())
    assert half["generate"] == pytest.approx(made.images * (steps * 0.3 / 4 + 0.15), rel=0.05)  # type: ignore[operator]
    assert times["filter"] == 0.0


# ---- an existing run


CHANGES: list[tuple[str, Any, str]] = [
    ("train.rank", 8, "train"),
    ("train.steps", 7, "train"),
    ("train.checkpoint_every", 3, "report"),
    ("train.weighting", "uniform", "cache"),
    ("generate.guidance_scale", 3.0, "generate"),
    ("generate.batch_size", 3, "report"),
    ("filter.target_samples", 5, "filter"),
    ("score.prompt", "expanded", "score"),
    ("score.batch_size", 3, "report"),
    ("score.dtype", "bfloat16", "score"),
    ("score.lazy", False, "report"),
    ("generate.max_images", 9, "filter"),
    ("expand.timeout_s", 9.0, "report"),
    ("expand.variants", 2, "expand"),
    ("export.dtype", "float16", "export"),
    ("evaluate.prompts", 3, "evaluate"),
    ("model.dtype", "bfloat16", "generate"),
    ("seed", 3, "expand"),
]


@pytest.mark.parametrize(("key", "value", "first"), CHANGES)
def test_stale_is_what_the_pipeline_would_find_stale(key: str, value: Any, first: str, tmp_path: Path) -> None:
    before = load_settings("tiny")
    after = Settings.model_validate({**before.model_dump(), "seed": value}) if key == "seed" else None
    after = after or with_changes(before, {key: value})

    def keys(settings: Settings) -> dict[str, str]:
        real = input_keys(settings, tmp_path)
        later = output_keys(settings, real, "selection")
        return {name: {**vars(real), **vars(later)}[name] for name in STAGES}

    old, new = settings_by_stage(before), settings_by_stage(after)
    changed = [name for name in STAGES if old[name] != new[name]]
    real_old, real_new = keys(before), keys(after)
    assert changed == [name for name in STAGES if real_old[name] != real_new[name]]
    assert changed[0] == first


def a_run(root: Path, settings: Settings) -> None:
    with open_run(root, create=True) as run:
        for name in ("expand", "generate", "score", "filter"):
            run.manifest.begin_stage(name, name)
            info = {"acceptance": {"all": 0.2}} if name == "filter" else {}
            run.manifest.finish_stage(name, name, 1.0, 0.5, info)
        run.manifest.set_meta("keys", json.dumps({name: name for name in STAGES}))
        (root / CONFIG_NAME).write_text(render_yaml(settings), encoding="utf-8")


def test_a_run_tells_its_states_and_its_acceptance(tmp_path: Path) -> None:
    settings = load_settings("tiny")
    a_run(tmp_path / "run", settings)
    known = known_of(tmp_path / "run", settings)
    assert [known.states[name] for name in STAGES[:5]] == ["done"] * 4 + ["new"]
    assert known.acceptance == 0.2
    changed = known_of(tmp_path / "run", with_changes(settings, {"score.prompt": "expanded"}))
    assert [changed.states[name] for name in STAGES[:5]] == ["done", "done", "stale", "stale", "new"]
    assert known_of(tmp_path / "none", settings).states == {}


def test_done_stages_cost_nothing_and_the_runs_own_rate_counts(tmp_path: Path) -> None:
    settings = load_settings("tiny", None, ["filter.select=first", "generate.max_images=null"])
    a_run(tmp_path / "run", settings)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    found = plan(tmp_path / "run", settings, probing=False)
    rows = {stage.name: stage for stage in found.stages}
    assert (rows["generate"].state, rows["generate"].seconds, rows["generate"].disk_gib) == ("done", 0.0, 0.0)
    assert rows["train"].state == "new"
    assert rows["train"].seconds is None
    assert found.made.groups == 176  # 100 samples of 3 x 0.2 a prompt, in blocks of 16
    assert not any("assumed" in note for note in found.notes)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == before


# ---- the whole


def planned(tmp_path: Path, gib: float, **changes: Any) -> Plan:
    settings = with_changes(sdxl(**changes), {"model.path": "nobody/sdxl"})
    return plan(tmp_path / "run", settings, machine=card(gib))


def test_a_plan_writes_nothing_and_says_what_it_assumed(tmp_path: Path) -> None:
    found = planned(tmp_path, 24, **{"train.method": "auto", "engine.resident": "auto"})
    assert list(tmp_path.iterdir()) == []
    assert found.fits
    assert found.can_fit
    assert found.changes == ()
    assert found.options == []
    text = " ".join(found.notes)
    assert "nobody/sdxl" in text
    assert "train.method: lora" in text
    assert "assumed" in text
    assert found.disk_fits == (found.disk_gib <= found.disk_free_gib)
    assert found.disk_free_gib == pytest.approx(free_disk(tmp_path) / GIB, rel=0.05)
    assert not found.timed


def test_a_plan_that_does_not_fit_names_the_command_that_would(tmp_path: Path) -> None:
    found = planned(tmp_path, 8, **{"generate.batch_size": 64})
    assert not found.fits
    assert found.can_fit
    data = json.loads(json.dumps(plan_data(found, lambda options: " ".join(["run", *options]))))
    assert data["command"].startswith("run --set generate.batch_size=")
    assert data["changes"][0]["peak_gib"] < 8
    assert [stage["name"] for stage in data["stages"]] == list(STAGES)
    assert not {stage["name"]: stage for stage in data["stages"]}["generate"]["fits"]
    assert data["probe"] is None


def test_a_cap_above_the_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than the GPU"):
        planned(tmp_path, 8, **{"engine.vram_gib": 10.0})
