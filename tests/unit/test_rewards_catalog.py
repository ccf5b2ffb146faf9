"""The published models' facts, and where their files are looked for."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from craft_fast.config import OFFICIAL_REWARDS, REWARD_FAMILIES
from craft_fast.errors import EnvironmentProblem, IntegrityError, UsageError
from craft_fast.rewards import catalog, fetching, shelf
from craft_fast.rewards.catalog import OFFICIALS, Asset, Official
from tests.unit.file_server import Served, running

WORDS = b'{"a": 0}'
PAIRS = b"#version: 0.2\na b\n"
WEIGHTS = bytes(5000)


def pinned(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


VOCAB = Asset("tokenizer", "own/words@abc", "vocab.json", len(WORDS), True, pinned(WORDS), also=(pinned(WORDS + b" "),))
MERGES = Asset("tokenizer", "own/words@abc", "merges.txt", len(PAIRS), True, pinned(PAIRS))
SMALL = Asset("weights", "own/model@abc", "model.safetensors", len(WEIGHTS), True, pinned(WEIGHTS))
LOOSE = Asset("config", "own/model", "config.json", 20)
CONTENT = {"vocab.json": WORDS, "merges.txt": PAIRS, "model.safetensors": WEIGHTS, "config.json": b'{"layers": 2}'}


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path / "shelf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def official() -> Official:
    return replace(OFFICIALS["clipscore-b32"], assets=(SMALL, LOOSE, VOCAB, MERGES))


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[path.name])


def put_all(official: Official) -> None:
    put(*(shelf.place(asset) for asset in official.assets))


def test_every_name_of_the_settings_is_there_and_an_unknown_one_is_answered_with_the_closest() -> None:
    assert tuple(OFFICIALS) == OFFICIAL_REWARDS
    with pytest.raises(UsageError) as wrong:
        catalog.get("HPSv21")
    assert wrong.value.hint == "did you mean hpsv2.1?"
    with pytest.raises(UsageError, match="no published reward"):
        catalog.get("zzzzzzzz")


@pytest.mark.parametrize("official", OFFICIALS.values(), ids=list(OFFICIALS))
def test_each_model_is_whole(official: Official) -> None:
    assert official.spec.family in REWARD_FAMILIES
    roles = [asset.role for asset in official.assets]
    assert roles.count("weights") == 1
    assert (official.spec.family == "aesthetic") == ("head" in roles)
    words = sorted(asset.file for asset in official.assets if asset.role == "tokenizer")
    wanted = {"aesthetic": [], "image_reward": ["vocab.txt"]}.get(official.spec.family, ["merges.txt", "vocab.json"])
    assert words == wanted
    assert len({asset.source for asset in official.assets if asset.role == "tokenizer"}) <= 1
    assert all((official.says, official.licence, official.paper, official.title))
    assert len(official.says) <= 98  # shown after two spaces in a list of 100 columns
    for asset in official.assets:
        for digest in (asset.sha256, *asset.also):
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)
        # A pinned file at a branch could become another one and then never be had.
        assert asset.sha256 is None or re.fullmatch("[0-9a-f]{40}", asset.revision)
        assert asset.size > 0
        assert asset.why


def test_files_that_models_share_are_the_same_asset() -> None:
    by_key: dict[str, Asset] = {}
    for official in OFFICIALS.values():
        for asset in official.assets:
            assert by_key.setdefault(asset.key, asset) == asset
    assert len({shelf.place(asset) for asset in by_key.values()}) == len(by_key)
    assert len(by_key) == 15


def test_the_facts_that_scores_hang_on() -> None:
    """Each as ``rewards.md`` section 2 or the authors' code has it."""
    spec = {name: official.spec for name, official in OFFICIALS.items()}
    assert [name for name in spec if spec[name].fit == "pad"] == ["hpsv2.1", "hpsv2.0"]
    assert all(spec[name].fit == "crop" for name in spec if not name.startswith("hpsv2"))
    rounds = [name for name in spec if spec[name].crop_rounding == "round"]
    assert rounds == ["aesthetic-v2", "image-reward", "clipscore-b32"]
    assert [spec[name].score_scale for name in spec] == [1, 1, "logit_scale", 1, 1, "logit_scale", 100, 2.5]
    assert [name for name in spec if spec[name].score_floor == 0] == ["clipscore-l14", "clipscore-b32"]
    assert spec["clipscore-b32"].prefix == "A photo depicts "
    reward = spec["image-reward"]
    assert (reward.max_tokens, reward.text) == (35, "plain")
    assert (reward.score_mean, reward.score_std) == (0.16717362830052426, 1.0333394966054072)
    assert (spec["mps"].threshold, len(spec["mps"].condition.split(", "))) == (0.01, 22)
    held_out = [name for name, official in OFFICIALS.items() if official.held_out_advised]
    assert held_out == ["image-reward", "mps", "clipscore-l14", "clipscore-b32"]
    assert {o.package for o in OFFICIALS.values()} == {"hpsv2", "image-reward", None}


