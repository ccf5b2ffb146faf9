"""MPS (arXiv 2405.14705): CLIP whose image tokens attend to the prompt's tokens that matter to a condition.

The image token states, projected, pass four layers; each attends to the prompt's projected token states (one key and
value for all heads, arXiv 1911.02150), then to one another with rotary positions (arXiv 2104.09864) beside a SwiGLU
feed-forward (arXiv 2002.05202). The score is the cosine of the first token's state and the pooled text, times the
logit scale. A prompt's token is context if its largest inner product with a token of the condition, divided by the
largest of all tokens of that prompt, is above the threshold. The published code divides by the largest of the whole
batch, which makes a score depend on what it is scored with; here it is per prompt, as if scored one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from craft_fast.errors import ConfigError
from craft_fast.rewards.networks.attention import attend
from craft_fast.rewards.networks.filling import fill, read_tensors, unfilled
from craft_fast.store.atomic import write_json, write_safetensors


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens; keys and values are shared by all heads; a feed-forward beside it."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_in = nn.Linear(dim, 2 * ff_mult * dim, bias=False)
        self.ff_out = nn.Linear(ff_mult * dim, dim, bias=False)

    def forward(self, states: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        """States [B, P, D], context [B, T, D] and which of its tokens are looked at, bool [B, T], to [B, P, D]."""
        normed = self.norm(states)
        query = _heads(self.to_q(normed), self.heads)
        key, value = (part[:, None].expand(-1, self.heads, -1, -1) for part in self.to_kv(context).chunk(2, dim=-1))
        found = attend(query, key, value, mask=kept[:, None, None])
        made: Tensor = self.to_out(_merged(found)) + self.ff_out(_swiglu(self.ff_in(normed))) + states
        return made


class ParallelBlock(nn.Module):
    """Self-attention with rotary positions and shared keys and values, and a feed-forward, in one projection."""

    attention_kind = "sdpa"

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.sizes = [heads * head_dim, head_dim, head_dim, 2 * ff_mult * dim]
        self.norm = nn.LayerNorm(dim)
        self.fused = nn.Linear(dim, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_out = nn.Linear(ff_mult * dim, dim, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """States [B, P, D] to [B, P, D]."""
        query, key, value, inner = self.fused(self.norm(states)).split(self.sizes, dim=-1)
        angles = _angles(states.shape[1], self.head_dim, states.device)
        query = _rotated(_heads(query, self.heads), angles)
        key = _rotated(key[:, None], angles).expand(-1, self.heads, -1, -1)
        value = value[:, None].expand(-1, self.heads, -1, -1)
        found = attend(query, key, value, kind=self.attention_kind)
        made: Tensor = self.attn_out(_merged(found)) + self.ff_out(_swiglu(inner)) + states
        return made


class CrossLayer(nn.Module):
    """One layer: attention to the text, then among the image's tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.attend = CrossAttention(dim, heads, head_dim, ff_mult)
        self.block = ParallelBlock(dim, heads, head_dim, ff_mult)

    def forward(self, states: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        """As ``CrossAttention``."""
        found: Tensor = self.block(self.attend(states, context, kept))
        return found


class CrossModel(nn.Module):
    """The published one: dim 1024, 4 layers, 16 heads of 64, feed-forward 4 times as wide; 118.5 M weights."""

    def __init__(self, *, dim: int, layers: int, heads: int, head_dim: int = 64, ff_mult: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(dim, heads, head_dim, ff_mult) for _ in range(layers))

    def forward(self, states: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        """As ``CrossAttention``."""
        for layer in self.layers:
            states = layer(states, context, kept)
        return states


class MpsReward(nn.Module):
    """Cosine of the pooled text and of the picture seen through the prompt's words, times ``score_scale``.

    All T token states of a prompt are context, padding too: the published code pads with the end token to 77 and uses
    no mask, so ids must be padded that way.

    Args:
        config: ``clip`` (values of a CLIPConfig) and ``cross`` (arguments of ``CrossModel``).
        threshold: see the module; 0.01 is the published model's, 0.3 that of its evaluation scripts.
        score_scale: what the cosine is multiplied by.
    """

    def __init__(self, config: Mapping[str, Any], *, threshold: float = 0.01, score_scale: float = 1.0) -> None:
        super().__init__()
        self.config = dict(config)
        self.clip = CLIPModel(CLIPConfig(**config["clip"]))
        self.cross = CrossModel(**config["cross"])
        self.threshold = threshold
        self.score_scale = score_scale
        self._condition_ids: Tensor | None = None
        self._condition: Tensor | None = None

    def set_condition(self, input_ids: Tensor) -> None:
        """Say what a prompt's tokens are compared with: the condition's ids, int64 [T], padded as prompts are."""
        self._condition_ids = input_ids.reshape(1, -1)
        self._condition = None

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """What ``score_encoded`` takes, for each prompt by itself.

        Args:
            input_ids: int64 [B, T].
            attention_mask: not looked at.

        Returns:
            Unit pooled text float32 [B, D]; token states [B, T, D] in the weights' dtype (158 KB a prompt in half
            precision); which of them are context, bool [B, T].

        Raises:
            ConfigError: no condition was set.
        """
        if self._condition_ids is None:
            raise ConfigError("MPS has no condition.", hint="set_condition first")
        if self._condition is None:
            self._condition = self._text(self._condition_ids.to(input_ids.device))[0][0].float()
        states, pooled = self._text(input_ids)
        likeness = (states.float() @ self._condition.to(states.device).T).amax(dim=-1)
        kept = likeness / likeness.amax(dim=-1, keepdim=True) > self.threshold
        return F.normalize(pooled.float(), dim=-1), states, kept

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] to projected token states [B, P, D]; there is no layer norm in between."""
        projection = self.clip.visual_projection
        found = self.clip.vision_model(pixel_values=pixel_values.to(projection.weight.dtype)).last_hidden_state
        states: Tensor = projection(found)
        return states

    def score_encoded(self, pixel_values: Tensor, pooled: Tensor, states: Tensor, kept: Tensor) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against what ``encode_text`` gave."""
        seen = self.cross(self.image_states(pixel_values), states, kept)[:, 0]
        return (F.normalize(seen.float(), dim=-1) * pooled).sum(-1) * self.score_scale

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores float32 [B] of pixels [B, 3, S, S] against token ids [B, T]."""
        return self.score_encoded(pixel_values, *self.encode_text(input_ids, attention_mask))

    def logit_scale(self) -> float:
        """The factor that the model was trained with: e to the stored value."""
        return float(self.clip.logit_scale.detach().double().exp())

    def _text(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.clip.text_model(input_ids=input_ids)
        return self.clip.text_projection(found.last_hidden_state), self.clip.text_projection(found.pooler_output)

    def save_folder(self, folder: Path) -> None:
        """Write ``config.json`` {clip, cross} and ``model.safetensors``."""
        write_json(folder / "config.json", self.config)
        write_safetensors(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_folder(
        cls, folder: Path, *, threshold: float = 0.01, score_scale: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> MpsReward:
        """Read a folder that ``save_folder`` wrote.

        Args:
            folder: with ``config.json`` and ``model.safetensors``.
            threshold: see the class.
            score_scale: see the class.
            dtype: of the weights.

        Raises:
            IntegrityError: keys missing or left over.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network: MpsReward = unfilled(lambda: cls(config, threshold=threshold, score_scale=score_scale), dtype)
        fill(network, read_tensors(folder / "model.safetensors"), dtype)
        return network


def _heads(states: Tensor, heads: int) -> Tensor:
    """[B, P, heads * d] to [B, heads, P, d]."""
    batch, tokens, width = states.shape
    return states.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _merged(states: Tensor) -> Tensor:
    """[B, heads, P, d] to [B, P, heads * d]."""
    return states.transpose(1, 2).flatten(2)


def _swiglu(inner: Tensor) -> Tensor:
    value, gate = inner.chunk(2, dim=-1)
    return F.silu(gate) * value


def _angles(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotary angles float32 [P, d]: position times 10000 ** (-2 i / d), for both halves."""
    steps = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), steps)
    return torch.cat((angles, angles), dim=-1)


def _rotated(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on [..., P, d], in float32."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return turned.to(states.dtype)
