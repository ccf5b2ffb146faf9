"""Is a form's result right? Asked of every form of every case before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_bench.measure import gradients
from craft_bench.registry import Form, Result

# Baselines are not ours to test: they may round in other places, but must compute the same function.
BASELINE_SLACK = 8.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative distances of eager PyTorch from float64: what the others' distances are measured by."""

    outputs: Sequence[float]
    gradients: Sequence[float]


def results(form: Form) -> Result:
    """Outputs and gradients of one call."""
    outputs = form.forward()
    found = gradients(form, outputs) if form.wrt else ()
    compared = form.result() if form.result is not None else outputs
    return [output.detach() for output in compared], found


def distance(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|``, in float64."""
    exact = exact.double()
    difference = found.double().sub_(exact) if found.dtype != torch.float64 else found - exact
    return float(difference.norm() / exact.norm().clamp(min=1e-30))


def errors(found: Result, exact: Result) -> Errors:
    """How far outputs and gradients are from the exact ones."""
    return Errors(
        [distance(a, b) for a, b in zip(found[0], exact[0], strict=True)],
        [distance(a, b) for a, b in zip(found[1], exact[1], strict=True)],
    )


def differences(form: Form, exact: Result, eager: Errors, *, slack: float = 1.0) -> str | None:
    """Run a form once and compare: at most twice as far from float64 as eager PyTorch of the same dtype.

    Args:
        form: what to call.
        exact: outputs and gradients in float64.
        eager: the distances of eager PyTorch.
        slack: factor on what is allowed, above 1 for a baseline.

    Returns:
        None if all is well, else what differs and by how much.
    """
    found = results(form)
    for kind, parts, wanted, base in (
        ("output", found[0], exact[0], eager.outputs),
        ("gradient", found[1], exact[1], eager.gradients),
    ):
        if len(parts) != len(wanted):
            return f"{len(parts)} {kind}s instead of {len(wanted)}"
        for index, (part, right, error) in enumerate(zip(parts, wanted, base, strict=True)):
            wrong = _wrong(part, right, error, form.tolerance, slack)
            if wrong:
                return f"{kind} {index}: {wrong}"
    return None


def _wrong(found: Tensor, exact: Tensor, eager: float, tolerance: float | None, slack: float) -> str | None:
    if found.shape != exact.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    if not bool(found.isfinite().all()):
        return "not all values are finite"
    # What is added lets a handful of elements off, for which eager may round luckily.
    eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    rule = slack * (2 * eager + max(torch.finfo(torch.float32).eps, eps / 4))
    allowed = rule if tolerance is None else max(rule, tolerance)
    away = distance(found, exact)
    return None if away <= allowed else f"relative error {away:.2g} where {allowed:.2g} is allowed"
