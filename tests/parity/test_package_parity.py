"""The native networks against the authors' own score(), on small random weights of the same architectures."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from craft_fast.config import RewardSettings
from craft_fast.rewards.catalog import OFFICIALS
from craft_fast.rewards.loaders import RewardSource, network_reward
from craft_fast.rewards.packages.client import PackageReward, load_package_reward
from craft_fast.rewards.packages.environments import Environment
from craft_fast.rewards.parity import HOSTILE_PROMPTS, PROMPTS, Parity, built_in_pictures, compare
from craft_fast.rewards.pixels import Pictures
from craft_fast.store.safe_load import read_image
from tests.parity.small_sources import Small, small_hpsv2, small_image_reward
from tests.unit.hostile_prompts import hostile_prompts

pytestmark = pytest.mark.parity
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hps(hpsv2: Environment, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_hpsv2(tmp_path_factory.mktemp("hps") / "files", hpsv2.folder)


@pytest.fixture(scope="module")
def blip(image_reward: Environment, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_image_reward(tmp_path_factory.mktemp("blip") / "files")


def pairs() -> tuple[list[torch.Tensor], list[str]]:
    """Every shape with every prompt, and 60 hostile ones."""
    hostile = hostile_prompts()[::17]
    both = [*product(built_in_pictures(), [*PROMPTS, *HOSTILE_PROMPTS])]
    both += [(built_in_pictures()[i % 6], prompt) for i, prompt in enumerate(hostile)]
    assert len(hostile) > 50
    return [picture for picture, _ in both], [prompt for _, prompt in both]


def held(name: str, small: Small, environment: Environment, **changes: Any) -> Parity:
    source, architecture = small
    pictures, prompts = pairs()
    source = replace(source, spec=source.spec.model_copy(update=changes))
    found = compare(
        name, source, pictures=pictures, prompts=prompts, dtypes=(), environment=environment, architecture=architecture
    )
    told = f"largest {found.largest:.2e}, mean {found.mean:.2e} of {found.pairs}"
    print(f"{name} {changes or ''}: {told}; scores {found.lowest:.4g} to {found.highest:.4g}; {found.at}")
    return found


def test_hpsv2_scores_as_its_own_score_does(hps: Small, hpsv2: Environment) -> None:
    found = held("hpsv2.1", hps, hpsv2)
    assert found.largest <= 1e-5, found
    assert found.highest - found.lowest > 0.1, "scores that are all alike show nothing"
    assert "hpsv2x 1.2.0" in found.against


@pytest.mark.parametrize("change", [{"antialias": False}, {"fit": "crop"}, {"text": "plain"}])
def test_another_preprocessing_is_seen(change: dict[str, Any], hps: Small, hpsv2: Environment) -> None:
    assert held("hpsv2.1", hps, hpsv2, **change).largest > 1e-4


def test_image_reward_scores_as_its_own_score_does(blip: Small, image_reward: Environment) -> None:
    found = held("image-reward", blip, image_reward)
    assert found.largest <= 1e-5, found
    assert found.highest - found.lowest > 0.1, "scores that are all alike show nothing"
    assert "image-reward 1.5" in found.against


@pytest.mark.parametrize("change", [{"crop_rounding": "floor"}, {"text": "open_clip"}, {"max_tokens": 34}])
def test_another_way_to_prepare_for_image_reward_is_seen(
    change: dict[str, Any], blip: Small, image_reward: Environment
) -> None:
    assert held("image-reward", blip, image_reward, **change).largest > 1e-4


def packaged(name: str, small: Small, environment: Environment) -> PackageReward:
    source, architecture = small
    settings = RewardSettings(kind=name, backend="package")
    return load_package_reward("r", settings, source, environment=environment, architecture=architecture)


@pytest.mark.parametrize("name", ["hpsv2.1", "image-reward"])
def test_a_batch_is_scored_as_one_by_one(name: str, request: pytest.FixtureRequest) -> None:
    small = request.getfixturevalue("hps" if name == "hpsv2.1" else "blip")
    reward = packaged(name, small, request.getfixturevalue(str(OFFICIALS[name].package).replace("-", "_")))
    pictures, prompts = pairs()
    batch = reward.score_pictures(Pictures.of(pictures[:40]), prompts[:40])
    own = reward.score_own(pictures[:40], prompts[:40])
    reward.rest()
    again = reward.score(pictures[0][None], prompts[:1])
    reward.close()
    assert float((batch - own).abs().max()) <= 1e-6
    assert torch.equal(again, batch[:1]) or float((again - batch[:1]).abs().max()) <= 1e-6
    assert reward.provenance.backend.startswith("package ")
    assert reward.seconds > 0


def test_a_picture_with_alpha_scores_as_its_colours(hps: Small, hpsv2: Environment, tmp_path: Path) -> None:
    """hpsv2 keeps four channels of such a file and fails; both ways here get the three that read_image gives."""
    colours = built_in_pictures()[1]
    alpha = torch.full((1, *colours.shape[1:]), 128, dtype=torch.uint8)
    Image.fromarray(torch.cat([colours, alpha]).permute(1, 2, 0).numpy(), "RGBA").save(tmp_path / "alpha.png")
    picture = read_image(tmp_path / "alpha.png")
    assert torch.equal(picture, colours)
    source: RewardSource = hps[0]
    package, native = packaged("hpsv2.1", hps, hpsv2), network_reward("h", source, CPU)
    found = native.score(picture[None], ["a cat"]) - package.score_own([picture], ["a cat"])
    package.close()
    assert float(found.abs().max()) <= 1e-5
