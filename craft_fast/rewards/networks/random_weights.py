"""Reward networks with random weights at any size, made where they will run: for benchmarks and tests without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from craft_fast.rewards.networks.aesthetic import AestheticReward
from craft_fast.rewards.networks.clip import ClipReward
from craft_fast.rewards.networks.head import ScoreHead
from craft_fast.rewards.networks.image_reward import ImageReward
from craft_fast.rewards.networks.mps import MpsReward
from craft_fast.sdxl.published import materialize

RewardNetwork = ClipReward | AestheticReward | ImageReward | MpsReward


def empty_network(family: str, config: Mapping[str, Any]) -> RewardNetwork:
    """A network without weights, on the meta device, in eval mode and without gradients.

    Args:
        family: clip, aesthetic, image_reward or mps.
        config: as in ``published.OFFICIAL``.
    """
    network: RewardNetwork
    with torch.device("meta"):
        if family == "clip":
            network = ClipReward(CLIPModel(CLIPConfig(**config)))
        elif family == "aesthetic":
            tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["tower"]))
            first, second, third, fourth = config["head"]
            network = AestheticReward(tower, ScoreHead(tower.config.projection_dim, (first, second, third, fourth)))
        elif family == "image_reward":
            network = ImageReward(dict(config))
        else:
            network = MpsReward(config)
    network.eval().requires_grad_(False)
    return network


def random_network(
    family: str, config: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> RewardNetwork:
    """A network with random weights, drawn in place on ``device``; equal seeds, devices and dtypes, equal weights.

    Args:
        family: clip, aesthetic, image_reward or mps.
        config: as in ``published.OFFICIAL``.
        device: where.
        dtype: of the weights; heads are float32, as ``read_network`` leaves them.
        seed: of the weights.
    """
    network = empty_network(family, config)
    materialize(network, device, dtype)
    for head in (module for module in network.modules() if isinstance(module, ScoreHead)):
        head.float()
    _fill(network, torch.Generator(device).manual_seed(seed))
    return network


@torch.no_grad()
def _fill(network: nn.Module, generator: torch.Generator) -> None:
    """Weights of standard deviation fan_in ** -0.5: activations keep their size. Heads without bias are not blind."""
    for layer in network.modules():
        norm = isinstance(layer, nn.LayerNorm)
        for name, parameter in layer.named_parameters(recurse=False):
            if norm and name == "weight":
                parameter.fill_(1.0)
            elif name == "logit_scale":
                parameter.fill_(4.6052)  # e to it is 100, as trained
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter.shape[1:].numel()
                parameter.normal_(0.0, float(fan_in) ** -0.5, generator=generator)
