"""Timing, and the check that comes before it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from craft_bench import check, measure
from craft_bench.registry import Form, Result

CPU = torch.device("cpu")
SHORT = measure.Effort(1, 2)


def square(x: Tensor, change: Callable[[Tensor], Tensor] = lambda y: y, **more: float) -> Form:
    return Form(lambda: (change(x.square()),), (x,), (torch.ones_like(x),), **more)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 33, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def exact(x: Tensor) -> Result:
    return (x.detach().double().square(),), (2 * x.detach().double(),)


def test_quantiles_are_those_of_the_sorted_times() -> None:
    times = measure._summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (times.p20_ms, times.p50_ms, times.p80_ms) == (2.0, 3.5, 5.0)


def test_a_calls_time_is_measured_and_what_prepares_it_is_not() -> None:
    times = measure.quantiles(lambda: time.sleep(0.004), CPU, SHORT, prepare=lambda: time.sleep(0.02))
    assert 4.0 <= times.p20_ms <= times.p50_ms <= times.p80_ms
    assert times.p50_ms < 15.0


def test_backward_runs_on_a_fresh_graph_and_forward_is_not_in_it(x: Tensor) -> None:
    calls = {"forward": 0, "backward": 0}

    def forward() -> tuple[Tensor]:
        calls["forward"] += 1
        time.sleep(0.01)
        y = x.square()
        y.register_hook(lambda _: calls.__setitem__("backward", calls["backward"] + 1))
        return (y,)

    form = Form(forward, (x,), (torch.ones_like(x),))
    figures = measure.measure(form, "backward", CPU, SHORT)
    assert figures["p50_ms"] < 8.0
    assert calls["forward"] == calls["backward"] >= 5
    assert measure.measure(form, "both", CPU, SHORT)["p20_ms"] > 9.9
    assert x.grad is None


def test_copy_bandwidth_is_a_plausible_number() -> None:
    assert 0.05 < measure.copy_gbps(CPU, SHORT) < 5000


def test_a_right_form_passes(x: Tensor, exact: Result) -> None:
    eager = check.errors(check.results(square(x)), exact)
    assert check.differences(square(x), exact, eager) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y * 1.001, "output 0: relative error 0.001"),
        (lambda y: torch.where(y == y.max(), torch.nan, y), "not all values are finite"),
        (lambda y: y[:-1], "shape"),
        (lambda y: y.detach() + (y - y.detach()) * 2, "gradient 0: relative error 1"),
    ],
)
def test_a_wrong_form_is_told(change: Callable[[Tensor], Tensor], said: str, x: Tensor, exact: Result) -> None:
    eager = check.errors(check.results(square(x)), exact)
    form = square(x, change)
    if "shape" in said:
        form = Form(form.forward, (x,), (torch.ones(63, 33),))
    found = check.differences(form, exact, eager)
    assert found is not None
    assert said in found


def test_another_approximation_has_its_own_tolerance(x: Tensor, exact: Result) -> None:
    eager = check.errors(check.results(square(x)), exact)
    near = square(x, lambda y: y * 1.001, tolerance=0.01)
    assert check.differences(near, exact, eager) is None
    far = square(x, lambda y: y * 1.1, tolerance=0.01)
    assert "0.01 is allowed" in str(check.differences(far, exact, eager))
