"""What ``craft-fast plan`` says of a case before it runs, beside what is then measured."""

from __future__ import annotations

from craft_bench.rows import Row
from craft_bench.sdxl.measure import StepFigures
from craft_fast.plan.amounts import image_seconds
from craft_fast.plan.stages import Costs
from craft_fast.probe import Probe, probe
from craft_fast.sdxl.costs import CUBLAS_BYTES

GIB = 2**30


def beside(planned: float | None, measured: float | None) -> float | None:
    """``(planned - measured) / measured``; None where one of them is not there."""
    return None if planned is None or not measured else (planned - measured) / measured


def probed(costs: Costs, *, wanted: bool, deadline_s: float | None) -> Probe | None:
    """The probe that plan makes, before anything of the case is on the device; None where no time was asked for."""
    return probe(costs, deadline_s=deadline_s) if wanted else None


def planned_step(costs: Costs, kept: int, found: Probe | None, figures: StepFigures) -> Row:
    """A training step: ``memory_gib, step_ms`` and, where both are there, their relative errors.

    Args:
        costs: formulas of the case.
        kept: units that kept their activations in truth.
        found: of the probe.
        figures: what was measured.
    """
    memory = costs.training(least=False).total / GIB
    step_ms = None if found is None else 1e3 * (found.train_s + found.update_s)
    return {
        "memory_gib": memory, "step_ms": step_ms, "kept_units": len(costs.kept),
        "kept_as_planned": len(costs.kept) == kept,
        "memory_error": beside(memory, figures.peak_gib), "time_error": beside(step_ms, figures.p50_ms),
        "probe_s": None if found is None else found.seconds,
    }  # fmt: skip


def planned_images(costs: Costs, found: Probe | None, batch_ms: float, peak_gib: float | None) -> Row:
    """A batch of images, UNet and VAE both on the device: ``memory_gib, step_ms``, and the errors.

    Args:
        costs: formulas of the case.
        found: of the probe.
        batch_ms: measured time of the batch.
        peak_gib: measured memory.
    """
    images = costs.settings.generate.batch_size
    decode = costs.decode(tiled=costs.tiled())
    runtime = CUBLAS_BYTES if costs.gpu else 0
    most = max(costs.denoise_bytes(images), decode.activation_bytes)
    memory = (costs.unet_weights() + decode.weight_bytes + most + runtime) / GIB
    time_ms = None
    if found is not None:
        # What plan adds for text and for the file is not measured here.
        besides = found.png_s + sum(one.flops for one in costs.text(1)) / found.rate_flops
        time_ms = 1e3 * images * (image_seconds(costs, found) - besides)
    return {
        "memory_gib": memory, "step_ms": time_ms, "memory_error": beside(memory, peak_gib),
        "time_error": beside(time_ms, batch_ms), "probe_s": None if found is None else found.seconds,
    }  # fmt: skip
