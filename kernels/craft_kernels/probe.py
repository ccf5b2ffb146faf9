"""Whether Triton works on a device: one small kernel is compiled, launched and checked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one_kernel(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < size) + 1.0, mask=at < size)


def add_one(device: torch.device) -> None:
    """Run the kernel on ``device``.

    Raises:
        RuntimeError: the result is wrong. Whatever Triton raises comes through: no C compiler, an old GPU or driver.
    """
    source = torch.arange(100, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    _add_one_kernel[(1,)](source, target, 100, BLOCK=128)
    if not torch.equal(target, source + 1.0):
        raise RuntimeError("a Triton kernel gave a wrong result")
