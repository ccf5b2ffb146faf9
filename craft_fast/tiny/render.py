"""Pictures of scenes, batched in torch: B pictures, N = 2 things, S = 64 px.

Shapes are drawn from signed distances with one pixel of antialiasing; flaws are blur, noise and fading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_fast.tiny.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene

SIZE_PX = 64
OBJECT_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
BACKGROUND_PALETTE = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
_COLOUR_INDEX = {name: i for i, name in enumerate(COLOURS)}
_BACKGROUND_INDEX = {name: i for i, name in enumerate(BACKGROUNDS)}
_ALIKE = len(RELATIONS)  # relation code of two things alike: any arrangement
_SINGLE = len(RELATIONS) + 1


def encode_scene(scene: Scene) -> list[int]:
    """Scene to seven integers: shape 1, colour 1, shape 2, colour 2, relation, count, background (-1: open)."""
    first, last = scene.things[0], scene.things[-1]
    count = len(scene.things)
    relation = RELATIONS.index(scene.relation) if scene.relation else (_ALIKE if count == 2 else _SINGLE)
    return [
        SHAPES.index(first.shape), _COLOUR_INDEX[first.colour], SHAPES.index(last.shape), _COLOUR_INDEX[last.colour],
        relation, count, _BACKGROUND_INDEX[scene.background] if scene.background else -1,
    ]  # fmt: skip


@dataclass
class Layout:
    """Where things stand: centres [B, 2, 2] (x, y) and radii [B, 2], in px."""

    centre: Tensor
    radius: Tensor


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def random_layout(codes: Tensor, generator: torch.Generator) -> Layout:
    """Draw a layout for scene codes [B, 7] that keeps things apart and the relation plain to see."""
    batch = codes.shape[0]
    relation = codes[:, 4].clone()
    alike = relation == _ALIKE
    relation[alike] = torch.randint(0, 4, (batch,), generator=generator, device=codes.device)[alike]
    near, far = _uniform(14, 20, (batch,), generator), _uniform(44, 50, (batch,), generator)
    middle = _uniform(26, 38, (batch, 1), generator) + _uniform(-4, 4, (batch, 2), generator)
    first_near = (relation == 0) | (relation == 2)  # left of, above
    along = torch.stack([torch.where(first_near, near, far), torch.where(first_near, far, near)], 1)
    horizontal = (relation < 2)[:, None]
    x, y = torch.where(horizontal, along, middle), torch.where(horizontal, middle, along)
    single = codes[:, 5] == 1
    alone = _uniform(22, 42, (batch, 2), generator)
    x[:, 0], y[:, 0] = torch.where(single, alone[:, 0], x[:, 0]), torch.where(single, alone[:, 1], y[:, 0])
    radius = _uniform(8.0, 11.5, (batch, 2), generator)
    radius[:, 0] = torch.where(single, _uniform(10, 15, (batch,), generator), radius[:, 0])
    return Layout(torch.stack([x, y], -1), radius)


def shape_distance(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance, in px and negative inside, of offsets (dx, dy) from a shape of radius r."""
    circle = torch.hypot(dx, dy) - r
    side = 0.88 * r
    square = torch.maximum(dx.abs(), dy.abs()) - side
    # Isosceles triangle, apex up: base at +0.8 r, apex at -r, sides of slope 1.8 r : 0.98 r.
    slope = 0.98 / 1.8
    norm = (1 + slope * slope) ** 0.5
    triangle = torch.maximum((dx.abs() - slope * (dy + r)) / norm, dy - 0.8 * r)
    arm = 0.34 * r
    cross = torch.minimum(torch.maximum(dx.abs() - arm, dy.abs() - r), torch.maximum(dx.abs() - r, dy.abs() - arm))
    choices = torch.stack([circle, square, triangle, cross])
    index = shape.expand(choices.shape[1:])[None]
    return torch.gather(choices, 0, index)[0]


def render(codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clean pictures of scene codes [B, 7] int64, on the codes' device.

    Returns:
        images float32 [B, 3, S, S] in 0..255, and the codes with open backgrounds filled in.
    """
    codes = codes.clone()
    device = codes.device
    open_background = codes[:, 6] < 0
    codes[open_background, 6] = torch.randint(
        0, len(BACKGROUNDS), (codes.shape[0],), generator=generator, device=device
    )[open_background]
    layout = random_layout(codes, generator)
    axis = torch.arange(SIZE_PX, device=device, dtype=torch.float32) + 0.5
    dx = axis[None, None, None, :] - layout.centre[:, :, 0, None, None]
    dy = axis[None, None, :, None] - layout.centre[:, :, 1, None, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    shape = codes[:, [0, 2], None, None]
    cover = (0.5 - shape_distance(shape, dx, dy, layout.radius[:, :, None, None])).clamp(0, 1)
    cover[:, 1] *= (codes[:, 5] == 2)[:, None, None]
    image = BACKGROUND_PALETTE.to(device)[codes[:, 6]][:, :, None, None].expand(-1, -1, SIZE_PX, SIZE_PX)
    palette = OBJECT_PALETTE.to(device)
    for thing, column in ((0, 1), (1, 3)):
        colour = palette[codes[:, column]][:, :, None, None]
        image = image + cover[:, thing, None] * (colour - image)
    return image, codes


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of [B, 3, S, S] by a sigma [B] in px for each picture."""
    taps = torch.arange(-5, 6, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (taps[None] / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    batch = image.shape[0]
    flat = F.pad(image.reshape(1, batch * 3, *image.shape[2:]), (5, 5, 5, 5), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * 3)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * 3)
    return flat.reshape(image.shape)


def add_flaws(image: Tensor, flaws: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and fade pictures [B, 3, S, S] where flaws [B, 3] bool says so; result 0..255."""
    batch = image.shape[0]
    sigma = _uniform(1.2, 2.4, (batch,), generator)
    image = torch.where(flaws[:, 0, None, None, None], blur(image, sigma), image)
    keep = _uniform(0.35, 0.7, (batch, 1, 1, 1), generator)
    image = torch.where(flaws[:, 2, None, None, None], 128 + keep * (image - 128), image)
    level = _uniform(15, 40, (batch, 1, 1, 1), generator)
    noise = torch.randn(image.shape, generator=generator, device=image.device) * level
    image = torch.where(flaws[:, 1, None, None, None], image + noise, image)
    return image.clamp(0, 255)


def to_uint8(image: Tensor) -> Tensor:
    """Float pictures 0..255 to uint8, rounded."""
    return image.round().clamp(0, 255).to(torch.uint8)
