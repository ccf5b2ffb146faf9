"""Published reward models in their authors' files, at small sizes, and the tokenizers that come with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError
from craft_fast.rewards import catalog, loaders
from craft_fast.rewards.catalog import Asset
from craft_fast.rewards.networks import MpsReward
from craft_fast.rewards.networks.build import read_network
from craft_fast.rewards.packages import environments, table
from craft_fast.rewards.pixels import prepare
from craft_fast.rewards.registry import load_reward, reward_key, reward_provenance
from craft_fast.tiny.random_model import build_clip_tokenizer
from tests.unit.official_rewards import NAMES, write_official

PROMPTS = ["a red circle", "a blue square above a star", ""]


def write_words(folder: Path) -> int:
    """CLIP's ``vocab.json`` and ``merges.txt`` with few words; the number of tokens."""
    size = build_clip_tokenizer(folder / "made", max_length=77)
    model = json.loads((folder / "made" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    shutil.rmtree(folder / "made")
    return size


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIPModel of 224 px with its tokenizer's files, as on the hub."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("published")
    size = write_words(folder)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": size, "max_position_embeddings": 77, "bos_token_id": size - 2, "eos_token_id": size - 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = CLIPConfig(
            text_config={**common, **text, "pad_token_id": size - 1},
            vision_config={**common, "image_size": 224, "patch_size": 32},
            projection_dim=16,
        )
        CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The catalog's CLIP models, said to have files of the small one's size; the folder they are in."""
    for name in ("pickscore", "clipscore-l14", "clipscore-b32"):
        official = catalog.OFFICIALS[name]
        assets = tuple(
            replace(asset, size=(published / asset.name).stat().st_size, sha256=None, also=(), exact=True)
            for asset in official.assets
        )
        monkeypatch.setitem(catalog.OFFICIALS, name, replace(official, assets=assets))
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path / "shelf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return published


def photo(height: int = 300, width: int = 410, seed: int = 0) -> Tensor:
    y, x = np.mgrid[0:height, 0:width] + seed
    waves = [np.sin(x / 9) * np.cos(y / 7), np.sin((x + y) / 11), np.cos(x / 5)]
    return torch.from_numpy(np.stack([(wave + 1) * 127 for wave in waves]).astype(np.uint8))


def plain_cosines(folder: Path, pictures: list[Tensor], prompts: list[str]) -> tuple[Tensor, float]:
    """By transformers' CLIPModel, its PIL image processor and its tokenizer alone; the logit scale too."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    pixels = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scale = clip.logit_scale.exp()
        found = clip(pixel_values=pixels, **tokens).logits_per_image.diagonal() / scale
    return found, float(scale)


@pytest.mark.parametrize("size", [(300, 410), (410, 301), (224, 224)])
def test_published_clip_models_score_as_transformers_does(small: Path, size: tuple[int, int]) -> None:
    pictures = [photo(*size, seed=seed) for seed in range(3)]
    cosines, scale = plain_cosines(small, pictures, PROMPTS)
    for name, expected in (("pickscore", cosines * scale), ("clipscore-l14", (100 * cosines).clamp(min=0))):
        reward = load_reward("x", RewardSettings(kind=name, path=str(small)), offline=True)
        assert torch.allclose(reward.score(torch.stack(pictures), PROMPTS), expected, atol=1e-5, rtol=0), name
    # Hessel et al. crop as torchvision does, and say "A photo depicts" first.
    reward = load_reward("x", RewardSettings(kind="clipscore-b32", path=str(small)), offline=True)
    cosines, _ = plain_cosines(small, pictures, [f"A photo depicts {prompt}" for prompt in PROMPTS])
    if size[0] == size[1]:
        found = reward.score(torch.stack(pictures), PROMPTS)
        assert torch.allclose(found, (2.5 * cosines).clamp(min=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_published_model_loads_from_its_authors_files_and_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_official(tmp_path, name)
    if name != "image-reward":
        write_words(tmp_path)
    official = catalog.OFFICIALS[name]
    given = {role: path for role, path in files.items() if role != "tokenizer"}
    parts = [Asset(role, "own/files@abc", path.name, 1) for role, path in given.items()]  # type: ignore[arg-type]
    words = [Asset("tokenizer", "own/files@abc", a.name, 1) for a in official.assets if a.role == "tokenizer"]
    assert {asset.name for asset in official.assets if asset.role != "config"} <= {a.name for a in (*parts, *words)}
    monkeypatch.setitem(catalog.OFFICIALS, name, replace(official, assets=(*parts, *words)))
    settings = RewardSettings(kind=name, path=str(tmp_path))
    reward: Any = load_reward("x", settings, offline=True)
    pictures = torch.stack([photo(300, 410, seed) for seed in (0, 40)])
    network: Any = read_network(official.spec, given)
    with torch.no_grad():
        pixels = prepare(pictures, official.spec)
        if reward._texts is None:
            expected = network(pixels)
        else:
            if name == "mps":
                network.set_condition(reward._texts.tokens(official.spec.condition)[0])
            pairs = [reward._texts.tokens(prompt) for prompt in PROMPTS[:2]]
            expected = network(pixels, *(torch.stack(part) for part in zip(*pairs, strict=True)))
    found = reward.score(pictures, PROMPTS[:2])
    if official.spec.score_floor is not None:
        expected = expected.clamp(min=official.spec.score_floor)
    assert torch.allclose(found, expected, atol=1e-5)
    assert reward.need.weight_bytes == 4 * sum(v.numel() for v in reward._network.state_dict().values())
    assert reward.cost() > 0
    assert reward.provenance.checkpoint == reward_provenance("x", settings, "cuda", offline=True).checkpoint


def test_a_published_model_without_its_files_says_what_to_get_and_which_reward_it_is(small: Path) -> None:
    for ask in (load_reward, reward_key):
        with pytest.raises(EnvironmentProblem) as caught:
            ask("judge", RewardSettings(kind="pickscore"), offline=True)
        assert "reward judge" in str(caught.value)
        assert "model.safetensors" in str(caught.value)
    with pytest.raises(ConfigError, match="not a folder") as wrong:
        load_reward("judge", RewardSettings(kind="pickscore", path=str(small / "config.json")), offline=True)
    assert "rewards.judge.path" in wrong.value.where


def test_a_tokenizer_of_plain_files_is_read_by_these_files_alone(small: Path, tmp_path: Path) -> None:
    settings = RewardSettings(kind="pickscore", path=str(small))
    expected, key = load_reward("x", settings, offline=True), reward_key("x", settings, offline=True)
    other = Path(shutil.copytree(small, tmp_path / "other"))
    # As in the hub's cache, where the whole repository may lie beside them.
    build_clip_tokenizer(other / "more", ["red", "circle"])
    for path in (other / "more").iterdir():
        shutil.copy(path, other)
    again = RewardSettings(kind="pickscore", path=str(other))
    assert reward_key("x", again, offline=True) == key
    picture = photo()[None]
    found = load_reward("x", again, offline=True)
    assert torch.equal(found.score(picture, PROMPTS[:1]), expected.score(picture, PROMPTS[:1]))


def test_a_clip_tokenizer_of_plain_files_has_all_their_words_and_pairs(published: Path) -> None:
    from transformers import CLIPTokenizer

    found = loaders._read_tokenizer(published, {"vocab.json", "merges.txt"})
    expected = CLIPTokenizer.from_pretrained(published, local_files_only=True)
    one, two = (json.loads(tokenizer.backend_tokenizer.to_str())["model"] for tokenizer in (found, expected))
    assert one["merges"] == two["merges"]
    assert one["vocab"] == two["vocab"] == json.loads((published / "vocab.json").read_text())
    assert found.pad_token_id == found.eos_token_id == len(one["vocab"]) - 1


def test_a_bert_tokenizer_is_read_from_its_vocabulary(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", "two"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    found = loaders._read_tokenizer(tmp_path, {"vocab.txt"})
    expected = BertTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("A red circles", "two  stars", ""):
        assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found("a circles")["input_ids"] == [2, 5, 7, 8, 3]
    assert found.pad_token_id == 0


def test_mps_scores_are_those_of_its_network_with_the_condition_of_its_file(tmp_path: Path) -> None:
    size = write_words(tmp_path)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": size, "max_position_embeddings": 77, "bos_token_id": size - 2, "eos_token_id": size - 1}
    clip = {
        "projection_dim": 16,
        "text_config": {**common, **text, "pad_token_id": size - 1},
        "vision_config": {**common, "image_size": 32, "patch_size": 16},
    }
    torch.manual_seed(3)
    network = MpsReward({"clip": clip, "cross": {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "ff_mult": 2}})
    network.save_folder(tmp_path)
    info = {"family": "mps", "image_size": 32, "condition": "red circle, star", "threshold": 0.7}
    scores = []
    for more in ({}, {"condition": "blue"}, {"threshold": -2.0}):
        given = {**info, **more}
        (tmp_path / "reward.json").write_text(json.dumps(given))
        reward: Any = load_reward("m", RewardSettings(kind="mps", path=str(tmp_path)))
        pictures = torch.stack([photo(40, 40, seed) for seed in (0, 7)])
        network.threshold = given["threshold"]
        network.set_condition(reward._texts.tokens(given["condition"])[0])
        ids, mask = (torch.stack(p) for p in zip(*(reward._texts.tokens(t) for t in PROMPTS[:2]), strict=True))
        with torch.no_grad():
            expected = network.eval()(prepare(pictures, reward.spec), ids, mask)
        found = reward.score(pictures, PROMPTS[:2])
        assert torch.allclose(found, expected, atol=1e-5)
        assert f"threshold {given['threshold']:g}" in reward.provenance.note
        scores.append(found)
    assert not torch.allclose(scores[0], scores[2], atol=1e-4)


def test_a_wrong_sha256_of_a_published_file_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official = catalog.OFFICIALS["pickscore"]
    pinned = tuple(replace(asset, sha256="0" * 64) if asset.role == "weights" else asset for asset in official.assets)
    monkeypatch.setitem(catalog.OFFICIALS, "pickscore", replace(official, assets=pinned))
    with pytest.raises(IntegrityError, match="sha256") as caught:
        load_reward("p", RewardSettings(kind="pickscore", path=str(small)), offline=True)
    assert "model.safetensors" in str(caught.value)


def test_a_package_scores_where_the_settings_say_so_and_its_environment_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path / "packages"))
    write_official(tmp_path, "hpsv2.1")
    write_words(tmp_path)
    official = catalog.OFFICIALS["hpsv2.1"]
    small_files = tuple(replace(asset, size=1, sha256=None, also=(), exact=False) for asset in official.assets)
    config = Asset("config", "own/files@abc", "config.json", 1)
    monkeypatch.setitem(catalog.OFFICIALS, "hpsv2.1", replace(official, assets=(config, *small_files)))
    settings = RewardSettings(kind="hpsv2.1", path=str(tmp_path), backend="package")
    for ask in (load_reward, reward_key, lambda *given, **more: reward_provenance(*given, "cpu", **more)):
        with pytest.raises(EnvironmentProblem) as caught:
            ask("h", settings, offline=True)
        assert "rewards install hpsv2" in caught.value.hint
        assert "reward h" in caught.value.where

    # A finished environment's record; its process starts with the first score, which nothing here asks for.
    package = table.get("hpsv2")
    folder = table.folder(package, None, "3.11")
    environments.interpreter(folder).parent.mkdir(parents=True)
    environments.interpreter(folder).touch()
    versions = {"torch": "2.14.1", package.distribution: "1.2.0"}
    record = {"package": "hpsv2", "pins": table.pins_digest(package), "versions": versions, "made": 1.0}
    (folder / environments.COMPLETE).write_text(json.dumps(record))
    reward: Any = load_reward("h", settings, offline=True)
    assert reward.key == reward_key("h", settings, offline=True)
    assert reward.provenance == reward_provenance("h", settings, "cpu", offline=True)
    assert reward.provenance.backend.startswith("package hpsv2")
    native = settings.model_copy(update={"backend": "native"})
    assert reward.key != reward_key("h", native, offline=True)
    assert load_reward("h", native, offline=True).provenance.backend == "native"
    reward.close()
