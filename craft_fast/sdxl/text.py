"""Prompts to embeddings, as SDXL's pipeline makes them.

Shapes: B prompts, T tokens, D = width of both encoders together, P = width of the second one's pooled output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_fast.sdxl.load import SdxlModel


@dataclass(frozen=True)
class PromptEmbeds:
    """Text conditioning of B prompts.

    Attributes:
        prompt_embeds: [B, T, D], the model's dtype; on its device as encoded.
        pooled_prompt_embeds: [B, P], likewise.
        truncated: per prompt, whether its end was cut off because it has more than T tokens.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.truncated)

    def select(self, rows: Sequence[int]) -> PromptEmbeds:
        """The given rows, in the given order, repeats allowed."""
        index = torch.as_tensor(list(rows), device=self.prompt_embeds.device)
        return PromptEmbeds(
            self.prompt_embeds[index], self.pooled_prompt_embeds[index], [self.truncated[row] for row in rows]
        )

    def to(self, device: torch.device | str) -> PromptEmbeds:
        """The same on another device; ``self`` where it is there already."""
        if self.prompt_embeds.device == torch.device(device):
            return self
        return PromptEmbeds(self.prompt_embeds.to(device), self.pooled_prompt_embeds.to(device), self.truncated)


@torch.no_grad()
def encode_prompts(model: SdxlModel, prompts: Sequence[str], *, batch_size: int = 64) -> PromptEmbeds:
    """Both encoders' penultimate hidden states side by side, and the second one's pooled output.

    An empty prompt is the unconditional one: all zeros where the model's ``force_zeros_for_empty_prompt`` says so,
    exactly what diffusers' pipeline guides away from when no negative prompt is given. Training with prompt dropout
    must use the same, so there is one function for both. Equal prompts are encoded once.

    Args:
        model: the SDXL.
        prompts: B texts.
        batch_size: texts encoded together.

    Returns:
        PromptEmbeds of B rows.
    """
    unique = list(dict.fromkeys(prompts))
    chunks = [_encode(model, unique[start : start + batch_size]) for start in range(0, len(unique), batch_size)]
    embeds = torch.cat([chunk.prompt_embeds for chunk in chunks])
    pooled = torch.cat([chunk.pooled_prompt_embeds for chunk in chunks])
    truncated = [cut for chunk in chunks for cut in chunk.truncated]
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    if model.force_zeros_for_empty_prompt and "" in row_of:
        embeds[row_of[""]] = 0
        pooled[row_of[""]] = 0
    return PromptEmbeds(embeds, pooled, truncated).select([row_of[prompt] for prompt in prompts])


def _encode(model: SdxlModel, prompts: Sequence[str]) -> PromptEmbeds:
    hidden: list[torch.Tensor] = []
    pooled: torch.Tensor | None = None
    truncated = [False] * len(prompts)
    for tokenizer, encoder in (
        (model.tokenizer, model.text_encoder),
        (model.tokenizer_2, model.text_encoder_2),
    ):
        input_ids, cut = _tokenize(tokenizer, prompts)
        output = encoder(input_ids.to(model.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        # Of the second encoder, the first output is the projection of its end token.
        pooled = output[0]
        truncated = [a or b for a, b in zip(truncated, cut, strict=True)]
    if pooled is None or pooled.ndim != 2:
        raise TypeError("text_encoder_2 has no projected output; a CLIPTextModelWithProjection is needed")
    return PromptEmbeds(torch.cat(hidden, dim=-1).to(model.dtype), pooled.to(model.dtype), truncated)


def _tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
    length = int(tokenizer.model_max_length)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    full = tokenizer(list(prompts), padding=False, truncation=False)
    return tokens.input_ids, [len(ids) > length for ids in full.input_ids]


def add_time_ids(
    height_px: int,
    width_px: int,
    batch_size: int = 1,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """SDXL's micro-conditioning of an uncropped image of its own size.

    Returns:
        [batch_size, 6]: original height and width, crop top and left (0), target height and width, in pixels.
    """
    row = [height_px, width_px, 0, 0, height_px, width_px]
    return torch.tensor([row] * batch_size, device=device, dtype=dtype)
