"""Rewards on a GPU: precision against the CPU, memory that is left and kept, texts in blocks, real lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ResourceError
from craft_fast.rewards.registry import load_reward
from craft_fast.tiny.random_rewards import build_random_rewards

pytestmark = pytest.mark.gpu
KINDS = {"h": "clip", "p": "clip", "a": "aesthetic", "image_reward": "image_reward"}
TEXTS = ["a red circle", "two blue squares below a star"] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def capped() -> Iterator[Any]:
    """Sets how many bytes this process may take beside what it has; lifted at the end."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def spec(folders: Path, name: str) -> RewardSettings:
    return RewardSettings.model_validate({"kind": KINDS[name], "path": str(folders / name)})


def pictures(n: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def warm_up() -> None:
    # The first matrix product of a process leaves cuBLAS's workspace (33 MiB on an H100) allocated for good.
    square = torch.ones(64, 64, device="cuda", dtype=torch.float16)
    torch.nn.functional.linear(square, square, square[0])
    del square
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", KINDS)
def test_scores_agree_with_the_cpu_and_rest_frees_the_memory(folders: Path, name: str) -> None:
    images = pictures()
    expected = load_reward(name, spec(folders, name), "cpu").score(images, TEXTS)
    warm_up()
    before = torch.cuda.memory_allocated()
    reward: Any = load_reward(name, spec(folders, name), "cuda")
    assert reward.dtype == torch.float16
    assert reward.provenance.precision == "float16"
    found = reward.score(images, TEXTS)
    assert found.device.type == "cpu"
    assert torch.allclose(found, expected, atol=2e-2 * float(expected.abs().max()))
    assert torch.equal(found, reward.score(images, TEXTS))
    reward.rest()
    assert torch.cuda.memory_allocated() - before < 1 << 16
    assert torch.equal(found, reward.score(images, TEXTS))


@pytest.mark.parametrize("name", KINDS)
def test_float32_on_a_gpu_is_float32(folders: Path, name: str) -> None:
    """TF32, which PyTorch uses in convolutions unless told not to, is a thousandth off."""
    images = pictures()
    expected = load_reward(name, spec(folders, name), "cpu").score(images, TEXTS)
    found = load_reward(name, spec(folders, name), "cuda", dtype="float32").score(images, TEXTS)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_network_that_stays_is_there_after_rest_and_leaves_when_told(folders: Path, name: str) -> None:
    warm_up()
    before = torch.cuda.memory_allocated()
    reward: Any = load_reward(name, spec(folders, name), "cuda", stay=True)
    found = reward.score(pictures(), TEXTS)
    reward.rest()
    assert torch.cuda.memory_allocated() - before > reward.need.weight_bytes * 0.9
    assert torch.equal(found, reward.score(pictures(), TEXTS))
    reward.stay = False
    reward.rest()
    assert torch.cuda.memory_allocated() - before < 1 << 16
    assert torch.equal(found, reward.score(pictures(), TEXTS))


@pytest.mark.parametrize("name", ["h", "p"])
def test_a_text_is_encoded_to_the_same_bits_whatever_is_beside_it(folders: Path, name: str) -> None:
    texts = [f"{n} red circles {'below a star' * (n % 3)}" for n in range(20)]
    alone: Any = load_reward(name, spec(folders, name), "cuda")
    together: Any = load_reward(name, spec(folders, name), "cuda")
    together.score(pictures(20), texts)
    for text in texts:
        alone.score(pictures(1), [text])
        assert torch.equal(alone._encoded[text][0], together._encoded[text][0]), text


def test_real_lack_of_memory_makes_the_micro_batch_smaller(folders: Path, capped: Any) -> None:
    images = pictures(20_000)  # 246 MB of bytes on the device, 983 MB as normalised float32 if all at once
    texts = ["a red circle"] * len(images)
    warm_up()
    few = load_reward("h", spec(folders, "h"), "cuda", dtype="float32").score(images[:64], texts[:64])
    reward: Any = load_reward("h", spec(folders, "h"), "cuda", dtype="float32")
    capped(700 * 1024**2)
    found = reward.score(images, texts)
    assert reward.images_at_once(len(images)) in (10_000, 5_000, 2_500, 1_250)
    assert torch.allclose(found[:64], few, atol=1e-5)


def test_memory_that_does_not_hold_the_pictures_is_an_error_that_leaves_the_reward_whole(
    folders: Path, capped: Any
) -> None:
    warm_up()
    reward: Any = load_reward("h", spec(folders, "h"), "cuda")
    capped(0)
    with pytest.raises(ResourceError) as caught:
        reward.score(pictures(4000), ["a star"] * 4000)
    assert "reward h" in caught.value.where
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert bool(torch.isfinite(reward.score(pictures(2), TEXTS[:2])).all())
