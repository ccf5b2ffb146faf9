"""Timing and memory of one form of an op, on a GPU and on a CPU.

On a GPU the time is that of ``triton.testing.do_bench``: events around each call, the L2 cache overwritten before it.
A call whose launches the CPU cannot enqueue as fast as the GPU works through them is partly hidden behind that
overwriting (about 0.1 ms on an H100), which flatters every form with many launches; ``host_us`` is therefore measured
as well, and ``graph_ms`` shows what is left when a CUDA graph does the launching.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_bench.registry import Form, Mode

QUANTILES = (0.2, 0.5, 0.8)
HOST_CALLS = 20
# More than any L2 cache, and do_bench's own choice; a CPU's last level is shared and can only mostly be emptied.
_FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_MOST_REPEATS = {"cuda": 1000, "cpu": 25}
_FEWEST_REPEATS = 5

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: milliseconds of warm-up and of repetition for each figure."""

    warmup_ms: int = 15
    rep_ms: int = 50


FULL, QUICK = Effort(), Effort(5, 20)


@dataclass(frozen=True, slots=True)
class Times:
    """20th, 50th and 80th percentile of a call's time in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def measure(form: Form, mode: Mode, device: torch.device, effort: Effort) -> dict[str, Any]:
    """All figures of one form in one mode.

    Args:
        form: what to call; its results were checked before.
        mode: ``forward``; ``backward``, each time on a fresh graph made outside of the measured span, since a
            compiled backward may overwrite what forward kept; or ``both`` together.
        device: where it runs.
        effort: how long to measure.

    Returns:
        ``p20_ms, p50_ms, p80_ms``, and on a GPU ``host_us, graph_ms, peak_gib, saved_gib`` (each may be None).
    """
    call, prepare = _calls(form, mode)
    times = quantiles(call, device, effort, prepare)
    figures: dict[str, Any] = {"p20_ms": times.p20_ms, "p50_ms": times.p50_ms, "p80_ms": times.p80_ms}
    if device.type == "cuda":
        figures["host_us"] = host_us(call, prepare)
        # A backward alone cannot be captured: autograd runs it on the stream of its forward.
        figures["graph_ms"] = graph_ms(call, device, effort) if form.capture and prepare is None else None
        figures |= _memory(form, mode)
    return figures


def _calls(form: Form, mode: Mode) -> tuple[Call, Call | None]:
    """What is timed, and what is done before each time without being timed."""
    if mode == "forward":
        return form.forward, None
    if mode == "both":
        return lambda: gradients(form, form.forward()), None
    kept: list[Sequence[Tensor]] = []

    def prepare() -> None:
        kept[:] = [form.forward()]

    return lambda: gradients(form, kept.pop()), prepare


def gradients(form: Form, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of a form's outputs; fresh tensors each time, nothing is accumulated."""
    return torch.autograd.grad(outputs[: len(form.grads)], form.wrt, form.grads)


def quantiles(call: Call, device: torch.device, effort: Effort, prepare: Call | None = None) -> Times:
    """Time a call that has run before, with cold caches.

    Args:
        call: what is timed.
        device: where it runs.
        effort: how long to measure.
        prepare: called before each time, not timed.
    """
    if device.type == "cuda" and prepare is None and importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench

        found = do_bench(call, warmup=effort.warmup_ms, rep=effort.rep_ms, quantiles=list(QUANTILES))
        return Times(*(float(value) for value in found))
    return _summary(_repeat(call, device, effort, prepare))


def _summary(times_ms: Sequence[float]) -> Times:
    ordered = sorted(times_ms)

    def at(quantile: float) -> float:
        place = quantile * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Times(*(at(quantile) for quantile in QUANTILES))


def _repeat(call: Call, device: torch.device, effort: Effort, prepare: Call | None) -> list[float]:
    """do_bench's loop, for a CPU too and with an untimed step before each call."""
    cache = torch.empty(_FLUSH_BYTES[device.type] // 4, dtype=torch.int32, device=device)

    def once() -> tuple[Any, Any]:
        if prepare is not None:
            prepare()
        cache.zero_()
        began = _mark(device)
        call()
        return began, _mark(device)

    def run(times: int) -> list[float]:
        marks = [once() for _ in range(times)]
        synchronize(device)
        return [_between_ms(began, ended) for began, ended in marks]

    estimate = max(statistics.median(run(3)), 1e-4)
    most = _MOST_REPEATS[device.type]
    run(min(max(1, int(effort.warmup_ms / estimate)), most // 4))
    return run(min(max(_FEWEST_REPEATS, int(effort.rep_ms / estimate)), most))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began) * 1e3
    return float(began.elapsed_time(ended))


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def host_us(call: Call, prepare: Call | None = None) -> float:
    """Median CPU time to enqueue one call, in microseconds, the GPU idle when it begins; nothing waits for the end."""
    spent = []
    for _ in range(HOST_CALLS):
        if prepare is not None:
            prepare()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(spent) * 1e6


def graph_ms(call: Call, device: torch.device, effort: Effort) -> float | None:
    """Median time of a CUDA graph's replay of the call; None where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # what a first call on a stream allocates must not be part of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return quantiles(graph.replay, device, effort).p50_ms
    except Exception:  # every library has its own way to refuse a capture, and none of them spoils the other figures
        torch.cuda.synchronize()
        return None


def _memory(form: Form, mode: Mode) -> dict[str, float | None]:
    """Memory above what the inputs take: at the peak of a mode, and kept between forward and backward."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = form.forward()
    storages = {output.untyped_storage().data_ptr(): output.untyped_storage().nbytes() for output in outputs}
    kept = torch.cuda.memory_allocated() - before
    saved = max(0, kept - sum(storages.values())) if form.wrt else None
    if mode == "backward":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    if mode != "forward":
        # The outputs die when their gradients are taken, as a loss does in a training step.
        found = gradients(form, outputs)
        del found
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_gib": peak / 2**30, "saved_gib": None if saved is None else saved / 2**30}


def copy_gbps(device: torch.device, effort: Effort) -> float:
    """Bandwidth of a large copy within the device's memory, bytes read and written, in GB/s."""
    size = _COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = quantiles(lambda: target.copy_(source), device, effort)
    return 2 * size / (times.p50_ms * 1e-3) / 1e9
