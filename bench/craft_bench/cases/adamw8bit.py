"""One 8-bit AdamW step over all 1,120 tensors of a LoRA on SDXL's attention layers.

Bytes: gradient read, parameter read and written, both moments and their scales read and written, once for each
element. (The norm, which decides whether to step at all, reads the gradient a second time; that is not counted.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from craft_bench.cases.common import Random, makers
from craft_bench.registry import COMPILE, EAGER, TRITON, Case, Form, Problem, Result
from craft_fast.quiet import import_bitsandbytes
from craft_kernels.adamw8bit import FlatAdamW8bit
from craft_kernels.adamw8bit.state import BLOCK, MIN_8BIT_SIZE
from craft_kernels.dispatch import Impl

BITSANDBYTES = "bitsandbytes"
RANKS = (16, 64)
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
TEXT_WIDTH = 2048
# SDXL's UNet: (width, transformer blocks) of each attention module, downwards, in the middle and upwards.
ATTENTIONS = (*[(640, 2)] * 2, *[(1280, 10)] * 2, (1280, 10), *[(1280, 10)] * 3, *[(640, 2)] * 3)
_FORMS: dict[str, Impl] = {EAGER: "torch", COMPILE: "compile", TRITON: "triton"}


def attention_lora(rank: int) -> list[tuple[int, int]]:
    """Shapes of a LoRA's tensors on q, k, v and out of all of SDXL's attentions: for each layer first A, then B."""
    shapes = []
    for width, blocks in ATTENTIONS:
        own = [(width, width)] * 4
        text = [(width, width), (TEXT_WIDTH, width), (TEXT_WIDTH, width), (width, width)]
        for inner, outer in (own + text) * blocks:
            shapes += [(rank, inner), (outer, rank)]
    return shapes


def cases() -> list[Case]:
    """Ranks 16 and 64, and a small part of the first for a quick look."""
    few = attention_lora(16)[:64]
    return [_case(f"r={rank} attention, 1120 tensors", attention_lora(rank)) for rank in RANKS] + [
        _case(f"r=16 attention, {len(few)} tensors", few, quick=True)
    ]


def _case(name: str, shapes: Sequence[tuple[int, int]], *, quick: bool = False) -> Case:
    sizes = [rows * columns for rows, columns in shapes]
    large = sum(size for size in sizes if size >= MIN_8BIT_SIZE)
    small = sum(sizes) - large
    # Parameter twice and gradient once in float32; moments twice, in a byte with a scale for 256 or in float32.
    traffic = large * (12 + 4) + large // BLOCK * 16 + small * (12 + 16)
    return Case(
        op="adamw8bit",
        name=name,
        dtype="float32",
        size=sum(sizes),
        traffic={"forward": traffic},
        memory=sum(sizes) * 150,
        build=lambda device: _build(shapes, device),
        rivals=(EAGER, COMPILE, BITSANDBYTES) if len(shapes) < 1000 else (EAGER, BITSANDBYTES),
        quick=quick,
    )


def _build(shapes: Sequence[tuple[int, int]], device: torch.device) -> Problem:
    draw = Random(device)
    start = [draw.normal(shape, scale=0.02) for shape in shapes]
    grads = [draw.normal(shape, scale=1e-3) for shape in shapes]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(tensor.clone()) for tensor in start]
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad = grad.clone()
        return made

    def changes(made: Sequence[Tensor]) -> Tensor:
        """What the steps did, in float64: the parameters themselves would hide it behind their own size."""
        return torch.cat(
            [(now.detach().double() - then.double()).flatten() for now, then in zip(made, start, strict=True)]
        )

    def form(impl: str) -> Form:
        made = parameters()
        if impl == BITSANDBYTES:
            optimizer = import_bitsandbytes().optim.AdamW8bit(made, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        else:
            named = {str(index): parameter for index, parameter in enumerate(made)}
            optimizer = FlatAdamW8bit(named, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, impl=_FORMS[impl])

        def step() -> tuple[Tensor, ...]:
            optimizer.step()
            return ()

        def second_step() -> tuple[Tensor]:
            """The moments as they were stored are seen by the second step, not by the first."""
            optimizer.step()
            return (changes(made),)

        # A graph of bitsandbytes' step would replay one step's bias correction for ever.
        return Form(step, result=second_step, tolerance=TOLERANCE.get(impl), capture=impl != BITSANDBYTES)

    def exact() -> Result:
        made = [nn.Parameter(tensor.double()) for tensor in start]
        optimizer = torch.optim.AdamW(made, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad = grad.double()
        for _ in range(2):
            optimizer.step()
        return (changes(made),), ()

    return Problem(exact, makers(form, EAGER, COMPILE, BITSANDBYTES, TRITON))


# Of the change in two steps, relative to AdamW in float64: what storing the moments in 8 bits costs bitsandbytes.
TOLERANCE = {BITSANDBYTES: 0.1}
