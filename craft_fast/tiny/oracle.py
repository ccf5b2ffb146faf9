"""The oracle: a program, no network, that judges a 64x64 picture against a caption of the small world.

It finds the background and the connected things, reads their colour and shape, and checks count, shape, colour,
relation and background. Cleanliness is the distance of every pixel from the flat colours the picture should be
made of. Everything is batched: B pictures, S = 64 px, at most two things are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError
from craft_fast.tiny.render import BACKGROUND_PALETTE, OBJECT_PALETTE, SIZE_PX, encode_scene, shape_distance
from craft_fast.tiny.world import RELATIONS, SHAPES, parse

# Clean renderings through the autoencoder reach 0.84 at their first percentile; blurred ones are at 0.74 in the median.
CLEAN_THRESHOLD = 0.80
_MIN_AREA_PX = 30
_TEMPLATE_PX = 24
_MIN_IOU = 0.70


@dataclass
class Findings:
    """What the oracle sees.

    Attributes:
        count: things found, [B].
        shape: index into ``SHAPES`` of the two largest things, [B, 2]; -1: none.
        colour: index into ``COLOURS``, [B, 2]; -1: none.
        centre: (x, y) in px, [B, 2, 2].
        background: index into ``BACKGROUNDS``, [B].
        clean: cleanliness 0 to 1, [B].
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    centre: Tensor
    background: Tensor
    clean: Tensor


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """Masks [shapes, T, T] of each shape, stretched to its bounding box."""
    axis = (torch.arange(512, dtype=torch.float32) + 0.5) / 512 * 2.4 - 1.2
    dy, dx = torch.meshgrid(axis, axis, indexing="ij")
    found = []
    for index in range(len(SHAPES)):
        inside = shape_distance(torch.tensor([[index]]), dx, dy, torch.tensor(1.0)) < 0
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        crop = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
        found.append(F.interpolate(crop[None, None], (_TEMPLATE_PX, _TEMPLATE_PX), mode="area")[0, 0] > 0.5)
    return torch.stack(found).float()


def _components(mask: Tensor) -> Tensor:
    """Labels [B, S, S] of 8-connected regions of mask [B, S, S]: the largest pixel number of each; 0 outside."""
    size = mask.shape[-1]
    labels = (torch.arange(1, size * size + 1, device=mask.device, dtype=torch.float32).reshape(1, size, size)) * mask
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _shape_of(mask: Tensor) -> Tensor:
    """Shape index [B] of single-thing masks [B, S, S] by overlap with the templates; -1 where none fits."""
    rows, columns = mask.any(2), mask.any(1)
    axis = torch.arange(SIZE_PX, device=mask.device)
    top = torch.where(rows, axis, SIZE_PX).amin(1)
    bottom = torch.where(rows, axis, -1).amax(1) + 1
    left = torch.where(columns, axis, SIZE_PX).amin(1)
    right = torch.where(columns, axis, -1).amax(1) + 1
    steps = (torch.arange(_TEMPLATE_PX, device=mask.device) + 0.5) / _TEMPLATE_PX
    x = (left[:, None] + steps * (right - left)[:, None]) / SIZE_PX * 2 - 1
    y = (top[:, None] + steps * (bottom - top)[:, None]) / SIZE_PX * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    box = F.grid_sample(mask[:, None].float(), grid, mode="bilinear", align_corners=False)[:, 0] > 0.5
    templates = _templates().to(mask.device)
    both = torch.einsum("bij,sij->bs", box.float(), templates)
    union = box.sum((1, 2))[:, None] + templates.sum((1, 2))[None] - both
    iou, index = (both / union.clamp(min=1)).max(1)
    # A thing twice as wide as tall is none of the shapes, however well its box is filled.
    ratio = (right - left) / (bottom - top).clamp(min=1)
    return torch.where((iou >= _MIN_IOU) & (ratio > 0.6) & (ratio < 1.67), index, -1)


def _nearest(colour: Tensor, palette: Tensor) -> Tensor:
    return torch.cdist(colour, palette.to(colour.device)).argmin(-1)


