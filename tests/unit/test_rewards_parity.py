"""The native networks against plain transformers and the bare equations, on small official files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError, Interrupted, UsageError
from craft_fast.rewards import catalog
from craft_fast.rewards.loaders import RewardSource
from craft_fast.rewards.parity import Parity, built_in_pictures, compare, find_source, sample
from craft_fast.rewards.pixels import prepare
from craft_fast.rewards.plain import Plain, plain_pixels
from craft_fast.store.atomic import write_json
from craft_fast.tiny.random_rewards import build_random_rewards
from tests.unit.official_rewards import write_official

NAMES = ("pickscore", "clipscore-l14", "aesthetic-v2", "mps")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RewardSource]:
    root, made = tmp_path_factory.mktemp("official"), {}
    for name in NAMES:
        files = write_official(root / name, name)
        words = files.pop("tokenizer", None)
        known = tuple(sorted(words.glob("tokenizer*.json"))) if words else ()
        made[name] = RewardSource(catalog.get(name).spec, files, words, name, known)
    return made


def held(source: RewardSource, name: str, **changes: Any) -> Parity:
    pictures, prompts = sample()
    other = replace(source, spec=source.spec.model_copy(update=changes))
    return compare(name, other, pictures=pictures, prompts=prompts, dtypes=())


@pytest.mark.parametrize("name", NAMES)
def test_each_scores_as_its_page_shows(name: str, sources: dict[str, RewardSource]) -> None:
    pictures, prompts = sample()
    found = compare(name, sources[name], pictures=pictures, prompts=prompts, dtypes=("bfloat16",))
    # A float32 number of 30 is exact to 2e-6 alone, and its cosine is multiplied by a hundred.
    assert found.largest <= 1e-5 * max(1.0, abs(found.lowest), abs(found.highest)), found
    assert found.ok
    assert found.pairs == 6
    assert found.highest - found.lowest > 0.01, "scores that are all alike show nothing"
    assert "transformers" in found.against
    assert found.deviations[0].largest > 10 * found.largest, "half precision is seen"
    assert 0 < found.deviations[0].mean <= found.deviations[0].largest


@pytest.mark.parametrize(
    ("name", "change"),
    [("pickscore", {"max_tokens": 76}), ("mps", {"threshold": 0.6}), ("aesthetic-v2", {"score_mean": 0.001})],
)
def test_what_is_done_otherwise_is_beyond_the_tolerance(
    name: str, change: dict[str, Any], sources: dict[str, RewardSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sources[name].spec

    def plain(self: Plain, source: RewardSource, device: torch.device) -> None:
        begin(self, replace(source, spec=right), device)

    begin = Plain.__init__
    monkeypatch.setattr(Plain, "__init__", plain)
    assert held(sources[name], name).ok
    found = held(sources[name], name, **change)
    assert not found.ok
    assert found.as_dict()["ok"] is False
    assert "px, " in found.at


@pytest.mark.parametrize(
    "change",
    [
        {"crop_rounding": "floor"}, {"crop_rounding": "round"}, {"fit": "stretch"}, {"fit": "pad"},
        {"fit": "pad", "antialias": False}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
    ],
)  # fmt: skip
def test_pixels_are_those_of_pil_and_torch(change: dict[str, Any]) -> None:
    spec = catalog.get("pickscore").spec.model_copy(update=change)
    for picture in built_in_pictures():
        away = (plain_pixels(picture, spec) - prepare(picture[None], spec)).abs().max()
        assert float(away) <= 2e-6, picture.shape


def test_folders_of_our_own_are_held_too(tmp_path: Path) -> None:
    build_random_rewards(tmp_path)
    square = [picture[:, :64, :64] for picture in built_in_pictures()]
    for name in ("p", "a", "mps"):
        pictures, prompts = sample(square, ["red cat", "a dog"])
        assert len(pictures) == 6
        assert compare(name, find_source(name, tmp_path / name), pictures=pictures, prompts=prompts, dtypes=()).ok
    with pytest.raises(ConfigError, match="no plain form of the family image_reward"):
        compare("x", find_source("x", tmp_path / "image_reward"), pictures=square, prompts=["a"] * 6)


def test_what_cannot_be_compared_says_why(
    tmp_path: Path, sources: dict[str, RewardSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CRAFT_FAST_REWARDS", "CRAFT_FAST_PACKAGES", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    with pytest.raises(EnvironmentProblem) as caught:
        find_source("pickscore")
    assert "craft-fast rewards fetch pickscore" in caught.value.hint
    with pytest.raises(UsageError, match="no published reward"):
        find_source("pikscore")
    write_json(tmp_path / "reward.json", {"family": "other"})
    with pytest.raises(ConfigError, match=r"reward\.json is not right"):
        find_source("x", tmp_path)
    pictures, prompts = sample()
    with pytest.raises(EnvironmentProblem) as caught:
        compare("hpsv2.1", sources["pickscore"], pictures=pictures, prompts=prompts)
    assert caught.value.hint == "craft-fast rewards install hpsv2"
    with pytest.raises(Interrupted):
        compare("pickscore", sources["pickscore"], pictures=pictures, prompts=prompts, should_stop=lambda: True)
    files = {**sources["pickscore"].files, "weights": sources["aesthetic-v2"].files["head"]}
    with pytest.raises(IntegrityError, match="lack tensors"):
        Plain(replace(sources["pickscore"], files=files), torch.device("cpu"))


def test_the_sample_goes_round() -> None:
    pictures, prompts = sample([torch.zeros(3, 2, 2, dtype=torch.uint8)], ["a", "b", "c"])
    assert [len(pictures), prompts] == [3, ["a", "b", "c"]]
    plain, hostile = sample(), sample(hostile=True)
    assert len(hostile[1]) > len(plain[1])
    assert len({picture.shape for picture in plain[0]}) > 4
