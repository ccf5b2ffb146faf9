"""The formulas against the real network: exact counts, and bytes alive on the meta device and on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.lean import lean_activations
from craft_fast.qlora.lora import add_lora
from craft_fast.qlora.nf4 import quantized_bytes
from craft_fast.qlora.recompute import recompute, unit_names
from craft_fast.sdxl import costs
from craft_fast.sdxl.costs import TARGETS
from craft_fast.sdxl.published import UNET, UNET_PARAMETERS, random_unet
from craft_fast.tiny.architecture import build_unet
from tests.unit.live_bytes import LiveBytes, flash_attention

TOLERANCE = 0.05
FULL = {"height_px": 1024, "width_px": 1024, "batch": 1}


@pytest.fixture(scope="module")
def plain() -> Any:
    return random_unet(device="meta", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapted() -> Any:
    unet = random_unet(device="meta", dtype=torch.bfloat16)
    add_lora(unet, rank=16, lora_alpha=16, target_modules=list(TARGETS), seed=0, fused=True)
    return unet.train()


def inputs(unet: Any, batch: int, height: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the UNet reads; latents of ``height`` x ``width``."""
    device = next(unet.parameters()).device
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    made = {"device": device, "dtype": dtype}
    return {
        "sample": torch.zeros(batch, 4, height, width, **made),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
        "encoder_hidden_states": torch.zeros(batch, tokens, config.cross_attention_dim, **made),
        "added_cond_kwargs": {
            "text_embeds": torch.zeros(batch, pooled, **made),
            "time_ids": torch.zeros(batch, 6, **made),
        },
        "return_dict": False,
    }


def trained(unet: Any, given: dict[str, Any]) -> LiveBytes:
    """What forward and backward take: most bytes alive, gradients of the adapters included, inputs and weights not."""
    with LiveBytes() as live, flash_attention():
        prediction = [unet(**given)[0]]
        prediction.pop().float().square().sum().backward()
    for parameter in unet.parameters():
        parameter.grad = None
    return live


def live_peak(unet: Any, given: dict[str, Any]) -> int:
    return trained(unet, given).peak


