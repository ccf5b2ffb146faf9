"""The probe against the model itself, on this CPU: within a factor, since others use it too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from craft_fast.budget import machine_of, with_changes
from craft_fast.plan.stages import Costs
from craft_fast.probe import Probe, probe
from craft_fast.probe.clock import Clock
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.sdxl.load import load_sdxl
from craft_fast.settings_io import load_settings

FACTOR = 2.0
CPU = torch.device("cpu")


def planned(**changes: Any) -> Costs:
    settings = with_changes(load_settings("tiny"), {"train.micro_batch_size": 8, "generate.batch_size": 8, **changes})
    return Costs.of(settings, machine_of(CPU))


@pytest.fixture(scope="module")
def measured() -> Probe:
    return probe(planned(), deadline_s=6)


def median(run: Callable[[], Any], times: int = 5) -> float:
    run()
    taken = []
    for _ in range(times):
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return sorted(taken)[times // 2]


def inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.zeros(batch, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(batch, 32, 128),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, 64), "time_ids": torch.zeros(batch, 6)},
        "return_dict": False,
    }


def within(found: float, real: float) -> bool:
    return real / FACTOR <= found <= real * FACTOR


def test_times_are_those_of_the_model_itself(measured: Probe) -> None:
    costs = planned()
    model = load_sdxl(costs.settings.model.path, device="cpu")
    unet = model.unet
    with torch.inference_mode():
        one, both, decode = inputs(8), inputs(16), torch.randn(1, 4, 16, 16)
        assert within(measured.denoise_plain_s, median(lambda: unet(**one)))
        assert within(measured.denoise_s, median(lambda: unet(**both)))
        assert within(measured.decode_s or 0.0, median(lambda: model.vae.decode(decode)))
    train = costs.settings.train
    prepare_unet(
        unet, method="qlora", dtype=torch.float32, rank=train.rank, lora_alpha=train.lora_alpha,
        target_modules=train.target_modules, seed=0,
    )  # fmt: skip
    given = inputs(8)
    assert within(measured.train_s, median(lambda: unet(**given)[0].square().mean().backward()))


def test_everything_was_measured_and_is_json(measured: Probe) -> None:
    assert measured.measured == measured.shapes > 5
    data = json.loads(json.dumps(measured.data()))
    assert all(value > 0 for name, value in data.items() if name not in ("device", "update_s"))
    assert "CPU" in data["device"]
    # A sanity check of rates: the blocks can not outrun the largest product by much, nor crawl.
    assert 0.02 < measured.rate_flops / measured.matrix_tflops / 1e12 < 3


def test_it_ends_at_its_deadline_and_scales_what_it_did_not_get_to(measured: Probe) -> None:
    before = time.perf_counter()
    hurried = probe(planned(), deadline_s=0.0)
    assert time.perf_counter() - before < 10
    assert 1 <= hurried.measured < hurried.shapes
    assert hurried.decode_s is None
    # One block stands for all: the order of magnitude must be right.
    assert measured.train_s / 5 < hurried.train_s < measured.train_s * 5


def test_recomputation_costs_time(measured: Probe) -> None:
    again = probe(planned(**{"train.gradient_checkpointing": "all"}), deadline_s=6)
    without = planned(**{"train.gradient_checkpointing": "none"})
    assert without.kept
    assert not planned(**{"train.gradient_checkpointing": "all"}).kept
    assert again.train_s > 1.05 * measured.train_s


def test_drawing_in_nf4_is_measured_as_such_and_training_is_not_touched() -> None:
    from craft_fast.probe.blocks import Blocks

    found = planned(**{"generate.unet": "nf4"})
    blocks = Blocks(found, Clock(CPU, time.perf_counter() + 10))
    kinds: list[set[str]] = []
    timed = blocks._time

    def spy(unit: Any, *args: Any, **options: Any) -> float:
        kinds.append({type(module).__name__ for module in blocks.holder.modules()})
        return timed(unit, *args, **options)

    blocks._time = spy  # type: ignore[method-assign]
    took, _ = blocks.denoise(8, 0.2)
    assert took > 0
    drawing, kinds[:] = list(kinds), []
    assert all({"NF4Conv2d", "FlatLinear4bit"} & kind and "Linear" not in kind for kind in drawing)
    blocks.train(0.2)
    assert not any("NF4Conv2d" in kind for kind in kinds)  # train.nf4_convs is off


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe(planned(), deadline_s=0.0)
    assert torch.equal(torch.rand(3), expected)


def test_a_clock_times_short_work_many_at_once() -> None:
    clock = Clock(CPU, time.perf_counter() + 10)
    found = clock.time(lambda: time.sleep(0.001), slice_s=0.1)
    assert 0.001 <= found < 0.01
    assert clock.time(lambda: time.sleep(0.02), slice_s=0.0) >= 0.02
