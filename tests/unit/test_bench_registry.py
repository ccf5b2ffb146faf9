"""What is measured: every op has cases, every figure asked for has cases, and the sizes are SDXL's."""

from __future__ import annotations

import math

import pytest
import torch

from craft_bench import registry
from craft_bench.cases.adamw8bit import attention_lora
from craft_bench.gates import GATES
from craft_bench.registry import MODES, OPS, Case
from craft_fast.errors import UsageError


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [case for op in OPS for case in registry.load_cases(op)]


@pytest.mark.parametrize(("typed", "meant"), [("geglue", "geglu"), ("lora", "lora_linear"), ("nf4", "nf4_dequantize")])
def test_an_unknown_op_is_refused_with_the_closest_name(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as refused:
        registry.choose_ops(["geglu", typed])
    assert typed in refused.value.what
    assert all(op in refused.value.why for op in OPS)
    assert meant in refused.value.hint


def test_named_ops_come_in_the_registrys_order_and_no_name_means_all() -> None:
    assert registry.choose_ops(["geglu", "lora_linear", "geglu"]) == ["lora_linear", "geglu"]
    assert registry.choose_ops([]) == list(OPS)


def test_every_op_has_cases_and_some_for_a_quick_run(cases: list[Case]) -> None:
    for op in OPS:
        mine = [case for case in cases if case.op == op]
        assert 2 <= len(mine) == len({case.label for case in mine})
        assert any(case.quick for case in mine)
        assert all(case.traffic and set(case.traffic) <= set(MODES) and min(case.traffic.values()) > 0 for case in mine)


def test_every_figure_has_cases_and_its_rival_is_in_them(cases: list[Case]) -> None:
    for gate in GATES:
        mine = [case for case in cases if gate.covers(case)]
        assert mine, gate
        assert gate.rival is None or all(gate.rival in case.rivals for case in mine), gate
    # Each size of the loss is held against torch.compile, in training's dtype.
    slower = next(gate for gate in GATES if gate.rival == "compile")
    assert {case.size for case in cases if slower.covers(case)} == {65536 * b for b in (1, 8, 64, 512, 2048, 4096)}


def test_the_loss_is_swept_from_1_to_4096_samples_and_bandwidth_is_judged_from_2_to_the_27(cases: list[Case]) -> None:
    sizes = [case.size for case in cases if case.op == "weighted_noise_loss" and case.dtype == "bfloat16"]
    assert sizes == [65536 * batch for batch in (1, 8, 64, 512, 2048, 4096)]
    judged = next(gate for gate in GATES if gate.op == "weighted_noise_loss" and gate.metric == "copy_fraction")
    assert {case.size for case in cases if judged.covers(case)} == {2**27, 2**28}


def test_the_optimizers_tensors_are_those_of_an_attention_lora() -> None:
    shapes = attention_lora(16)
    assert len(shapes) == 1120  # 560 linear layers
    assert sum(math.prod(shape) for shape in shapes) == 23_224_320
    assert sum(math.prod(shape) for shape in attention_lora(64)) == 4 * 23_224_320


@pytest.mark.parametrize("op", OPS)
def test_what_a_cpu_can_run_of_the_first_quick_case_is_right(op: str) -> None:
    from craft_bench import check

    case = next(case for case in registry.load_cases(op) if case.quick)
    problem = case.build(torch.device("cpu"))
    exact = problem.exact()
    eager = check.errors(check.results(problem.forms["eager"]()), exact)
    assert len(problem.forms["eager"]().grads) == (1 if "backward" in case.traffic else 0)
    for impl in (*case.rivals, *case.ours):
        if impl in ("compile", "liger") or not registry.runs_on(impl, "cpu"):
            continue
        slack = 1.0 if impl in case.ours else check.BASELINE_SLACK
        assert check.differences(problem.forms[impl](), exact, eager, slack=slack) is None, impl
