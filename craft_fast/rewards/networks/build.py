"""From files to a network: the one place that knows official layouts, configurations and families together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.quiet import quiet_progress_bars
from craft_fast.rewards import published
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.costs import NetworkCost, network_cost
from craft_fast.rewards.keys import pieces, recognise
from craft_fast.rewards.networks.aesthetic import AestheticReward, head_sizes, read_head
from craft_fast.rewards.networks.attention import Kind, set_tower_attention
from craft_fast.rewards.networks.clip import ClipReward
from craft_fast.rewards.networks.filling import TensorFile, fill, read_tensors, unfilled
from craft_fast.rewards.networks.image_reward import ImageReward
from craft_fast.rewards.networks.mps import MpsReward

RewardNetwork = ClipReward | AestheticReward | ImageReward | MpsReward


def read_network(
    spec: Preprocessing,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype = torch.float32,
    attention: Kind = "auto",
    device: torch.device | str = "cpu",
) -> RewardNetwork:
    """Read a reward's network onto the CPU, in eval mode, without gradients.

    Args:
        spec: family, and what of its score is the network's: scale (clip, mps), mean and std (image_reward),
            threshold (mps). ``score_floor`` and MPS's condition are the caller's: ``network.set_condition``.
        files: by role: ``weights`` (safetensors, or an official .pt or .pth), ``config`` (config.json; without one the
            published configuration of the weights' size is taken), ``head`` (aesthetic). Others are not looked at.
        dtype: of the weights; heads and single numbers are float32.
        attention: see ``set_tower_attention``.
        device: where the network will run; xformers is tried there.

    Raises:
        EnvironmentProblem: a file is missing, or xformers is asked for and does not run there.
        IntegrityError: damaged or hostile files, keys or shapes that do not fit.
    """
    quiet_progress_bars()
    weights = _needed(files, "weights")
    try:
        file = read_tensors(weights)
        config = read_config(spec, files, file)
        network: RewardNetwork = _FAMILIES[spec.family](spec, files, file, config, dtype)
    except (CraftError, MemoryError):
        raise
    except Exception as error:  # a configuration that is not right fails in many ways inside transformers
        raise _unfit(weights, error) from None
    set_tower_attention(network, attention, device=device)
    network.eval().requires_grad_(False)
    return network


def read_config(spec: Preprocessing, files: Mapping[str, Path], file: TensorFile) -> dict[str, Any]:
    """The configuration that ``read_network`` uses, in the form of ``published``'s for the family.

    Raises:
        IntegrityError: config.json is no JSON object, or there is none and the weights are of no published size.
    """
    given: dict[str, Any] = {}
    if "config" in files:
        try:
            given = json.loads(_needed(files, "config").read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError("A configuration is not JSON.", where=str(files["config"]), why=str(error)) from None
        if not isinstance(given, dict):
            raise IntegrityError("A configuration is not a JSON object.", where=str(files["config"]))
    found = _complete(spec.family, given, file.shapes)
    if found is None:
        raise IntegrityError(
            "The weights are of no published size, and no configuration is beside them.",
            where=str(file.path),
            why=f"they hold {', '.join(sorted(file.shapes)[:4]) or 'no tensors'}",
            hint="use the file that the model was published with, or put its config.json beside it",
        )
    return found


def _complete(family: str, given: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    if family == "image_reward":
        if "vision" in given:
            return given
        # med_config.json of BLIP describes the text encoder alone, in BERT's words, some of which are not BLIP's.
        text = {name: value for name, value in given.items() if name in published.BLIP["text"]}
        return {**published.BLIP, "text": {**published.BLIP["text"], **text}}
    if family == "mps":
        return given if "cross" in given else published.MPS
    known = published.clip_of(_vision_width(shapes))
    if family == "clip":
        # By way of transformers' class: what a config.json leaves out, or says twice, is decided there.
        return dict(CLIPConfig(**given).to_dict()) if given else known
    if "vision_config" in given or (not given and known is not None):
        whole = CLIPConfig(**given).to_dict() if given else known or {}
        # A whole CLIP's own projection_dim rules; the one in its vision_config may be a default that nothing uses.
        return {"tower": {**whole["vision_config"], "projection_dim": whole["projection_dim"]}}
    return {"tower": CLIPVisionConfig(**given).to_dict()} if given else None


def _vision_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    for name in ("vision_model.embeddings.class_embedding", "visual.class_embedding"):
        if len(shapes.get(name, ())) == 1:
            return shapes[name][0]
    return 0


def _clip(
    spec: Preprocessing, files: Mapping[str, Path], file: TensorFile, config: dict[str, Any], dtype: torch.dtype
) -> ClipReward:
    clip = unfilled(lambda: CLIPModel(CLIPConfig(**config)), dtype)
    fill(clip, file, dtype, pieces(recognise(file.shapes, "clip"), file.shapes, file.path))
    network = ClipReward(clip)
    network.score_scale = network.logit_scale() if spec.score_scale == "logit_scale" else float(spec.score_scale)
    return network


def _aesthetic(
    spec: Preprocessing, files: Mapping[str, Path], file: TensorFile, config: dict[str, Any], dtype: torch.dtype
) -> AestheticReward:
    tower = unfilled(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config["tower"])), dtype)
    fill(tower, file, dtype, pieces("tower", file.shapes, file.path))
    head_file = read_tensors(_needed(files, "head"))
    width = head_sizes(head_file.shapes)[0]
    if width != tower.config.projection_dim:
        raise IntegrityError(
            "The aesthetic head is not of this image tower.",
            where=str(head_file.path),
            why=f"it takes {width} numbers, the tower gives {tower.config.projection_dim}",
            hint="the published head belongs to openai/clip-vit-large-patch14",
        )
    return AestheticReward(tower, read_head(head_file))


def _image_reward(
    spec: Preprocessing, files: Mapping[str, Path], file: TensorFile, config: dict[str, Any], dtype: torch.dtype
) -> ImageReward:
    network: ImageReward = unfilled(lambda: ImageReward(config), dtype)
    fill(network, file, dtype, pieces(recognise(file.shapes, "image_reward"), file.shapes, file.path))
    network.mlp.float()
    network.score_mean, network.score_std = spec.score_mean, spec.score_std
    return network


def _mps(
    spec: Preprocessing, files: Mapping[str, Path], file: TensorFile, config: dict[str, Any], dtype: torch.dtype
) -> MpsReward:
    network: MpsReward = unfilled(lambda: MpsReward(config, threshold=spec.threshold), dtype)
    fill(network, file, dtype, pieces(recognise(file.shapes, "mps"), file.shapes, file.path))
    network.score_scale = network.logit_scale() if spec.score_scale == "logit_scale" else float(spec.score_scale)
    return network


_FAMILIES: dict[str, Any] = {
    "clip": _clip,
    "aesthetic": _aesthetic,
    "image_reward": _image_reward,
    "mps": _mps,
}


def _needed(files: Mapping[str, Path], role: str) -> Path:
    path = files.get(role)
    if path is None or not Path(path).is_file():
        raise EnvironmentProblem(
            "A reward's file is missing.",
            where=str(path or ""),
            why=f"there is no file for its {role}",
            hint="craft-fast rewards fetch gets it, or says where it has to be put",
        )
    return Path(path)


def _unfit(where: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        "A reward's files do not fit together.",
        where=str(where),
        why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        hint="config.json and the weights must be of one model of the reward's family",
    )


def cost_of(spec: Preprocessing, files: Mapping[str, Path], dtype: torch.dtype) -> NetworkCost:
    """What the network of some files takes: from its configuration and the names in its files, no weight is read.

    Args:
        spec: family, and tokens of a prompt.
        files: as for ``read_network``.
        dtype: of the weights.

    Raises:
        EnvironmentProblem, IntegrityError: as ``read_network``, as far as names and configuration show it.
    """
    weights = _needed(files, "weights")
    try:
        config = read_config(spec, files, read_tensors(weights))
        if spec.family == "aesthetic":
            config["head"] = head_sizes(read_tensors(_needed(files, "head")).shapes)[1:]
        return network_cost(spec.family, config, element=dtype.itemsize, max_tokens=spec.max_tokens)
    except (CraftError, MemoryError):
        raise
    except Exception as error:
        raise _unfit(weights, error) from None


def weight_bytes(spec: Preprocessing, files: Mapping[str, Path], dtype: torch.dtype) -> int:
    """Memory of the weights that ``read_network`` would hold; arguments and errors as ``cost_of``."""
    return cost_of(spec, files, dtype).weight_bytes(dtype.itemsize)


def forward_cost(spec: Preprocessing, files: Mapping[str, Path], dtype: torch.dtype) -> tuple[int, float]:
    """Bytes of activations and GFLOP for one picture; texts that are encoded once are not in it. As ``cost_of``."""
    cost = cost_of(spec, files, dtype)
    return cost.image_bytes, cost.image_flops / 1e9
