"""Cases, figures, tables and the reference loop of ``bench sdxl``, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from craft_bench.baselines.diffusers_lora import DiffusersLora
from craft_bench.baselines.reward_towers import TINY, RewardTowers
from craft_bench.sdxl import measure
from craft_bench.sdxl.cases import GROUPS, OURS, REFERENCE, StepCase, choose_groups, generate_cases, step_cases
from craft_bench.sdxl.gates import GATES, METRICS, judge
from craft_bench.sdxl.headline import Recipe
from craft_bench.sdxl.problem import RANK, SEED, TARGET_MODULES, Cached, make_size, random_unet, sdxl_alphas_cumprod
from craft_bench.sdxl.table import failures, gate_table, image_table, loss_table, stage_table, step_table
from craft_fast.errors import UsageError
from craft_kernels.noise_and_target import counter_noise

CPU = torch.device("cpu")
ALL = {"batches": (1, 4, 8), "caps_gib": (4.0, 6.0, 24.0)}


# ---- cases


def test_the_reference_of_a_batch_comes_before_ours_of_it() -> None:
    seen: set[int] = set()
    for case in step_cases(["steps", "large"], **ALL):
        if case.impl == REFERENCE:
            seen.add(case.batch)
        assert case.batch in seen, case.label
    assert seen == {1, 4, 8}


@pytest.mark.parametrize("group", GROUPS)
def test_labels_of_a_group_are_unique(group: str) -> None:
    labels = [case.label for case in step_cases([group], **ALL)]
    labels += [case.label for case in generate_cases([group], batches=(4, 1))]
    assert len(set(labels)) == len(labels)
    assert labels or group == "headline"


def test_every_figure_of_a_step_has_its_case_and_a_quick_run_is_short() -> None:
    cases = step_cases(list(GROUPS), **ALL)
    for gate in GATES:
        if gate.where.get("name") == "step":
            rows = [_row(case) for case in cases if case.impl == OURS]
            assert any(gate.counts(row) for row in rows), gate.text
    assert len(step_cases(list(GROUPS), quick=True, **ALL)) <= 8


def test_caps_and_compilers_run_apart() -> None:
    cases = step_cases(list(GROUPS), **ALL)
    assert {case.group for case in cases if case.isolated} == {"caps", "compile"}
    assert all(case.isolated for case in cases if case.group in ("caps", "compile"))


def test_groups_keep_their_order_and_a_wrong_name_is_told() -> None:
    assert choose_groups([]) == list(GROUPS)
    assert choose_groups(["caps", "steps"]) == ["steps", "caps"]
    with pytest.raises(UsageError, match="no group") as told:
        choose_groups(["step"])
    assert "bench sdxl steps" in told.value.hint


# ---- figures


def _row(case: StepCase, **fields: Any) -> dict[str, Any]:
    return {
        "name": "step", "impl": case.impl, "case": case.name, "device": "h100", "problem": "full", "failed": None,
        "method": case.method, "batch": case.batch, "nf4_convs": case.nf4_convs, "recompute": case.recompute,
        "graph": case.graph, "compile": case.compile, "lora": case.lora, "optimizer": case.optimizer,
        "cap_gib": case.cap_gib, "kept_units": [9, 10], "p50_ms": 100.0, **fields,
    }  # fmt: skip


def _verdicts(*rows: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    return {reached.gate.text: (reached.measured, reached.verdict) for reached in judge(rows)}


def test_without_rows_nothing_is_measured() -> None:
    assert {verdict for _, verdict in _verdicts().values()} == {"not measured"}
    assert len(GATES) == 11
    assert {gate.metric for gate in GATES} == set(METRICS)


def test_a_peak_is_met_to_the_bound_and_not_above() -> None:
    case = StepCase("steps", 1, "qlora", recompute="all")
    text = "peak, NF4 QLoRA r=16, batch 1"
    assert _verdicts(_row(case, peak_gib=4.0))[text] == (4.0, "met")
    assert _verdicts(_row(case, peak_gib=4.01))[text] == (4.01, "not met")


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu"}, {"problem": "tiny"}, {"failed": "out of memory"}, {"cap_gib": 4.0}, {"nf4_convs": True},
     {"impl": REFERENCE}, {"batch": 4}, {"graph": False}],
)  # fmt: skip
def test_rows_of_something_else_do_not_count(other: dict[str, Any]) -> None:
    row = _row(StepCase("steps", 1, "qlora", recompute="all"), peak_gib=3.0) | other
    assert _verdicts(row)["peak, NF4 QLoRA r=16, batch 1"] == (None, "not measured")


def test_the_worst_of_many_rows_counts_in_its_own_direction() -> None:
    rows = [_row(StepCase("steps", batch), mfu=share) for batch, share in ((4, 0.45), (8, 0.38), (1, 0.1))]
    assert _verdicts(*rows)["model-FLOP utilisation, batch 4 and more"] == (0.38, "not met")
    planned = [_row(StepCase("steps", 1), planned={"memory_error": error}) for error in (0.04, -0.06, 0.01)]
    assert _verdicts(*planned)["plan against measured: memory"] == (0.06, "not met")
    assert _verdicts(*planned)["plan against measured: time"] == (None, "not measured")


def test_nf4_is_held_against_bf16_of_the_same_settings() -> None:
    text = "NF4 step over bf16 step, same settings"
    bf16 = _row(StepCase("steps", 1), p50_ms=100.0)
    nf4 = _row(StepCase("steps", 1, "qlora"), p50_ms=130.0)
    assert _verdicts(bf16, nf4)[text] == (pytest.approx(1.3), "met")
    # Another number of recomputed units is another comparison.
    assert _verdicts(bf16, nf4 | {"kept_units": [1, 10]})[text] == (None, "not measured")
    assert _verdicts(bf16, _row(StepCase("steps", 4, "qlora"), p50_ms=130.0))[text] == (None, "not measured")


def test_a_speed_up_counts_only_where_losses_agreed() -> None:
    text = "step, batch 1, against the reference loop"
    assert _verdicts(_row(StepCase("steps", 1), versus={"reference": 3.1}))[text] == (3.1, "met")
    assert _verdicts(_row(StepCase("steps", 1), versus=None))[text] == (None, "not measured")


def test_tables_have_a_line_for_each_row_and_even_columns() -> None:
    done = _row(
        StepCase("steps", 1), p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, images_per_s=500.0, peak_gib=None, size=1,
        versus={"reference": 2.5}, losses=[1.0, 0.5], loss_difference=1e-4, mfu=0.4, hfu=0.4,
        planned={"memory_gib": 1.0, "step_ms": 2.0},
    )  # fmt: skip
    failed = _row(StepCase("steps", 4)) | {"failed": "out of memory"}
    image = {"name": "generate", "case": "B=4", "failed": None, "s_per_image": 0.9}
    stage = {"name": "stage", "case": "train", "failed": None, "seconds": 50.0, "how": "measured", "basis": "all"}
    rows = [done, failed, image, stage]
    for cells, count in ((step_table(rows), 3), (image_table(rows), 2), (stage_table(rows), 2), (loss_table(rows), 2)):
        assert len(cells) == count
        assert len({len(line) for line in cells}) == 1
    assert "2.50x" in step_table(rows)[1]
    assert step_table(rows)[2][1] == "failed"
    assert failures([failed, failed, done]) == [
        f"failed, out of memory: ours step {failed['case']}; ours step {failed['case']}"
    ]
    assert len(gate_table(judge(rows))) == len(GATES) + 1
    assert step_table([]) == image_table([]) == stage_table([]) == loss_table([]) == []


# ---- measuring


def test_steps_are_counted_warmed_up_and_timed() -> None:
    seen: list[tuple[str, int]] = []

    def first(number: int) -> float:
        seen.append(("first", number))
        return float(number)

    def timed(number: int) -> float:
        seen.append(("timed", number))
        return 0.0

    effort = measure.Effort(losses=3, fewest=2, most=4, seconds=1e9)
    found = measure.steps(first, CPU, effort, timed=timed)
    assert found.losses == [0.0, 1.0, 2.0]
    assert seen == [("first", 0), ("first", 1), ("first", 2), *(("timed", 3 + i) for i in range(4))]
    assert found.timed == 4
    assert found.p20_ms <= found.p50_ms <= found.p80_ms
    hurried = measure.Effort(losses=1, fewest=2, most=100, seconds=0.0)
    assert measure.steps(lambda _: 0.0, CPU, hurried).timed == 2


def test_percentiles_and_differences() -> None:
    assert measure.percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert measure.largest_relative_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="argument"):
        measure.largest_relative_difference([1.0], [1.0, 2.0])


# ---- the work


def test_the_schedule_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.equal(sdxl_alphas_cumprod(), theirs)


def test_inputs_are_a_function_of_batch_and_step() -> None:
    size = make_size("tiny")
    first, second = (Cached(size, CPU, torch.float32).step(4, 7) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.timesteps, second.timesteps)
    other = Cached(size, CPU, torch.float32).step(4, 8)
    assert not torch.equal(first.latents, other.latents)
    assert not torch.equal(first.timesteps, other.timesteps)
    assert first.latents.shape == (4, 4, size.latent_side, size.latent_side)
    assert len(set(first.noise_ids.tolist())) == 4


def test_the_full_size_is_sdxl_at_1024() -> None:
    size = make_size("full")
    assert (size.latent_side, size.pooled_width, size.tokens, size.batches) == (128, 1280, 77, (1, 4, 8))


# ---- the reference loop


def reference(seed: int = SEED) -> DiffusersLora:
    return DiffusersLora(
        random_unet(make_size("tiny"), CPU, torch.float32), dtype=torch.float32, rank=RANK,
        target_modules=TARGET_MODULES, learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0, seed=seed,
    )  # fmt: skip


def test_the_reference_trains_its_adapter_alone_on_the_noise_it_is_given() -> None:
    loop, cached = reference(), Cached(make_size("tiny"), CPU, torch.float32)
    x = cached.step(2, 0)
    base = {name: p.detach().clone() for name, p in loop.unet.named_parameters()}

    def step(noise: torch.Tensor | None) -> float:
        return loop.step(x.latents, x.prompt_embeds, x.pooled_prompt_embeds, x.timesteps, cached.time_ids, noise)

    noise = counter_noise(x.noise_ids, x.latents.shape[1:], seed=x.noise_seed, step=0)
    first, again, other = step(noise), step(noise), step(None)
    assert first == pytest.approx(again, rel=0.05)
    assert first != again  # the adapter moved in between
    assert other != pytest.approx(again, rel=1e-4)
    moved = {name for name, p in loop.unet.named_parameters() if not torch.equal(p, base[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert all(p.grad is None for p in loop.parameters.values())


def test_towers_see_each_image_by_itself() -> None:
    towers = RewardTowers(TINY, device=CPU)
    images = torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = towers(images)
    assert found.shape == (3, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(towers(images[1:2])[0], found[1])
    assert len({round(float(value), 5) for value in found[:, 0]}) == 3


def test_a_recipe_counts_images_and_texts() -> None:
    recipe = Recipe(samples=100, variants=4, accepted=0.25, eval_prompts=16)
    assert (recipe.groups, recipe.images, recipe.texts) == (100, 500, 517)
