"""An ``AutoencoderKL`` in strips of rows: what the whole picture gives, in a third of its memory.

Tiles that are decoded one by one each see their own group norms, and the picture shows it: on the packaged VAE, 64 px
in tiles of 32 px, pixels differ by 13 of 255 in the mean and by 116 at most. Here each layer is done for the whole
picture before the next, but strip by strip: norms take their mean and variance from all rows, convolutions the rows
around a strip, so nothing but rounding differs. Held at a time are a layer's input and output; its normed, activated,
enlarged and padded copies, of which the usual way holds several, are as large as a strip. A residual block's second
convolution writes over its own input. The decoder's largest tensor, what its last level begins with, is not held at
all: its rows are made from the level before each time they are read, three times, for a quarter more arithmetic.

Shapes: B images, C channels, H x W pixels of the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from craft_fast.sdxl.costs_parts import STRIP_PIXELS


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, *, strip_pixels: int | None = None) -> torch.Tensor:
    """``vae.decode(latents)``.

    Args:
        vae: an ``AutoencoderKL``.
        latents: [B, 4, h, w], VAE space, its dtype.
        strip_pixels: size of a strip; None: ``STRIP_PIXELS``.

    Returns:
        [B, 3, H, W].
    """
    decoder, strip_pixels = vae.decoder, strip_pixels or STRIP_PIXELS
    x = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    source: _Rows = _Held(decoder.mid_block(decoder.conv_in(x)))  # the smallest level
    del x
    # In one frame: a caller's variable would keep a layer's input alive while the next layer works.
    for level, block in enumerate(decoder.up_blocks):
        if type(block).__name__ != "UpDecoderBlock2D":  # a kind that is not known is done as a whole
            source = _Held(block(_all(source, strip_pixels)))
            continue
        for resnet in block.resnets:
            source = _Held(_resnet(resnet, source, strip_pixels))
        for upsampler in block.upsamplers or ():
            source = _Enlarged(upsampler.conv, source)
            if level < len(decoder.up_blocks) - 2:
                source = _Held(_all(source, strip_pixels))
    return _conv(source, decoder.conv_out, _Norm(decoder.conv_norm_out, source, strip_pixels), strip_pixels)


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor, *, strip_pixels: int | None = None) -> torch.Tensor:
    """``vae.encode(images).latent_dist.mode()``.

    Args:
        vae: an ``AutoencoderKL``.
        images: [B, 3, H, W] in [-1, 1], its dtype.
        strip_pixels: size of a strip; None: ``STRIP_PIXELS``.

    Returns:
        [B, 4, h, w], VAE space.
    """
    encoder, strip_pixels = vae.encoder, strip_pixels or STRIP_PIXELS
    source: _Rows = _Held(_conv(_Held(images), encoder.conv_in, None, strip_pixels))
    for block in encoder.down_blocks:
        if type(block).__name__ != "DownEncoderBlock2D":
            source = _Held(block(_all(source, strip_pixels)))
            continue
        for resnet in block.resnets:
            source = _Held(_resnet(resnet, source, strip_pixels))
        for downsampler in block.downsamplers or ():
            source = _Held(_reduce(downsampler.conv, source, strip_pixels))
    source = _Held(encoder.mid_block(_all(source, strip_pixels)))
    x = _conv(source, encoder.conv_out, _Norm(encoder.conv_norm_out, source, strip_pixels), strip_pixels)
    x = x if vae.quant_conv is None else vae.quant_conv(x)
    return x.chunk(2, dim=1)[0]  # mean and log-variance


# ---- what a layer reads


class _Rows(Protocol):
    """A tensor [B, C, H, W] of which some rows at a time are read.

    Attributes:
        shape: B, C, H, W.
    """

    shape: tuple[int, ...]

    def rows(self, low: int, high: int) -> torch.Tensor:
        """Rows ``low`` to ``high``, that one excluded."""


class _Held:
    """Rows of a tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape: tuple[int, ...] = tuple(tensor.shape)

    def rows(self, low: int, high: int) -> torch.Tensor:
        """A view."""
        return self.tensor[:, :, low:high]