def look(images: Tensor) -> Findings:
    """Look at pictures uint8 [B, 3, S, S].

    Raises:
        ValueError: the pictures are not S x S; the oracle knows this world only.
    """
    if images.shape[1:] != (3, SIZE_PX, SIZE_PX):
        raise ValueError(f"images must be [B, 3, {SIZE_PX}, {SIZE_PX}], found {tuple(images.shape)}")
    pixels = images.float()
    smooth = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    frame = torch.cat(
        [
            smooth[:, :, :2].flatten(2),
            smooth[:, :, -2:].flatten(2),
            smooth[..., :2].flatten(2),
            smooth[..., -2:].flatten(2),
        ],
        2,
    )
    back = frame.median(2).values
    background = _nearest(back, BACKGROUND_PALETTE)
    distance = (smooth - back[:, :, None, None]).norm(dim=1)
    strongest = distance.flatten(1).quantile(0.98, dim=1)
    mask = distance > (0.35 * strongest).clamp(min=28.0)[:, None, None]
    labels = _components(mask)
    batch = images.shape[0]
    area = torch.zeros(batch, SIZE_PX * SIZE_PX + 1, device=images.device)
    area.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1), dtype=torch.float32))
    area[:, 0] = 0
    count = (area >= _MIN_AREA_PX).sum(1)
    top_area, top_label = area.topk(2, dim=1)
    shapes, colours, centres = [], [], []
    ideal = BACKGROUND_PALETTE.to(images.device)[background][:, :, None, None].expand_as(pixels).clone()
    gap = (pixels - ideal).norm(dim=1)
    axis = torch.arange(SIZE_PX, device=images.device) + 0.5
    for thing in range(2):
        seen = top_area[:, thing] >= _MIN_AREA_PX
        region = (labels == top_label[:, thing, None, None]) & seen[:, None, None]
        core = 1 - F.max_pool2d(1 - region[:, None].float(), 3, 1, 1)[:, 0]
        core = torch.where(core.sum((1, 2), keepdim=True) >= 8, core, region.float())
        weight = core.sum((1, 2)).clamp(min=1)
        colour = _nearest((pixels * core[:, None]).sum((2, 3)) / weight[:, None], OBJECT_PALETTE)
        total = region.sum((1, 2)).clamp(min=1)
        centres.append(torch.stack([(region.sum(1) * axis).sum(1) / total, (region.sum(2) * axis).sum(1) / total], -1))
        shapes.append(torch.where(seen, _shape_of(region), -1))
        colours.append(torch.where(seen, colour, -1))
        flat = OBJECT_PALETTE.to(images.device)[colour][:, :, None, None]
        wide = F.max_pool2d(region[:, None].float(), 3, 1, 1)[:, 0] > 0
        gap = torch.where(wide, torch.minimum(gap, (pixels - flat).norm(dim=1)), gap)
    things = F.max_pool2d(mask[:, None].float(), 5, 1, 2)[:, 0]
    inside = (gap * things).sum((1, 2)) / things.sum((1, 2)).clamp(min=1)
    outside = (gap * (1 - things)).sum((1, 2)) / (1 - things).sum((1, 2)).clamp(min=1)
    clean = torch.exp(-(inside + outside) / 2 / 60.0)
    return Findings(count, torch.stack(shapes, 1), torch.stack(colours, 1), torch.stack(centres, 1), background, clean)


def checks_met(found: Findings, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Checks met and checks made, each [B], of findings against scene codes [B, 7] (see ``render.encode_scene``).

    Checks: count, the shape and the colour of each thing asked for, the relation, the background where named.
    Two things are matched to the two asked for in the way that meets more checks.
    """
    wanted_shape, wanted_colour = codes[:, [0, 2]], codes[:, [1, 3]]
    pair = codes[:, 5] == 2
    related = codes[:, 4] < len(RELATIONS)
    named = codes[:, 6] >= 0
    best = torch.full(codes.shape[:1], -1.0, device=codes.device)
    for order in ([0, 1], [1, 0]):
        shape, colour, centre = found.shape[:, order], found.colour[:, order], found.centre[:, order]
        attributes = (shape == wanted_shape).float() + (colour == wanted_colour).float()
        met = attributes[:, 0] + torch.where(pair, attributes[:, 1], 0.0)
        step = centre[:, 1] - centre[:, 0]
        there = (found.colour >= 0).all(1)
        along = torch.stack([step[:, 0], -step[:, 0], step[:, 1], -step[:, 1]], 1)
        across = torch.stack([step[:, 1], step[:, 1], step[:, 0], step[:, 0]], 1).abs()
        index = codes[:, 4].clamp(max=3)[:, None]
        holds = (along.gather(1, index) > across.gather(1, index)).squeeze(1) & (along.gather(1, index) > 8).squeeze(1)
        met = met + (related & there & holds).float()
        best = torch.maximum(best, met)
    met = best + (found.count == codes[:, 5]).float() + (named & (found.background == codes[:, 6])).float()
    made = 1.0 + 2.0 * codes[:, 5] + related.float() + named.float()
    return met, made


def _judge(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    scenes = [parse(prompt) for prompt in prompts]
    unknown = [prompt for prompt, scene in zip(prompts, scenes, strict=True) if scene is None]
    if unknown:
        raise ConfigError(
            "The oracle cannot read a prompt: it knows the captions of the small world only",
            where=repr(unknown[0][:80]),
            why="it reads: a COLOUR SHAPE [RELATION a COLOUR SHAPE], or two COLOUR SHAPES, then [on a X background]",
            hint="reword it, or leave the oracle out: --set rewards.oracle=null --set rewards.oracle_alignment=null",
        )
    codes = torch.tensor([encode_scene(scene) for scene in scenes if scene is not None], device=images.device)
    found = look(images)
    met, made = checks_met(found, codes)
    return met / made, found.clean


def alignment(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``oracle_alignment``: share of checks met, float32 [B], 0 to 1. Images uint8 [B, 3, 64, 64]."""
    return _judge(images, prompts)[0]


def clean(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``oracle_clean``: cleanliness float32 [B], 0 to 1; exp(-mean distance to flat colours / 60)."""
    return look(images).clean


def passed(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``oracle``: 1.0 where all checks are met and cleanliness reaches ``CLEAN_THRESHOLD``, else 0.0; [B]."""
    share, cleanliness = _judge(images, prompts)
    return ((share > 0.999) & (cleanliness >= CLEAN_THRESHOLD)).float()