def test_version_2_0_is_never_taken_for_2_1() -> None:
    new, old = OFFICIALS["hpsv2.1"].assets[0], OFFICIALS["hpsv2.0"].assets[0]
    assert (new.file, old.file) == ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
    assert new.sha256 is not None


def test_nothing_of_it_brings_torch() -> None:
    code = "import craft_fast.rewards.fetching, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    hub, github = OFFICIALS["mps"].assets[0], OFFICIALS["aesthetic-v2"].assets[2]
    assert fetching.address(hub) == "https://huggingface.co/RE-N-Y/mpsv1/resolve/main/model.safetensors"
    assert fetching.address(hub, "https://mirror.example/").startswith("https://mirror.example/RE-N-Y/")
    assert fetching.address(github).startswith("https://raw.githubusercontent.com/christophschuhmann/improved-")
    assert fetching.address(github).endswith("/sac%2Blogos%2Bava1-l14-linearMSE.pth")


def test_the_shelf_is_in_the_users_cache_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shelf.shelf() == tmp_path / "shelf"
    monkeypatch.delenv("CRAFT_FAST_REWARDS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert shelf.shelf() == tmp_path / "xdg" / "craft-fast" / "rewards"


def test_the_folder_goes_before_the_shelf_and_that_before_the_hubs_cache(official: Official, tmp_path: Path) -> None:
    assert shelf.find(official).missing == official.assets
    cached = tmp_path / "hub" / "models--own--model" / "snapshots" / "abc" / "model.safetensors"
    put(cached)
    assert shelf.find(official).found == {"weights": cached}
    put_all(official)
    have = shelf.find(official)
    assert have.found["weights"] == shelf.place(SMALL)
    assert (have.missing, have.problems) == ((), {})
    assert [path.name for path in have.tokenizer] == ["vocab.json", "merges.txt"]
    folder = tmp_path / "mine"
    put(folder / "model.safetensors", folder / "own--words" / "vocab.json", folder / "own--words" / "merges.txt")
    have = shelf.find(official, folder=folder)
    assert have.found == {"weights": folder / "model.safetensors", "config": shelf.place(LOOSE)}
    assert have.tokenizer_folder == folder / "own--words"
    assert dict(shelf.pairs(official, have))[MERGES] == folder / "own--words" / "merges.txt"


def test_the_hubs_cache_gives_unpinned_files_from_its_main_branch_alone(official: Official, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--own--model"
    put(model / "snapshots" / "old" / "config.json", model / "snapshots" / "old" / "model.safetensors")
    have = shelf.find(official)
    assert set(have.found) == {"weights"}  # pinned: whatever revision it is from, it is checked
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("old")
    assert set(shelf.find(official).found) == {"weights", "config"}


def test_the_hubs_cache_knows_renamed_repositories(tmp_path: Path) -> None:
    official = OFFICIALS["image-reward"]
    cached = tmp_path / "hub/models--zai-org--ImageReward/snapshots" / official.assets[0].revision / "ImageReward.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK")
    assert shelf.find(official).found["weights"] == cached


def test_half_a_tokenizer_is_none_but_comes_only_once(official: Official, tmp_path: Path) -> None:
    put(shelf.place(VOCAB))
    have = shelf.find(official)
    assert have.tokenizer == ()
    assert MERGES in have.missing
    assert VOCAB not in have.missing
    assert dict(shelf.pairs(official, have))[VOCAB] == shelf.place(VOCAB)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "web page"),
        (WEIGHTS[:100], "it has 100 bytes, the published file 5,000"),
        (b"", "empty"),
    ],
)
def test_what_cannot_be_right_is_told_at_a_glance_and_never_used(official: Official, content: bytes, why: str) -> None:
    put_all(official)
    shelf.place(SMALL).write_bytes(content)
    ((path, found),) = shelf.find(official).problems.items()
    assert path == shelf.place(SMALL)
    assert why in found
    with pytest.raises(IntegrityError, match="not what its name says") as refused:
        shelf.ensure(official)
    assert f"rm '{path}'" in refused.value.hint


