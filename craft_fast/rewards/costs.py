"""What reward networks cost, from their configurations alone: weights, memory and operations of one picture.

Closed formulas over the widths, as ``sdxl.costs_parts`` has them for SDXL; counts of weights are exact, activations and
operations are those of the image side and of what runs for every picture. No torch here: plans are made without it.

Shapes: P image tokens, D, d widths of image and text states, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """Of one reward network.

    Attributes:
        parameters: values in the dtype of the weights.
        float32_parameters: values that are float32 whatever that is: heads and single numbers.
        image_bytes: memory that one more picture takes at the forward's peak, its pixels included.
        image_flops: operations for one picture; texts that are encoded once are not counted.
    """

    parameters: int
    float32_parameters: int
    image_bytes: int
    image_flops: float

    def weight_bytes(self, element: int) -> int:
        """Of the weights, where a value takes ``element`` bytes."""
        return self.parameters * element + 4 * self.float32_parameters


def network_cost(family: str, config: Mapping[str, Any], *, element: int, max_tokens: int = 77) -> NetworkCost:
    """Cost of a network.

    Args:
        family: clip, aesthetic, image_reward or mps.
        config: as in ``published.OFFICIAL``.
        element: bytes of a value of weights and states.
        max_tokens: T, of a prompt.
    """
    if family == "clip":
        vision, text = _clip_vision(config["vision_config"], config), _clip_text(config["text_config"], config)
        return NetworkCost(vision.parameters + text, 1, vision.peak(element), vision.flops)
    if family == "aesthetic":
        tower = _clip_vision(config["tower"], config["tower"])
        head = _head(int(config["tower"].get("projection_dim", 512)), config["head"])
        return NetworkCost(tower.parameters, head, tower.peak(element), tower.flops + 2.0 * head)
    if family == "image_reward":
        return _image_reward(config, element, max_tokens)
    return _mps(config, element, max_tokens)


@dataclass(frozen=True, slots=True)
class _Tower:
    """An image tower.

    Attributes:
        parameters: of it, and of its projection.
        tokens: P.
        width: D.
        inner: of the feed-forward.
        copies: states of the feed-forward's inner width alive at once, by its activation function.
        side: of the picture.
        flops: of one picture.
    """

    parameters: int
    tokens: int
    width: int
    inner: int
    copies: int
    side: int
    flops: float

    def peak(self, element: int) -> int:
        """In a feed-forward: its inner states, the embeddings, the layer's input, what it is added to, that normed."""
        states = self.tokens * (self.copies * self.inner + 4 * self.width) * element
        return states + self.pixels(element)

    def pixels(self, element: int) -> int:
        """A picture's shaped pixels, at most float32, and the normalised ones."""
        return 3 * self.side**2 * (4 + element)


def _sizes(config: Mapping[str, Any], width: int, inner: int, layers: int) -> tuple[int, int, int]:
    return (
        int(config.get("hidden_size", width)), int(config.get("intermediate_size", inner)),
        int(config.get("num_hidden_layers", layers)),
    )  # fmt: skip


def _block(d: int, inner: int) -> int:
    """Weights of a transformer layer: four square matrices, the feed-forward, two norms."""
    return 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d


def _block_flops(rows: int, seen: int, d: int, inner: int) -> float:
    """Operations of a layer on ``rows`` tokens that attend to ``seen``."""
    return rows * (2.0 * (4 * d * d + 2 * d * inner) + 4.0 * seen * d)


