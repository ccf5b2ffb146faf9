"""Which attention kernel the UNet uses; xformers only where it was tried and works."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch.nn import functional as F

from craft_fast.errors import EnvironmentProblem
from craft_fast.quiet import import_bitsandbytes, quiet_third_party

quiet_third_party()


def set_attention(unet: Any, kind: Literal["auto", "sdpa", "xformers"]) -> str:
    """Set the attention of every block of ``unet``.

    Args:
        unet: a diffusers UNet on the device and in the dtype it will run in.
        kind: ``sdpa``: PyTorch's scaled_dot_product_attention; ``xformers``: its memory_efficient_attention, tried
            first, forward and backward, at the UNet's head sizes; ``auto``: sdpa.

    Returns:
        The name of what is in use, ``sdpa`` or ``xformers``.

    Raises:
        EnvironmentProblem: xformers is asked for and is not there, does not load, or does not run here.
    """
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    if kind != "xformers":
        unet.set_attn_processor(AttnProcessor2_0())
        return "sdpa"
    weight = next(unet.parameters())
    for size in head_sizes(unet):
        _try_xformers(size, weight.device, unet.dtype)
    unet.set_attn_processor(XFormersAttnProcessor())
    return "xformers"


def head_sizes(unet: Any) -> list[int]:
    """The sizes of attention heads that occur in ``unet``, ascending."""
    from diffusers.models.attention_processor import Attention

    return sorted({m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)})


def attention_ms(
    kind: Literal["sdpa", "xformers"],
    *,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 4096,
    heads: int = 10,
    head_size: int = 64,
    repeats: int = 5,
) -> float:
    """Time of one self-attention, forward and backward, at the size of SDXL's largest at 1024 px; best of ``repeats``.

    Args:
        kind: which kernel.
        device: where.
        dtype: of queries, keys and values.
        tokens: pixels of the feature map.
        heads: attention heads.
        head_size: numbers in each.
        repeats: runs that are timed, after one that is not.

    Returns:
        Milliseconds.
    """
    attend: Any
    if kind == "xformers":
        import xformers.ops  # type: ignore[import-not-found,unused-ignore]

        attend, shape = xformers.ops.memory_efficient_attention, (1, tokens, heads, head_size)
    else:
        attend, shape = F.scaled_dot_product_attention, (1, heads, tokens, head_size)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    took = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        out = attend(q, k, v)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        _wait(device)
        took.append(1000 * (time.perf_counter() - began))
    return min(took[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _try_xformers(head_size: int, device: torch.device, dtype: torch.dtype) -> None:
    try:
        import xformers.ops  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:  # a build for another torch fails in many ways
        raise _problem("xformers does not load.", error) from error
    try:
        # diffusers' layout: [batch * heads, tokens, head size].
        q, k, v = (torch.randn(4, 64, head_size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        out = xformers.ops.memory_efficient_attention(q, k, v)
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        finite = all(bool(tensor.isfinite().all()) for tensor in (out, *found))  # waits for the device, once
    except Exception as error:
        raise _problem(f"xformers does not run on {device} in {dtype}, head size {head_size}.", error) from error
    if not finite:
        raise _problem(f"xformers gives NaN on {device} in {dtype}, head size {head_size}.", None)


def _problem(what: str, error: Exception | None) -> EnvironmentProblem:
    why = "" if error is None else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EnvironmentProblem(
        what,
        where="engine.attention: xformers",
        why=why or "its result is not finite",
        hint="Type `pip install 'craft-fast[xformers]'` (a build for the torch in use), or set engine.attention: sdpa.",
    )