class _Enlarged:
    """Rows of ``conv(nearest neighbour to twice the size)``, made when they are read."""

    def __init__(self, conv: nn.Conv2d, source: _Rows) -> None:
        batch, _, height, width = source.shape
        self.conv, self.source = conv, source
        self.shape: tuple[int, ...] = (batch, conv.out_channels, 2 * height, 2 * width)

    def rows(self, low: int, high: int) -> torch.Tensor:
        """Computed anew, with the same bits each time for the same rows."""
        height = self.shape[2]
        above, below = max(low - 1, 0), min(high + 1, height)
        first = above // 2
        rows = F.interpolate(self.source.rows(first, (below + 1) // 2), scale_factor=2.0, mode="nearest")
        rows = rows[:, :, above - 2 * first : below - 2 * first]
        return _conv_rows(rows, self.conv, above - low + 1, high + 1 - below)


def _all(source: _Rows, strip_pixels: int) -> torch.Tensor:
    """The whole tensor."""
    if isinstance(source, _Held):
        return source.tensor
    out: torch.Tensor | None = None
    for start, stop in _strips(source.shape, strip_pixels):
        rows = source.rows(start, stop)
        out = rows.new_empty(source.shape) if out is None else out
        out[:, :, start:stop] = rows
    assert out is not None
    return out


def _strips(shape: tuple[int, ...], strip_pixels: int) -> Iterator[tuple[int, int]]:
    """First and last row, that one excluded, of each strip of a tensor [B, C, H, W]."""
    batch, _, height, width = shape
    rows = max(1, strip_pixels // (batch * width))
    return ((start, min(start + rows, height)) for start in range(0, height, rows))


# ---- layers


class _Norm:
    """A group norm and SiLU whose statistics are those of all rows of ``source``; for any of them.

    Args:
        norm: the layer.
        source: what is normed.
        strip_pixels: read at a time.
    """

    def __init__(self, norm: nn.GroupNorm, source: _Rows, strip_pixels: int) -> None:
        batch, channels, height, _ = source.shape
        # float64 where strips come together: [B, groups] numbers.
        first = torch.zeros(batch, norm.num_groups, device=norm.weight.device, dtype=torch.float64)
        second = torch.zeros_like(first)
        for start, stop in _strips(source.shape, strip_pixels):
            rows = source.rows(start, stop).reshape(batch, norm.num_groups, -1).float()
            variance, mean = torch.var_mean(rows, dim=-1, correction=0)
            share = (stop - start) / height
            first += share * mean.double()
            second += share * (variance.double() + mean.double() ** 2)
        rstd = (second - first**2 + norm.eps).rsqrt()
        per_channel = channels // norm.num_groups
        scale = rstd.repeat_interleave(per_channel, 1) * norm.weight.double()
        shift = norm.bias.double() - first.repeat_interleave(per_channel, 1) * scale
        self.scale, self.shift = scale.float()[:, :, None, None], shift.float()[:, :, None, None]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, C, rows, W], normed and activated, in its own dtype."""
        normed = rows * self.scale  # float32
        normed += self.shift
        return F.silu(normed, inplace=True).to(rows.dtype)


def _conv_rows(rows: torch.Tensor, conv: nn.Conv2d, above: int, below: int) -> torch.Tensor:
    """A 3 x 3 convolution of rows with their neighbours; ``above`` and ``below`` of these are the picture's border."""
    if above or below:
        rows = F.pad(rows, (0, 0, above, below))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _conv(source: _Rows, conv: nn.Conv2d, norm: _Norm | None, strip_pixels: int) -> torch.Tensor:
    """``conv(silu(norm(source)))``, or ``conv(source)``; 3 x 3."""
    batch, _, height, width = source.shape
    out = conv.weight.new_empty(batch, conv.out_channels, height, width)
    for start, stop in _strips(source.shape, strip_pixels):
        low, high = max(start - 1, 0), min(stop + 1, height)
        rows = source.rows(low, high)
        rows = rows if norm is None else norm(rows)
        out[:, :, start:stop] = _conv_rows(rows, conv, low - start + 1, stop + 1 - high)
    return out


def _resnet(block: Any, source: _Rows, strip_pixels: int) -> torch.Tensor:
    """A ``ResnetBlock2D`` without time: ``(shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))) / scale``."""
    hidden = _conv(source, block.conv1, _Norm(block.norm1, source, strip_pixels), strip_pixels)
    norm = _Norm(block.norm2, _Held(hidden), strip_pixels)
    height = hidden.shape[2]
    above = hidden[:, :, :0]  # the row above a strip as it was before the strip there was written over
    for start, stop in _strips(source.shape, strip_pixels):
        high = min(stop + 1, height)
        rows = torch.cat([above, hidden[:, :, start:high]], dim=2)
        above = hidden[:, :, stop - 1 : stop].clone()
        residual = _conv_rows(norm(rows), block.conv2, int(start == 0), stop + 1 - high)
        same = source.rows(start, stop)
        same = same if block.conv_shortcut is None else block.conv_shortcut(same)
        hidden[:, :, start:stop] = (same + residual) / block.output_scale_factor
    return hidden


def _reduce(conv: nn.Conv2d, source: _Rows, strip_pixels: int) -> torch.Tensor:
    """The convolution of stride 2 to half the size, padded at the right and at the bottom alone."""
    batch, _, height, width = source.shape
    out = conv.weight.new_empty(batch, conv.out_channels, height // 2, width // 2)
    for start, stop in _strips((batch, 0, height // 2, width), strip_pixels):
        high = min(2 * stop + 1, height)
        rows = F.pad(source.rows(2 * start, high), (0, 1, 0, 2 * stop + 1 - high))
        out[:, :, start:stop] = F.conv2d(rows, conv.weight, conv.bias, stride=2)
    return out