def _tokens(config: Mapping[str, Any], patch: int) -> int:
    return (int(config.get("image_size", 224)) // int(config.get("patch_size", patch))) ** 2 + 1


def _clip_vision(config: Mapping[str, Any], whole: Mapping[str, Any]) -> _Tower:
    # Values left out are transformers' own: ViT-B/32.
    d, inner, layers = _sizes(config, 768, 3072, 12)
    tokens, patch = _tokens(config, 32), int(config.get("patch_size", 32))
    projection = int(whole.get("projection_dim", 512))
    embeddings = d + 3 * patch**2 * d + tokens * d
    count = embeddings + layers * _block(d, inner) + 4 * d + d * projection
    flops = layers * _block_flops(tokens, tokens, d, inner) + 2.0 * (tokens * 3 * patch**2 * d + d * projection)
    # x * sigmoid(1.702 * x) holds three tensors at once, gelu two.
    copies = 3 if config.get("hidden_act", "quick_gelu") == "quick_gelu" else 2
    return _Tower(count, tokens, d, inner, copies, int(config.get("image_size", 224)), flops)


def _clip_text(config: Mapping[str, Any], whole: Mapping[str, Any]) -> int:
    d, inner, layers = _sizes(config, 512, 2048, 12)
    words, tokens = int(config.get("vocab_size", 49408)), int(config.get("max_position_embeddings", 77))
    return (words + tokens) * d + layers * _block(d, inner) + 2 * d + d * int(whole.get("projection_dim", 512))


def _head(width: int, hidden: Any) -> int:
    sizes = [width, *(int(size) for size in hidden), 1]
    return sum(a * b + b for a, b in pairwise(sizes))


def _image_reward(config: Mapping[str, Any], element: int, max_tokens: int) -> NetworkCost:
    vision, text = config["vision"], config["text"]
    wide, inner, layers = _sizes(vision, 768, 3072, 12)
    tokens, patch = _tokens(vision, 16), int(vision.get("patch_size", 16))
    d, d_inner, d_layers = _sizes(text, 768, 3072, 12)
    seeing = wide + 3 * patch**2 * wide + wide + tokens * wide + layers * _block(wide, inner) + 2 * wide
    flops = layers * _block_flops(tokens, tokens, wide, inner) + 2.0 * tokens * 3 * patch**2 * wide
    # Each text layer attends to the picture's states as well.
    crossing = 2 * (d * d + d) + 2 * (wide * d + d) + 2 * d
    words = int(text.get("vocab_size", 30524)) + int(text.get("max_position_embeddings", 512))
    reading = words * d + 2 * d + d_layers * (_block(d, d_inner) + crossing)
    each = _block_flops(max_tokens, max_tokens, d, d_inner) + max_tokens * (4.0 * d * d + 4.0 * tokens * d)
    flops += d_layers * (each + tokens * 4.0 * wide * d)
    tower = _Tower(0, tokens, wide, inner, 2, int(vision.get("image_size", 224)), 0.0)
    head = _head(d, config["mlp"])
    return NetworkCost(seeing + reading, head, tower.peak(element), flops + 2.0 * head)


def _mps(config: Mapping[str, Any], element: int, max_tokens: int) -> NetworkCost:
    clip, cross = config["clip"], config["cross"]
    vision, text = _clip_vision(clip["vision_config"], clip), _clip_text(clip["text_config"], clip)
    d, layers, p = int(cross["dim"]), int(cross["layers"]), vision.tokens
    heads, size, times = int(cross["heads"]), int(cross.get("head_dim", 64)), int(cross.get("ff_mult", 4))
    wide = heads * size
    attend = d + 2 * d * wide + 2 * size * d + 3 * times * d * d  # norm, to_q and to_out, to_kv, ff_in and ff_out
    block = d + d * (wide + 2 * size + 2 * times * d) + wide * d + times * d * d
    # LayerNorm has a bias, too.
    count = layers * (attend + block + 2 * d)
    flops = vision.flops + 2.0 * p * vision.width * int(clip.get("projection_dim", 512))
    matrices = attend + block - 2 * d - 2 * size * d  # the text's keys and values are of T tokens
    flops += layers * (2.0 * p * matrices + 4.0 * max_tokens * size * d + 4.0 * p * (max_tokens + p) * wide)
    # At its peak in the cross model: both halves of the gated feed-forward, gate, product, and states around them.
    crossing = p * (wide + 2 * size + 4 * times * d + 6 * d) * element + vision.pixels(element)
    return NetworkCost(vision.parameters + text + count, 1, max(vision.peak(element), crossing), flops)
