"""Rewards of installed packages: a real small package on the path, found by its entry point."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, ResourceError
from craft_fast.rewards.registry import load_reward, reward_key, reward_provenance
from craft_fast.settings_io import load_settings, render_yaml

SOURCE = '''
import torch

CALLS = []


class Sharpness:
    """Mean of one channel, scaled."""

    digest = "{digest}"

    def __init__(self, device, channel=0, scale=1.0):
        self.device, self.channel, self.scale = device, channel, scale

    def score(self, images, prompts):
        CALLS.append((tuple(images.shape), images.dtype, list(prompts)))
        return images[:, self.channel].float().mean((1, 2)) * self.scale

    def memory_bytes(self, images):
        return 1000 + images

    def cost(self):
        return 2.5

    def rest(self):
        CALLS.append("rest")

    def close(self):
        CALLS.append("close")


class Bad:
    def __init__(self, device, does="raise"):
        self.does = does

    def score(self, images, prompts):
        if self.does == "raise":
            raise ValueError("no such shade")
        if self.does == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        made = {{"nan": [1.0, float("nan")], "short": [1.0], "wide": [[1.0], [2.0]], "words": ["a", "b"]}}
        return made[self.does]


class Silent:
    def __init__(self, device):
        pass


def broken(device):
    raise OSError("weights are not there")
'''
POINTS = {"sharp": "Sharpness", "bad": "Bad", "silent": "Silent", "broken": "broken", "gone": "Missing"}


def write_package(folder: Path, *, version: str = "1.2", digest: str = "w1", name: str = "sharp_reward") -> None:
    """A package as pip would have put it there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(SOURCE.format(digest=digest))
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    points = "\n".join(f"{point} = {name}:{made}" for point, made in POINTS.items())
    (info / "entry_points.txt").write_text(f"[craft_fast.rewards]\n{points}\n")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Put a package on the path, in place of one that was there before."""
    folders: list[Path] = []

    def put(**given: str) -> Path:
        for old in folders:
            sys.path.remove(str(old))
        folders[:] = [tmp_path / f"site-{len(list(tmp_path.iterdir()))}"]
        write_package(folders[0], **given)
        monkeypatch.syspath_prepend(folders[0])
        sys.modules.pop("sharp_reward", None)
        importlib.invalidate_caches()
        return folders[0]

    yield put
    sys.modules.pop("sharp_reward", None)


def sharp(**changes: Any) -> RewardSettings:
    return RewardSettings(**{"kind": "sharp", **changes})


def pictures() -> Tensor:
    return torch.arange(2 * 3 * 40 * 24, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(2, 3, 40, 24)


def test_a_class_of_an_installed_package_judges_whole_pictures(install: Callable[..., Path]) -> None:
    install()
    reward = load_reward("s", sharp(options={"channel": 1, "scale": 2.0}, held_out=True))
    found = reward.score(pictures(), ["a star", "a heart"])
    assert torch.allclose(found, pictures()[:, 1].float().mean((1, 2)) * 2)
    assert (found.dtype, reward.name, reward.held_out) == (torch.float32, "s", True)
    calls = sys.modules["sharp_reward"].CALLS
    assert calls == [((2, 3, 40, 24), torch.uint8, ["a star", "a heart"])]
    assert (reward.memory_bytes(8), reward.cost()) == (1008, 2.5)
    reward.rest()
    reward.close()
    assert calls[1:] == ["rest", "close"]
    with pytest.raises(CraftError, match="closed"):
        reward.score(pictures(), ["", ""])


def test_key_and_provenance_follow_package_version_digest_options_and_source(install: Callable[..., Path]) -> None:
    folder = install()
    keys = {reward_key("s", sharp())}
    assert keys == {load_reward("s", sharp()).key} == {reward_key("other", sharp(held_out=True))}
    keys.add(reward_key("s", sharp(options={"channel": 1})))
    told = reward_provenance("s", sharp(options={"channel": 1}), "cpu")
    assert told == load_reward("s", sharp(options={"channel": 1})).provenance
    assert (told.backend, told.checkpoint, told.note) == ("plug-in sharp-reward 1.2", "w1", '{"channel": 1}')
    # A plug-in that is being written keeps its version.
    (folder / "sharp_reward.py").write_text(SOURCE.format(digest="w1") + "\nmore = 1\n")
    keys.add(reward_key("s", sharp()))
    for given in ({"version": "1.3"}, {"digest": "w2"}):
        install(**given)
        keys.add(reward_key("s", sharp()))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("does", "what", "why"),
    [
        ("raise", "plug-in failed", "ValueError: no such shade"),
        ("words", "plug-in failed", "could not convert|must be real number|too many dimensions|invalid"),
        ("short", "wrong number of scores", r"2 numbers are wanted, it gave a shape of \(1,\)"),
        ("wide", "wrong number of scores", r"shape of \(2, 1\)"),
        ("nan", "not a number", "nan for 1 of 2"),
    ],
)
def test_what_a_plug_in_does_wrong_is_named(install: Callable[..., Path], does: str, what: str, why: str) -> None:
    install()
    reward = load_reward("mine", RewardSettings(kind="bad", options={"does": does}))
    with pytest.raises(CraftError, match=what) as caught:
        reward.score(pictures(), ["a star", "a heart"])
    assert "reward mine" in caught.value.where
    assert re.search(why, caught.value.why)
    if does == "nan":
        assert "a heart" in caught.value.where


def test_a_plug_in_that_runs_out_of_memory_is_told_of_the_batch(install: Callable[..., Path]) -> None:
    install()
    reward = load_reward("mine", RewardSettings(kind="bad", options={"does": "memory"}))
    with pytest.raises(ResourceError) as caught:
        reward.score(pictures(), ["", ""])
    assert "score.batch_size=1" in caught.value.hint


def test_a_plug_in_that_cannot_be_made_is_named(install: Callable[..., Path]) -> None:
    install()
    with pytest.raises(ConfigError) as options:
        load_reward("s", sharp(options={"chanel": 1}))
    assert options.value.where == "rewards.s.options"
    assert "chanel" in options.value.why
    with pytest.raises(CraftError, match="cannot score"):
        load_reward("s", RewardSettings(kind="silent"))
    with pytest.raises(CraftError, match="making it") as broken:
        load_reward("s", RewardSettings(kind="broken"))
    assert "weights are not there" in broken.value.why
    with pytest.raises(EnvironmentProblem, match="cannot be imported") as gone:
        load_reward("s", RewardSettings(kind="gone"))
    assert "Missing" in gone.value.why
    with pytest.raises(EnvironmentProblem, match="not installed"):
        reward_key("s", RewardSettings(kind="never"))


def test_two_packages_with_one_name_are_refused_and_one_found_twice_is_not(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install()
    again = folder.parent / "again"
    write_package(again)
    monkeypatch.syspath_prepend(again)
    assert load_reward("s", sharp()).name == "s"
    other = folder.parent / "other"
    write_package(other, name="other_reward")
    monkeypatch.syspath_prepend(other)
    with pytest.raises(EnvironmentProblem, match="Two packages") as caught:
        load_reward("s", sharp())
    assert "other-reward has other_reward:Sharpness" in caught.value.why


def test_settings_know_installed_plug_ins_and_no_others(install: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides=["rewards.s={kind: sharp}"])
    assert "rewards.s.kind: found 'sharp'; must be one of hpsv2.1" in caught.value.why
    install()
    found = load_settings(overrides=["rewards.s={kind: sharp, options: {channel: 2, scale: 0.5}}"])
    assert found.rewards["s"].options == {"channel": 2, "scale": 0.5}
    path = tmp_path / "written.yaml"
    path.write_text(render_yaml(found))
    assert load_settings(config=path) == found
    with pytest.raises(ConfigError) as close:
        load_settings(overrides=["rewards.s={kind: sharpp, path: x}", "rewards.t={kind: sharp, path: x}"])
    assert "did you mean sharp?" in close.value.why
    assert "rewards.t.path: found 'x'; must be empty for a plug-in" in close.value.why
