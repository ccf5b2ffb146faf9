"""Which attention kernel the towers use; xformers only where it was tried and works.

CLIP's towers take theirs by name from transformers. BLIP's have none to choose (transformers 5.23 multiplies the
matrices out), so their attention modules are given a forward that calls ``attend``; results are equal to 1e-6.

Shapes: B batch, H heads, T tokens, d head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPPreTrainedModel

from craft_fast.errors import EnvironmentProblem

Kind = Literal["auto", "sdpa", "xformers"]
_XFORMERS_IN_CLIP = "craft_fast_xformers"


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, kind: str = "sdpa", mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention, scaled by d ** -0.5.

    Args:
        query: [B, H, T, d].
        key: [B, H, U, d].
        value: [B, H, U, d].
        kind: ``sdpa``, or ``xformers``, which is used where there is no ``mask``.
        mask: added to the scores, or bool: True is looked at; broadcastable to [B, H, T, U].
        causal: a token looks at itself and those before it.

    Returns:
        [B, H, T, d].
    """
    if kind != "xformers" or mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    import xformers.ops as ops  # type: ignore[import-not-found,unused-ignore]

    bias = ops.LowerTriangularMask() if causal else None
    turned = [part.transpose(1, 2) for part in (query, key, value)]  # xformers wants [B, T, H, d]
    found: Tensor = ops.memory_efficient_attention(*turned, attn_bias=bias)
    return found.transpose(1, 2)


class FusedBlipAttention(BlipAttention):  # type: ignore[misc,unused-ignore]
    """Attention of BLIP's image tower by ``attend``."""

    attention_kind = "sdpa"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """States [B, T, D] to [B, T, D]."""
        parts = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        found = attend(*parts.unbind(0), kind=self.attention_kind)
        return self.projection(found.transpose(1, 2).flatten(2)), None


class FusedBlipTextAttention(BlipTextSelfAttention):  # type: ignore[misc,unused-ignore]
    """Attention of BLIP's text encoder, to its own tokens and to the image's, by ``attend``."""

    attention_kind = "sdpa"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """States [B, T, D] to [B, T, D]; ``encoder_hidden_states`` [B, P, D] are attended to where given."""
        crossing = encoder_hidden_states is not None
        context = encoder_hidden_states if crossing else hidden_states
        mask = encoder_attention_mask if crossing else attention_mask
        shape = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            layer(states).unflatten(-1, shape).transpose(1, 2)
            for layer, states in ((self.query, hidden_states), (self.key, context), (self.value, context))
        )
        found = attend(query, key, value, kind=self.attention_kind, mask=mask)
        return found.transpose(1, 2).flatten(2), None


def fuse_blip_attention(network: nn.Module) -> None:
    """Give every attention of transformers' BLIP in ``network`` the fused forward; its weights are not touched."""
    for module in network.modules():
        if type(module) is BlipAttention:
            module.__class__ = FusedBlipAttention
        elif type(module) is BlipTextSelfAttention:
            module.__class__ = FusedBlipTextAttention


def set_tower_attention(network: nn.Module, kind: Kind, *, device: torch.device | str | None = None) -> str:
    """Set the attention of every tower in ``network``.

    Args:
        network: a reward network, in the dtype it will run in.
        kind: ``sdpa``: PyTorch's scaled_dot_product_attention; ``xformers``: its memory_efficient_attention, tried
            first at the network's head sizes; it is used where no mask is needed: image towers, causal text and the
            attention of text to image; ``auto``: sdpa.
        device: where the network will run; None: where it is.

    Returns:
        The name of what is in use, ``sdpa`` or ``xformers``.

    Raises:
        EnvironmentProblem: xformers is asked for and is not there, does not load, or does not run here.
    """
    used = "xformers" if kind == "xformers" else "sdpa"
    if used == "xformers":
        weight = _matrix(network)
        for size in head_sizes(network):
            _try_xformers(size, torch.device(device or weight.device), weight.dtype)
        ALL_ATTENTION_FUNCTIONS.register(_XFORMERS_IN_CLIP, _clip_attention)
    for module in network.modules():
        if isinstance(module, CLIPPreTrainedModel):
            module.set_attn_implementation(_XFORMERS_IN_CLIP if used == "xformers" else "sdpa")
        elif hasattr(module, "attention_kind"):
            module.attention_kind = used  # type: ignore[assignment,unused-ignore]
    return used


def head_sizes(network: nn.Module) -> list[int]:
    """The sizes of attention heads that occur in ``network``, ascending."""
    sizes = {module.head_dim for module in network.modules() if isinstance(module, CLIPAttention | BlipAttention)}
    sizes |= {m.attention_head_size for m in network.modules() if isinstance(m, BlipTextSelfAttention)}
    # MPS's own.
    sizes |= {int(getattr(m, "head_dim", 0)) for m in network.modules() if hasattr(m, "attention_kind")} - {0}
    return sorted(sizes)


def _matrix(network: nn.Module) -> Tensor:
    """A weight in the network's own dtype; heads and single numbers are kept in float32."""
    found = next(network.parameters())
    for module in network.modules():
        if isinstance(module, CLIPAttention | BlipAttention):
            found = next(module.parameters())
    return found


def _clip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' CLIP calls: [B, H, T, d] in, [B, T, H, d] out; its scale is d ** -0.5 in every CLIP."""
    found = attend(query, key, value, kind="xformers", mask=attention_mask, causal=bool(is_causal))
    return found.transpose(1, 2), None


def _try_xformers(head_size: int, device: torch.device, dtype: torch.dtype) -> None:
    try:
        import xformers.ops as ops  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:  # a build for another torch fails in many ways
        raise _problem("xformers does not load.", error) from error
    try:
        with torch.inference_mode():
            query = torch.randn(2, 64, 4, head_size, device=device, dtype=dtype)
            for bias in (None, ops.LowerTriangularMask()):
                found = ops.memory_efficient_attention(query, query, query, attn_bias=bias)
                finite = bool(found.isfinite().all())  # waits for the device
                if not finite:
                    raise ValueError("its result is not finite")
    except Exception as error:
        raise _problem(f"xformers does not run on {device} in {dtype}, head size {head_size}.", error) from error


def _problem(what: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        what,
        where="engine.attention: xformers",
        why=(str(error).strip().splitlines() or [type(error).__name__])[0],
        hint="Type `pip install 'craft-fast[xformers]'` (a build for the torch in use), or set engine.attention: sdpa.",
    )