@pytest.fixture(scope="module")
def full_pass(adapted: Any) -> Callable[[int, int, tuple[str, ...]], LiveBytes]:
    """``full_pass(batch, side_px, kept)``: a training pass of the full SDXL, each done once; they take 3 s."""

    @functools.cache
    def measured(batch: int, side_px: int, kept: tuple[str, ...]) -> LiveBytes:
        recompute(adapted, kept)
        return trained(adapted, inputs(adapted, batch, side_px // 8, side_px // 8, 77, torch.bfloat16))

    return measured


def estimate(config: Any, kept: Sequence[str] | None, *, batch: int, side_px: int, **options: Any) -> int:
    setup = costs.unet_setup(
        height_px=side_px, width_px=side_px, batch=batch, workspaces=False,
        **{"method": "lora", "optimizer": "bitsandbytes", **options},
    )  # fmt: skip
    return costs.unet_pass(config, setup, kept).peak_bytes


KEPT = {
    "all": lambda name: True,
    "none": lambda name: False,
    "resnets": lambda name: ".resnets." in name,
    "the lowest level": lambda name: "mid_block" in name or "up_blocks.0" in name or "down_blocks.2" in name,
    "every other": lambda name: sum(map(ord, name)) % 2 == 0,
}


CASES = [*((1, 1024, kept) for kept in KEPT), (4, 1024, "none"), (4, 1024, "every other"), (1, 768, "all")]


@pytest.mark.parametrize(("batch", "side_px", "kept"), CASES)
def test_training_memory_of_the_full_sdxl_is_what_is_alive(
    adapted: Any, full_pass: Any, batch: int, side_px: int, kept: str
) -> None:
    names = [name for name in unit_names(adapted) if KEPT[kept](name)]
    measured = full_pass(batch, side_px, tuple(names)).peak
    found = estimate(UNET, names, batch=batch, side_px=side_px)
    assert found == pytest.approx(measured, rel=TOLERANCE), (found / 1e6, measured / 1e6)


@pytest.fixture(scope="module")
def lean() -> Any:
    unet = random_unet(device="meta", dtype=torch.bfloat16)
    add_lora(unet, rank=16, lora_alpha=16, target_modules=list(TARGETS), seed=0, fused=True)
    lean_activations(unet.train(), impl="torch")
    return unet


@pytest.mark.parametrize("kept", ["all", "none", "every other"])
def test_training_memory_of_lean_blocks(lean: Any, kept: str) -> None:
    names = [name for name in unit_names(lean) if KEPT[kept](name)]
    recompute(lean, names)
    measured = live_peak(lean, inputs(lean, 1, 128, 128, 77, torch.bfloat16))
    found = estimate(UNET, names, batch=1, side_px=1024, lean="torch")
    assert found == pytest.approx(measured, rel=TOLERANCE), (found / 1e6, measured / 1e6)


@pytest.mark.parametrize(("batch", "side_px"), [(1, 1024), (4, 768)])
def test_memory_of_a_forward_without_gradients(plain: Any, batch: int, side_px: int) -> None:
    given = inputs(plain, batch, side_px // 8, side_px // 8, 77, torch.bfloat16)
    with LiveBytes() as live, flash_attention(), torch.no_grad():
        plain(**given)
    found = estimate(UNET, None, batch=batch, side_px=side_px, method=None)
    assert found == pytest.approx(live.peak, rel=TOLERANCE), (found / 1e6, live.peak / 1e6)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
@pytest.mark.parametrize("kept", ["all", "none", "resnets"])
def test_training_memory_of_the_tiny_unet_in_float32(kept: str, fused: bool) -> None:
    unet = build_unet()
    add_lora(unet, rank=4, lora_alpha=4, target_modules=list(TARGETS), seed=0, fused=fused)
    names = [name for name in unit_names(unet) if KEPT[kept](name)]
    recompute(unet.train(), names)
    measured = live_peak(unet, inputs(unet, 8, 16, 16, 24, torch.float32))
    found = estimate(
        unet.config, names, batch=8, side_px=64, vae_scale_factor=4, tokens=24, dtype_bytes=4, rank=4,
        lora="fused" if fused else "peft",
    )  # fmt: skip
    assert found == pytest.approx(measured, rel=TOLERANCE), (found / 1e6, measured / 1e6)


@pytest.mark.parametrize("convs", [False, True])
@pytest.mark.parametrize("kept", ["all", "none"])
def test_training_memory_of_the_tiny_unet_in_nf4(kept: str, convs: bool) -> None:
    unet = build_unet()
    prepare_unet(
        unet, method="qlora", dtype=torch.float32, rank=4, lora_alpha=4, target_modules=list(TARGETS), seed=0,
        nf4_convs=convs, fused_lora=True,
    )  # fmt: skip
    names = [name for name in unit_names(unet) if KEPT[kept](name)]
    recompute(unet, names)
    measured = live_peak(unet, inputs(unet, 8, 16, 16, 24, torch.float32))
    found = estimate(
        unet.config, names, batch=8, side_px=64, vae_scale_factor=4, tokens=24, dtype_bytes=4, rank=4, method="qlora",
        nf4_convs=convs,
    )  # fmt: skip
    assert found == pytest.approx(measured, rel=TOLERANCE), (found / 1e6, measured / 1e6)


def test_other_targets_keep_what_they_read(adapted: Any) -> None:
    targets = [*TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    unet = random_unet(device="meta", dtype=torch.bfloat16)
    add_lora(unet, rank=64, lora_alpha=16, target_modules=targets, seed=0, fused=True)
    measured = live_peak(unet.train(), inputs(unet, 1, 128, 128, 77, torch.bfloat16))
    found = estimate(UNET, None, batch=1, side_px=1024, target_modules=targets, rank=64)
    assert found == pytest.approx(measured, rel=TOLERANCE), (found / 1e6, measured / 1e6)
    count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert costs.lora_parameters(UNET, rank=64, target_modules=targets) == count


def test_flops_and_parameters_are_those_of_the_network(plain: Any) -> None:
    with FlopCounterMode(display=False) as counter, flash_attention(), torch.no_grad():
        plain(**inputs(plain, 1, 128, 128, 77, torch.bfloat16))
    found = costs.unet_pass(UNET, costs.unet_setup(**FULL)).forward_flops
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert found == pytest.approx(6.76e12, rel=0.001)
    assert costs.parameters(UNET) == UNET_PARAMETERS == sum(p.numel() for p in plain.parameters())


def test_flops_of_training_and_of_recomputing(adapted: Any, full_pass: Any) -> None:
    setup = costs.unet_setup(**FULL, method="lora")
    names = unit_names(adapted)
    with_it, without = costs.step_flops(UNET, setup=setup, kept=())
    assert without == pytest.approx(full_pass(1, 1024, tuple(names)).flops, rel=0.01)
    assert with_it == pytest.approx(full_pass(1, 1024, ()).flops, rel=0.01)
    assert with_it > 1.25 * without


def test_units_and_adapters_are_those_of_the_network(adapted: Any) -> None:
    assert sorted(costs.unit_names(UNET)) == sorted(unit_names(adapted))
    assert [unit.name for unit in costs.units(UNET, **FULL)] == list(costs.unit_names(UNET))
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert costs.lora_parameters(UNET, rank=16, target_modules=TARGETS) == sum(trained) == 23_224_320
    assert len(costs.adapted_layers(UNET, TARGETS)) == 560


@pytest.mark.parametrize(("convs", "gigabytes"), [(False, 1.82), (True, 1.33)])
def test_weights_in_nf4(plain: Any, convs: bool, gigabytes: float) -> None:
    found = costs.unet_weight_bytes(UNET, "qlora", convs)
    assert found == quantized_bytes(plain, dtype=torch.bfloat16, convs=convs)
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert costs.unet_weight_bytes(UNET, "lora") == 2 * UNET_PARAMETERS


def test_optimizer_state_is_what_is_allocated() -> None:
    from craft_fast.qlora.optim import make_optimizer

    sizes = (100, 4096, 10_000, 65_536)
    params = {str(size): torch.nn.Parameter(torch.zeros(size)) for size in sizes}
    optimizer = make_optimizer(params, kind="flat", lr=1e-3, weight_decay=0.0, max_grad_norm=1.0)
    tensors = optimizer.state_tensors()
    held = sum(
        t.numel() * t.element_size()
        for name, t in tensors.items()
        if name.rpartition(".")[2] in ("state1", "state2", "absmax1", "absmax2")
    )
    assert costs.optimizer_bytes(sizes) == pytest.approx(held, rel=0.01)


def test_a_unit_alone_costs_what_it_costs_in_the_network() -> None:
    setup = costs.unet_setup(**FULL, method="lora", optimizer="bitsandbytes", workspaces=False)
    per_unit = {unit.name: unit for unit in costs.units(UNET, **FULL, optimizer="bitsandbytes", workspaces=False)}
    everything = costs.unet_pass(UNET, setup, None).peak_bytes
    name = "down_blocks.1.attentions.0.transformer_blocks.1"
    without_one = [other for other in per_unit if other != name]
    saved = everything - costs.unet_pass(UNET, setup, without_one).peak_bytes
    assert per_unit[name].saved_bytes == pytest.approx(saved, rel=0.02)
    # 22 tensors of 4096 x 640 in bfloat16, and what the adapter keeps.
    assert per_unit[name].saved_bytes == pytest.approx(22 * 4096 * 640 * 2, rel=0.03)
    # Before the first adapter no gradient is wanted, so nothing is kept.
    assert per_unit["down_blocks.0.resnets.0"].saved_bytes == 0


BUDGETS_GIB = (0.1, 2.0, 2.6, 2.8, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 24.0)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("batch", [1, 4])
def test_kept_units_grow_with_the_budget_and_never_exceed_it(method: Any, batch: int) -> None:
    what: dict[str, Any] = {"height_px": 1024, "width_px": 1024, "micro_batch": batch, "method": method}
    least = costs.training_memory(UNET, kept=(), **what).reserved
    before: set[str] = set()
    for gib in BUDGETS_GIB:
        kept = costs.choose_kept(UNET, budget_bytes=gib * 2**30, **what)
        memory = costs.training_memory(UNET, kept=kept, **what)
        assert memory.reserved <= max(gib * 2**30, least)
        assert before <= set(kept)
        before = set(kept)
    everything = costs.choose_kept(UNET, budget_bytes=float("inf"), **what)
    assert everything == costs.unit_names(UNET)


def test_what_saves_most_time_a_byte_is_kept_first() -> None:
    units = costs.units(UNET, **FULL)
    order = [unit for unit in costs.by_worth(units) if unit.saved_bytes]
    worth = [unit.flops / unit.saved_bytes for unit in order]
    assert worth == sorted(worth, reverse=True)
    deep = [i for i, unit in enumerate(order) if unit.kind == "transformer" and "blocks.2" in unit.name]
    shallow = [i for i, unit in enumerate(order) if unit.kind == "transformer" and "down_blocks.1" in unit.name]
    assert max(deep) < min(shallow)
