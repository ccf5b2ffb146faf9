"""Some seconds of real work on the real device: how long a training step and an image will take.

Measured are the very blocks of the model, one of each shape, with random weights in the form that training gives them;
a step is their sum. What is in no block (a few percent) goes by the rate that blocks of its kind reach. A probe ends
at its deadline: shapes that it did not get to go by the same rates, and it says how many.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from craft_fast.plan.stages import Costs
from craft_fast.probe.blocks import Blocks
from craft_fast.probe.clock import Clock
from craft_fast.quiet import import_bitsandbytes, quiet_third_party
from craft_fast.sdxl.costs_parts import vae_cost

quiet_third_party()

DEADLINE_GPU_S, DEADLINE_CPU_S = 8.0, 15.0


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        device: its name.
        copy_gbps: bytes read and written a second by a copy of a large tensor, in GB/s.
        matrix_tflops: rate of a large matrix product in the model's dtype.
        launch_us: time that starting one small operation takes.
        train_s: one micro-batch, forward, recomputation and backward.
        update_s: one step of the optimizer.
        denoise_s: one denoising step of a full batch.
        denoise_plain_s: the same without guidance.
        decode_s: one image through the VAE; None where it was not measured.
        png_s: one image into its file's bytes.
        rate_flops: operations a second that blocks reach in a forward without gradients.
        measured: how many shapes of blocks were measured.
        shapes: how many there are.
        seconds: that the probe took.
    """

    device: str
    copy_gbps: float
    matrix_tflops: float
    launch_us: float
    train_s: float
    update_s: float
    denoise_s: float
    denoise_plain_s: float
    decode_s: float | None
    png_s: float
    rate_flops: float
    measured: int
    shapes: int
    seconds: float

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def probe(planned: Costs, *, deadline_s: float | None = None) -> Probe:
    """Measure this device for a run.

    Args:
        planned: of the run, with ``train.method`` decided.
        deadline_s: begin no measurement later; 8 s on a GPU and 15 s on a CPU unless given.

    Raises:
        torch.OutOfMemoryError: not even one block fits.
    """
    import_bitsandbytes()
    limit = deadline_s if deadline_s is not None else DEADLINE_GPU_S if planned.gpu else DEADLINE_CPU_S
    started = time.perf_counter()
    clock = Clock(planned.device, started + limit)
    with torch.random.fork_rng(devices=[planned.device] if planned.gpu else []):
        torch.manual_seed(0)
        return _measure(planned, clock, started)


def _measure(planned: Costs, clock: Clock, started: float) -> Probe:
    device, batch = planned.device, planned.settings.generate.batch_size
    copy, matrix, launch = _copy_gbps(clock), _matrix_tflops(clock, planned.dtype), _launch_us(clock)
    blocks = Blocks(planned, clock)
    # Generation first: training changes the blocks.
    plain_s, rate = blocks.denoise(batch, (0.15 if planned.guided else 0.35) * clock.left)
    guided_s = plain_s
    if planned.guided:
        guided_s, rate = blocks.denoise(2 * batch, 0.3 * clock.left)
    train_s, update_s = blocks.train(0.8 * clock.left)
    name = torch.cuda.get_device_name(device) if planned.gpu else f"CPU, {torch.get_num_threads()} threads"
    measured, shapes = blocks.measured, len(blocks.shapes)
    del blocks
    decode_s = _decode_s(planned, clock, rate)
    return Probe(
        name, copy, matrix, launch, train_s, update_s, guided_s, plain_s, decode_s, _png_s(planned), rate, measured,
        shapes, time.perf_counter() - started,
    )  # fmt: skip


def _copy_gbps(clock: Clock) -> float:
    count = 2**26 if clock.device.type == "cuda" else 2**23
    source = torch.ones(count, device=clock.device)
    target = torch.empty_like(source)
    return 8 * count / clock.time(lambda: target.copy_(source), slice_s=0.1, warmup=3) / 1e9


def _matrix_tflops(clock: Clock, dtype: torch.dtype) -> float:
    side = 8192 if clock.device.type == "cuda" else 768
    left, right = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    return 2 * side**3 / clock.time(lambda: left @ right, slice_s=0.2, warmup=3) / 1e12


def _launch_us(clock: Clock) -> float:
    """Of an operation too small to take time itself, started many times without waiting."""
    one, count = torch.zeros(1, device=clock.device), 500

    def many() -> None:
        for _ in range(count):
            one.add_(1)

    return clock.time(many, slice_s=0.05) / count * 1e6


def _png_s(planned: Costs) -> float:
    """A picture with a photograph's share of noise, packed as the run packs it."""
    from craft_fast.sdxl.vae import png_bytes

    height, width = planned.size["height_px"], planned.size["width_px"]
    smooth = torch.linspace(0, 255, height)[:, None] + torch.linspace(0, 64, width)
    image = (smooth + 4 * torch.randn(3, height, width)).clamp(0, 255).to(torch.uint8)
    return Clock(torch.device("cpu"), 0.0).time(lambda: png_bytes(image), slice_s=0.1)


def _decode_s(planned: Costs, clock: Clock, rate: float) -> float | None:
    """Seconds for one image through a VAE of this size, where that fits into the time and memory left."""
    from craft_fast.sdxl import vae_strips
    from craft_fast.sdxl.published import random_vae

    setup = planned.size
    one = vae_cost(planned.shape.vae, **setup, dtype_bytes=planned.vae_element, tiled=planned.tiled(), gpu=planned.gpu)
    if 3 * one.flops / rate > clock.left:
        return None
    dtype = {4: torch.float32, 2: planned.dtype}[planned.vae_element]
    try:
        vae: Any = random_vae(device=planned.device, dtype=dtype, config=planned.shape.vae)
        factor = planned.shape.vae_scale_factor
        latents = torch.randn(
            1, int(planned.shape.vae["latent_channels"]), setup["height_px"] // factor, setup["width_px"] // factor,
            device=planned.device, dtype=dtype,
        )  # fmt: skip
        with torch.inference_mode():
            if planned.tiled():
                return clock.time(lambda: vae_strips.decode(vae, latents), slice_s=min(1.0, clock.left))
            return clock.time(lambda: vae.decode(latents, return_dict=False)[0], slice_s=min(1.0, clock.left))
    except torch.OutOfMemoryError:
        return None