def test_a_wrong_sha256_is_refused_wherever_the_file_is(official: Official, tmp_path: Path) -> None:
    put_all(official)
    assert shelf.ensure(official).missing == ()
    (tmp_path / "mine").mkdir()
    other = tmp_path / "mine" / "model.safetensors"
    other.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(IntegrityError, match="wrong sha256") as refused:
        shelf.ensure(official, folder=tmp_path / "mine")
    assert str(other) == refused.value.where
    assert pinned(WEIGHTS) in refused.value.why


def test_the_same_words_written_in_another_way_are_taken(official: Official) -> None:
    put_all(official)
    shelf.place(VOCAB).write_bytes(WORDS + b" ")
    shelf.ensure(official)
    shelf.place(VOCAB).write_bytes(WORDS + b"?")
    with pytest.raises(IntegrityError, match="wrong sha256"):
        shelf.ensure(official)


def test_an_unpinned_file_of_the_shelf_may_not_change_unseen(official: Official) -> None:
    put_all(official)
    shelf.ensure(official)
    assert shelf.known() == {"own--model/config.json": pinned(CONTENT["config.json"])}
    shelf.place(LOOSE).write_bytes(b'{"layers": 3}')
    with pytest.raises(IntegrityError, match="wrong sha256") as refused:
        shelf.ensure(official)
    assert "here first" in refused.value.why
    (shelf.shelf() / "known.json").unlink()
    shelf.ensure(official)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"a": {"sha256": 3}}'])
def test_a_broken_record_is_told_and_not_forgotten(official: Official, content: str) -> None:
    put_all(official)
    (shelf.shelf() / "known.json").write_text(content)
    with pytest.raises(IntegrityError, match="cannot be read"):
        shelf.ensure(official)
    assert (shelf.shelf() / "known.json").read_text() == content


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Served]]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server.files


def test_ensure_fetches_what_is_missing(official: Official, hub: dict[str, Served]) -> None:
    for asset in official.assets:
        path = f"/{asset.repository}/resolve/{asset.revision}/{asset.file}"
        hub[path] = Served(CONTENT[asset.name], linked=asset is not LOOSE)
    put(shelf.place(SMALL))
    have = shelf.ensure(official)
    assert have.missing == ()
    assert have.found == {"weights": shelf.place(SMALL), "config": shelf.place(LOOSE)}
    assert have.tokenizer_folder == shelf.place(VOCAB).parent
    known = json.loads((shelf.shelf() / "known.json").read_text())
    assert {key: entry["checked"] for key, entry in known.items()} == {
        "own--model/config.json": "nothing", "own--words/vocab.json": "pinned", "own--words/merges.txt": "pinned",
    }  # fmt: skip


def test_ensure_offline_lists_what_to_put_where(official: Official, tmp_path: Path) -> None:
    put(shelf.place(SMALL))
    with pytest.raises(EnvironmentProblem) as refused:
        shelf.ensure(official, offline=True)
    for asset in (LOOSE, VOCAB, MERGES):
        assert f"{fetching.address(asset)}\n      put it at {shelf.place(asset)}" in refused.value.why
    assert str(shelf.place(SMALL)) not in refused.value.why
    with pytest.raises(EnvironmentProblem, match="no such folder"):
        shelf.ensure(official, folder=tmp_path / "gone")


def test_the_hint_names_the_models_that_need_the_files() -> None:
    assert shelf.names_with(OFFICIALS["clipscore-b32"].assets) == ["clipscore-b32"]
    both = [*OFFICIALS["mps"].assets, *OFFICIALS["image-reward"].assets]
    assert sorted(shelf.names_with(both)) == ["image-reward", "mps"]
    assert shelf.names_with([SMALL]) == []
    two = [*OFFICIALS["hpsv2.1"].assets, *OFFICIALS["aesthetic-v2"].assets]
    assert sorted(shelf.names_with(two)) == ["aesthetic-v2", "hpsv2.1"]
