"""Writes a published reward at FULL size with random weights, or reads one and scores pictures; prints what it took.

    python -m tests.unit.full_size_reward write NAME FOLDER
    python -m tests.unit.full_size_reward score NAME FOLDER [DTYPE]

Names and shapes are those of tests/unit/facts. One process for each, so that the peak of reading is that of reading.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.quiet import quiet_third_party

quiet_third_party()

from craft_fast.rewards.base import Preprocessing  # noqa: E402
from craft_fast.rewards.networks import AestheticReward, ImageReward, MpsReward  # noqa: E402
from craft_fast.rewards.networks.build import read_network, weight_bytes  # noqa: E402
from craft_fast.store.atomic import write_safetensors  # noqa: E402
from tests.unit.test_rewards_keys import FILES, facts  # noqa: E402

PICTURES = 2


def paths(name: str, folder: Path) -> dict[str, Path]:
    """The files, by role, under their published names; no config.json: the published configuration is taken."""
    weights = {"hpsv2.1": "HPS_v2.1_compressed.pt", "image-reward": "ImageReward.pt"}.get(name, "model.safetensors")
    head = {"head": folder / "sac+logos+ava1-l14-linearMSE.pth"} if name == "aesthetic-v2" else {}
    return {"weights": folder / weights, **head}


def write(name: str, folder: Path) -> None:
    """Random weights: all tensors are cut from one block of random numbers; to draw each would take minutes."""
    dtype = torch.float16 if name == "hpsv2.1" else torch.float32
    shapes = facts(FILES[name][0])
    size = max(torch.Size(shape).numel() for shape in shapes.values())
    block = torch.empty(size).normal_(0.0, 0.03, generator=torch.Generator().manual_seed(0)).to(dtype)
    files = paths(name, folder)
    made = OrderedDict((key, _tensor(key, shape, block)) for key, shape in shapes.items())
    if files["weights"].suffix == ".pt":
        # Copies: tensors that share their numbers are saved once.
        whole = OrderedDict((key, value.clone()) for key, value in made.items())
        torch.save({"state_dict": whole} if name == "hpsv2.1" else whole, files["weights"])
    else:
        write_safetensors(files["weights"], made)
    if "head" in files:
        head = facts("laion_head").items()
        torch.save({key: _tensor(key, shape, block).clone() for key, shape in head}, files["head"])


def _tensor(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    if name.endswith("logit_scale"):
        return torch.tensor(4.6052, dtype=block.dtype)
    if name.endswith("position_ids"):
        return torch.arange(shape[1])[None]
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, dtype=block.dtype)  # of a layer norm
    return block[: torch.Size(shape).numel()].view(shape)


def score(name: str, folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """Read the network, score pictures of noise against token ids, and say how long and how much memory it took."""
    family = FILES[name][1]
    spec = Preprocessing(family=family, score_scale="logit_scale", threshold=0.01)  # type: ignore[arg-type]
    files, began = paths(name, folder), time.perf_counter()
    network = read_network(spec, files, dtype=dtype)
    read_s, read_gib = time.perf_counter() - began, _peak_gib()
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (PICTURES, 35 if isinstance(network, ImageReward) else 77), generator=made)
    if not isinstance(network, ImageReward | AestheticReward):
        ids[:, 0], ids[:, 20:] = 49406, 49407
    if isinstance(network, MpsReward):
        network.set_condition(ids[0].clone())
    began = time.perf_counter()
    with torch.inference_mode():
        scores = network(torch.randn(PICTURES, 3, 224, 224, generator=made), ids, torch.ones_like(ids))
    return {
        "scores": scores.tolist(),
        "weights_gib": weight_bytes(spec, files, dtype) / 2**30,
        "held_gib": sum(value.nbytes for value in network.state_dict().values()) / 2**30,
        "file_gib": files["weights"].stat().st_size / 2**30,
        "read_s": read_s,
        "read_peak_gib": read_gib,
        "score_s": time.perf_counter() - began,
        "peak_gib": _peak_gib(),
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        chosen = getattr(torch, sys.argv[4]) if len(sys.argv) > 4 else torch.float32
        print(json.dumps(score(sys.argv[2], Path(sys.argv[3]), chosen)))
