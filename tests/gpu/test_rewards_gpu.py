"""Rewards on a GPU: half precision agrees with the CPU, and a resting reward leaves the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craft_fast.config import RewardSettings
from craft_fast.rewards.registry import load_reward
from craft_fast.tiny.random_rewards import build_random_rewards

pytestmark = pytest.mark.gpu
KINDS = {"h": "clip", "p": "clip", "a": "aesthetic", "image_reward": "image_reward"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.mark.parametrize("name", KINDS)
def test_scores_agree_with_the_cpu_and_rest_frees_the_memory(folders: Path, name: str) -> None:
    settings = RewardSettings.model_validate({"kind": KINDS[name], "path": str(folders / name)})
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    texts = ["a red circle", "two blue squares below a star"] * 4
    expected = load_reward(name, settings, "cpu").score(images, texts)
    # The first matrix product of a process leaves cuBLAS's workspace (33 MiB on an H100) allocated for good.
    square = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    torch.nn.functional.linear(square, square, square[0])
    del square
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    reward = load_reward(name, settings, "cuda")
    found = reward.score(images, texts)
    assert found.device.type == "cpu"
    assert torch.allclose(found, expected, atol=2e-2 * float(expected.abs().max()))
    assert torch.equal(found, reward.score(images, texts))
    reward.rest()
    assert torch.cuda.memory_allocated() - before < 1 << 16
    assert torch.equal(found, reward.score(images, texts))
