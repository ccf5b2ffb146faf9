"""What everything but the UNet costs: text encoders and VAE. Bytes; a multiply-add counts as two.

The VAE is followed op by op on a ``Ledger`` as the UNet is. Towers of plain layers are closed formulas of their
widths, which are right to some tens of percent: their activations are small beside their weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from craft_fast.sdxl.costs_ledger import Ledger, Shadow

# Pixels of all images in a strip of the VAE: 32 rows at 1024 px; at SDXL's widths 32 MiB a float32 copy.
STRIP_PIXELS = 32768


@dataclass(frozen=True)
class Cost:
    """Of one network at work.

    Attributes:
        weight_bytes: of its weights.
        activation_bytes: the most that its forward needs besides.
        flops: of that forward.
    """

    weight_bytes: int
    activation_bytes: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        """Both together."""
        return self.weight_bytes + self.activation_bytes


# ---- VAE


class _VaeWalk:
    """AutoencoderKL's encoder or decoder, in inference."""

    def __init__(self, config: Mapping[str, Any], element: int, workspaces: bool) -> None:
        self.config, self.element, self.workspaces = config, element, workspaces
        self.ledger = Ledger()
        self.parameters = 0

    def conv(self, x: Shadow, pixels: int, fan_in: int, fan_out: int, *, side: int = 3) -> Shadow:
        weight = fan_in * fan_out * side**2
        self.parameters += weight + fan_out
        size = pixels * fan_out * self.element
        # In half precision cuDNN lays tensors out anew for its tensor cores; in float32 it works on them as they are.
        scratch = x.size + size if self.workspaces and self.element == 2 else 0
        return self.ledger.op([x], size, flops=2.0 * pixels * weight, scratch=scratch)

    def norm_silu(self, x: Shadow, channels: int) -> Shadow:
        self.parameters += 2 * channels
        x = self.ledger.op([x], x.size)
        return self.ledger.op([x], x.size)

    def resnet(self, x: Shadow, pixels: int, fan_in: int, fan_out: int) -> Shadow:
        hidden = self.norm_silu(x, fan_in)
        hidden = self.conv(hidden, pixels, fan_in, fan_out)
        hidden = self.norm_silu(hidden, fan_out)
        hidden = self.conv(hidden, pixels, fan_out, fan_out)
        if fan_in != fan_out:
            x = self.conv(x, pixels, fan_in, fan_out, side=1)
        total = self.ledger.op([x, hidden], hidden.size)
        return self.ledger.op([total], total.size)

    def attention(self, x: Shadow, images: int, pixels: int, d: int) -> Shadow:
        self.parameters += 2 * d + 4 * (d * d + d)
        normed = self.ledger.op([x], x.size)
        query, key, value = (self.ledger.op([normed], x.size, flops=2.0 * pixels * d * d) for _ in range(3))
        out = self.ledger.op([query, key, value], x.size, flops=4.0 * pixels * (pixels // images) * d)
        out = self.ledger.op([out], x.size, flops=2.0 * pixels * d * d)
        del normed, query, key, value
        return self.ledger.op([out, x], x.size)

    def mid(self, x: Shadow, images: int, pixels: int, d: int) -> Shadow:
        x = self.resnet(x, pixels, d, d)
        if self.config.get("mid_block_add_attention", True):
            x = self.attention(x, images, pixels, d)
        return self.resnet(x, pixels, d, d)

    def decode(self, images: int, height: int, width: int) -> Shadow:
        """``height`` x ``width`` latent pixels to pixels."""
        channels = [int(c) for c in self.config["block_out_channels"]]
        latent, depth = int(self.config["latent_channels"]), int(self.config["layers_per_block"])
        pixels = images * height * width
        x = self.ledger.tensor(pixels * latent * self.element)
        x = self.conv(x, pixels, latent, latent, side=1)  # post_quant_conv
        x = self.conv(x, pixels, latent, channels[-1])
        x = self.mid(x, images, pixels, channels[-1])
        before = channels[-1]
        for level, d in enumerate(reversed(channels)):
            entry = x  # the caller's variable
            for _ in range(depth + 1):
                x = self.resnet(x, pixels, before, d)
                before = d
            if level < len(channels) - 1:
                pixels *= 4
                x = self.ledger.op([x], 4 * x.size)
                x = self.conv(x, pixels, d, d)
            del entry
        x = self.norm_silu(x, channels[0])
        return self.conv(x, pixels, channels[0], int(self.config.get("out_channels", 3)))

    def encode(self, images: int, height: int, width: int) -> Shadow:
        """``height`` x ``width`` latent pixels from pixels."""
        channels = [int(c) for c in self.config["block_out_channels"]]
        latent, depth = int(self.config["latent_channels"]), int(self.config["layers_per_block"])
        pixels = images * height * width * 4 ** (len(channels) - 1)
        colours = int(self.config.get("in_channels", 3))
        x = self.ledger.tensor(pixels * colours * self.element)
        x = self.conv(x, pixels, colours, channels[0])
        before = channels[0]
        for level, d in enumerate(channels):
            entry = x  # the caller's variable
            for _ in range(depth):
                x = self.resnet(x, pixels, before, d)
                before = d
            if level < len(channels) - 1:
                pixels //= 4
                x = self.ledger.op([x], x.size)  # padded on two sides
                x = self.conv(x, pixels, d, d)
            del entry
        x = self.mid(x, images, pixels, channels[-1])
        x = self.norm_silu(x, channels[-1])
        x = self.conv(x, pixels, channels[-1], 2 * latent)
        return self.conv(x, pixels, 2 * latent, 2 * latent, side=1)  # quant_conv


_VAE_NAMES = ("block_out_channels", "in_channels", "latent_channels", "layers_per_block", "mid_block_add_attention",
              "out_channels", "sample_size")  # fmt: skip


def vae_parameters(vae_config: Mapping[str, Any]) -> int:
    """Number of the VAE's parameters, both halves."""
    total = 0
    for half in ("decode", "encode"):
        walk = _VaeWalk(vae_config, 4, False)
        getattr(walk, half)(1, 8, 8)
        total += walk.parameters
    return total


@lru_cache(maxsize=256)
def _vae(frozen: str, half: str, images: int, height: int, width: int, element: int, gpu: bool) -> tuple[int, float]:
    walk = _VaeWalk(json.loads(frozen), element, gpu)
    getattr(walk, half)(images, height, width)
    return walk.ledger.peak, walk.ledger.flops


def _strip_peak(config: Mapping[str, Any], half: str, images: int, height: int, width: int, element: int) -> int:
    """Activations at most of ``vae_strips``, whose layers hold input and output, and strips of the rest."""
    channels = [int(c) for c in config["block_out_channels"]]
    resnets = int(config["layers_per_block"]) + (half == "decode")
    found = 0
    for level, d in enumerate(channels):  # from the full size down
        step = 2 ** (len(channels) - 1 - level)
        pixels = images * height * width * step**2
        rows = min(pixels, STRIP_PIXELS) + 2 * images * width * step
        before = channels[min(max(level + (1 if half == "decode" else -1), 0), len(channels) - 1)]
        # What the decoder's last level begins with is made strip by strip, from a quarter of the pixels.
        made = half == "decode" and level == 0 and len(channels) > 1
        entry = before * pixels * element // (4 if made else 1)
        strips = rows * (before * (4 + element + (2 * element if made else 0)) + d * element)
        found = max(found, entry + d * pixels * element + strips)
        if resnets > 1:
            found = max(found, 2 * d * pixels * element + rows * d * (4 + 3 * element))
    return found


def vae_cost(
    vae_config: Mapping[str, Any],
    *,
    height_px: int,
    width_px: int,
    images: int = 1,
    dtype_bytes: int = 4,
    tiled: bool = False,
    half: str = "decode",
    gpu: bool = True,
) -> Cost:
    """One call of the VAE, of which ``sdxl.vae`` and ``sdxl.vae_strips`` are the two ways.

    Args:
        vae_config: the VAE's configuration.
        height_px: of the images.
        width_px: of the images.
        images: in the call.
        dtype_bytes: of an element.
        tiled: in strips.
        half: ``decode`` or ``encode``.
        gpu: count workspaces of GPU libraries.
    """
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    frozen = json.dumps({name: vae_config[name] for name in _VAE_NAMES if vae_config.get(name) is not None})
    weights = vae_parameters(vae_config) * dtype_bytes
    size = height_px // factor, width_px // factor
    peak, flops = _vae(frozen, half, images, *size, dtype_bytes, gpu)
    if tiled:
        peak = min(peak, _strip_peak(vae_config, half, images, *size, dtype_bytes))
        if half == "decode" and len(vae_config["block_out_channels"]) > 1:
            # The last enlargement's convolution is computed three times.
            flops += 2 * 2.0 * images * height_px * width_px * 9 * int(vae_config["block_out_channels"][1]) ** 2
    return Cost(weights, peak, flops)


# ---- text encoders


def clip_text_cost(config: Mapping[str, Any], *, prompts: int, dtype_bytes: int = 2, projected: bool = False) -> Cost:
    """A CLIP text encoder that returns all its hidden states, as SDXL reads them.

    Args:
        config: its configuration.
        prompts: encoded together.
        dtype_bytes: of an element.
        projected: it has a projection, as SDXL's second one.
    """
    d, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    depth, tokens = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
    block = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    count = (int(config["vocab_size"]) + tokens) * d + depth * block + 2 * d
    if projected:
        count += d * int(config["projection_dim"])
    rows = prompts * tokens
    activations = rows * (d * (depth + 1 + 5) + 2 * inner) * dtype_bytes
    flops = rows * depth * (2.0 * (4 * d * d + 2 * d * inner) + 4.0 * tokens * d)
    return Cost(count * dtype_bytes, activations, flops)
