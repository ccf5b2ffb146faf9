"""Rewards: preprocessing, the three families from folders, functions, keys, and the scoring stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, IntegrityError
from craft_fast.rewards.base import CLIP_MEAN, CLIP_STD, Preprocessing, read_preprocessing
from craft_fast.rewards.pixels import prepare
from craft_fast.rewards.registry import load_reward, reward_key
from craft_fast.tiny.random_rewards import build_random_rewards

KINDS = {"h": "clip", "p": "clip", "a": "aesthetic", "image_reward": "image_reward"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_rewards(tmp_path_factory.mktemp("rewards"))


def spec(folders: Path, name: str, **changes: Any) -> RewardSettings:
    return RewardSettings(**{"kind": KINDS[name], "path": str(folders / name), **changes})


@pytest.fixture
def own(folders: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(folders, tmp_path / "own"))


def pictures(n: int = 6, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- preprocessing


def free(**changes: Any) -> Preprocessing:
    return Preprocessing(**{"family": "clip", "image_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), **changes})


def smooth(height: int, width: int) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (np.sin(x / 5) * np.cos(y / 7) + 1) * 127], -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 80), (61, 97)])
def test_bicubic_crop_equals_pil(height: int, width: int) -> None:
    pixels = smooth(height, width)
    scale = 32 / min(height, width)
    size = (int(width * scale + 1e-9), int(height * scale + 1e-9))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - 32) // 2, (small.shape[1] - 32) // 2
    found = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None], free())[0].permute(1, 2, 0) * 255
    gap = np.abs(found.numpy() - small[top : top + 32, left : left + 32])
    assert gap.max() <= 1.01
    assert (gap > 0.01).mean() < 0.1  # PIL rounds between its two passes


def test_pad_keeps_the_proportions_and_fills_with_zeros_before_normalising() -> None:
    images = torch.full((1, 3, 40, 80), 255, dtype=torch.uint8)
    found = prepare(images, free(fit="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    assert found.shape == (1, 3, 32, 32)
    assert torch.allclose(found[:, :, 8:24], torch.ones(()), atol=1e-5)
    assert bool((found[:, :, :8] == -1).all())
    assert bool((found[:, :, 24:] == -1).all())


def test_stretch_fills_the_square() -> None:
    images = torch.full((1, 3, 40, 80), 51, dtype=torch.uint8)
    assert torch.allclose(prepare(images, free(fit="stretch")), torch.full((1, 3, 32, 32), 0.2))


def test_normalising_uses_mean_and_std_of_each_channel() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    found = prepare(images, free(mean=CLIP_MEAN, std=CLIP_STD))[0, :, 0, 0]
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), CLIP_MEAN, CLIP_STD, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_without_resize_another_size_is_an_error_that_names_both() -> None:
    with pytest.raises(ConfigError, match="one size") as caught:
        prepare(torch.zeros(1, 3, 48, 40, dtype=torch.uint8), free(resize="none"))
    assert "40x48 px" in caught.value.why


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour: Extra inputs"),
        ({"resize": "nearest"}, "resize: Input should be 'none' or 'bicubic'"),
        ({"std": [1, 1]}, "std"),
        ({"image_size": 1}, "image_size"),
        ({"family": "aesthetic"}, "its family is aesthetic, the settings say kind: clip"),
    ],
)
def test_a_wrong_reward_json_says_what_is_wrong(own: Path, change: dict[str, Any], said: str) -> None:
    path = own / "h" / "reward.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        load_reward("h", spec(own, "h"))
    assert said in caught.value.why
    with pytest.raises(ConfigError):
        reward_key("h", spec(own, "h"))


# ---- families


@pytest.mark.parametrize("name", KINDS)
def test_every_family_scores_pictures_against_prompts(folders: Path, name: str) -> None:
    reward = load_reward(name, spec(folders, name, held_out=name == "image_reward"))
    assert (reward.name, reward.held_out) == (name, name == "image_reward")
    found = reward.score(pictures(), ["a red circle"] * 6)
    assert (found.dtype, found.shape, found.device.type) == (torch.float32, (6,), "cpu")
    assert len(set(found.tolist())) == 6
    again = load_reward(name, spec(folders, name)).score(pictures(), ["a red circle"] * 6)
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_aesthetic_family_does_not_look_at_the_prompt(folders: Path, name: str) -> None:
    reward = load_reward(name, spec(folders, name))
    one, two = (reward.score(pictures(), [text] * 6) for text in ("a red circle", "two blue squares below a star"))
    assert torch.equal(one, two) == (name == "a")


def test_clip_scores_are_the_scaled_cosine_of_transformers_own_features(folders: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(folders / "p").eval()
    tokens = AutoTokenizer.from_pretrained(folders / "p")(
        ["a red circle", "a blue square"], padding=True, return_tensors="pt"
    )
    pixels = pictures(2).float() / 127.5 - 1
    with torch.no_grad():
        expected = clip(pixel_values=pixels, **tokens).logits_per_image.diagonal() / clip.logit_scale.exp() * 100.0
    found = load_reward("p", spec(folders, "p")).score(pictures(2), ["a red circle", "a blue square"])
    assert torch.allclose(found, expected, atol=1e-4)


def test_aesthetic_scores_are_the_head_of_the_unit_embedding(folders: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection.from_pretrained(folders / "a").eval()
    head = load_file(folders / "a" / "head.safetensors")
    assert sorted(head) == sorted(f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias"))
    with torch.no_grad():
        state = torch.nn.functional.normalize(tower(pictures(3).float() / 127.5 - 1).image_embeds, dim=-1)
        for i in (0, 2, 4, 6, 7):
            state = state @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    found = load_reward("a", spec(folders, "a")).score(pictures(3), [""] * 3)
    assert torch.allclose(found, state[:, 0], atol=1e-5)


def test_image_reward_is_shifted_and_scaled_as_its_file_says(own: Path) -> None:
    before = load_reward("r", spec(own, "image_reward")).score(pictures(), ["a red circle"] * 6)
    path = own / "image_reward" / "reward.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"score_mean": info["score_mean"] + 1.0, "score_std": info["score_std"] * 2}))
    after = load_reward("r", spec(own, "image_reward")).score(pictures(), ["a red circle"] * 6)
    assert torch.allclose(after, (before * info["score_std"] - 1.0) / (2 * info["score_std"]), atol=1e-5)


def test_a_clip_folder_without_reward_json_is_read_as_pickscore(own: Path) -> None:
    (own / "p" / "reward.json").unlink()
    assert read_preprocessing(own / "p", "clip").image_size == 224
    info = {"family": "clip", "image_size": 64, "max_tokens": 32, "score_scale": "logit_scale"}
    (own / "p" / "reward.json").write_text(json.dumps(info))
    reward = load_reward("p", spec(own, "p"))
    (own / "h" / "reward.json").write_text(json.dumps(info | {"score_scale": 1.0}))
    for file in ("config.json", "model.safetensors"):
        shutil.copy(own / "p" / file, own / "h" / file)
    cosine = load_reward("h", spec(own, "h")).score(pictures(), ["a red circle"] * 6)
    scale = load_file(own / "p" / "model.safetensors")["logit_scale"].exp()
    assert torch.allclose(reward.score(pictures(), ["a red circle"] * 6), cosine * scale, rtol=1e-4)


def test_scores_do_not_depend_on_what_was_scored_before(folders: Path) -> None:
    texts = ["a red circle", "a blue square", "a star", "a red circle"]
    for name in KINDS:
        fresh = load_reward(name, spec(folders, name))
        used = load_reward(name, spec(folders, name))
        used.score(pictures(5), ["two green hearts above a star", *texts])
        assert torch.equal(fresh.score(pictures(4), texts), used.score(pictures(4), texts))


def test_a_prompt_is_tokenised_once(folders: Path) -> None:
    for name in ("h", "image_reward"):
        reward: Any = load_reward(name, spec(folders, name))
        asked: list[str] = []
        inner = reward._tokenizer
        reward._tokenizer = lambda text, asked=asked, inner=inner, **more: (asked.append(text), inner(text, **more))[1]
        for _ in range(2):
            reward.score(pictures(), ["a red circle", "a star"] * 3)
        assert asked == ["a red circle", "a star"]


def test_a_special_token_in_a_prompt_stays_text(folders: Path) -> None:
    reward = load_reward("h", spec(folders, "h"))
    cut, whole = (reward.score(pictures(1), [t]) for t in ("a red <|endoftext|> circle", "a red"))
    assert not torch.allclose(cut, whole)


def test_long_prompts_are_cut_not_refused(folders: Path) -> None:
    for name in ("h", "image_reward"):
        found = load_reward(name, spec(folders, name)).score(pictures(1), ["red circle " * 200])
        assert bool(torch.isfinite(found).all())


def test_a_closed_reward_says_so_and_numbers_must_match(folders: Path) -> None:
    reward = load_reward("a", spec(folders, "a"))
    with pytest.raises(CraftError, match="differ in number"):
        reward.score(pictures(2), ["x"])
    reward.rest()
    reward.close()
    with pytest.raises(CraftError, match="closed"):
        reward.score(pictures(1), ["x"])


# ---- broken and hostile folders


@pytest.mark.parametrize("name", KINDS)
def test_equal_seeds_build_equal_bytes_and_the_key_follows_them(folders: Path, own: Path, name: str) -> None:
    again = build_random_rewards(own / "again")
    for path in (folders / name).iterdir():
        assert path.read_bytes() == (again / name / path.name).read_bytes(), path.name
    key = reward_key(name, spec(folders, name))
    assert key == load_reward(name, spec(folders, name)).key == reward_key(name, spec(again, name))
    other = build_random_rewards(own / "other", seed=1)
    assert reward_key(name, spec(other, name)) != key


def test_the_key_follows_the_preprocessing(own: Path) -> None:
    before = reward_key("h", spec(own, "h"))
    path = own / "h" / "reward.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": [0.4, 0.5, 0.5]}))
    assert reward_key("h", spec(own, "h")) != before


def test_a_pickle_is_refused_with_the_command_that_converts_it(own: Path) -> None:
    for name, file in (("h", "pytorch_model.bin"), ("a", "weights.pth")):
        (own / name / "model.safetensors").unlink()
        torch.save({}, own / name / file)
        for load in (lambda n: load_reward(n, spec(own, n)), lambda n: reward_key(n, spec(own, n))):
            with pytest.raises(IntegrityError) as caught:
                load(name)
            assert caught.value.exit_code == 6
            assert file in caught.value.where
            assert "weights_only=True" in caught.value.hint


def test_a_pickle_renamed_to_safetensors_is_refused(own: Path) -> None:
    torch.save({}, own / "h" / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        load_reward("h", spec(own, "h"))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", KINDS)
def test_keys_must_fit_exactly(own: Path, name: str) -> None:
    path = own / name / "model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({("extra" if key == first else key): value for key, value in tensors.items()}, path)
    with pytest.raises(IntegrityError, match="do not fit") as caught:
        load_reward(name, spec(own, name))
    assert "extra" in caught.value.why


def test_shapes_must_fit(own: Path) -> None:
    path = own / "h" / "model.safetensors"
    tensors = load_file(path)
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:4].contiguous()
    save_file(tensors, path)
    with pytest.raises(IntegrityError):
        load_reward("h", spec(own, "h"))


def test_weights_must_be_finite(own: Path) -> None:
    path = own / "a" / "head.safetensors"
    tensors = load_file(path)
    tensors["layers.0.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(IntegrityError):
        load_reward("a", spec(own, "a"))


def test_missing_parts_are_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem):
        load_reward("h", RewardSettings(kind="clip", path=str(tmp_path / "none")))
    (own / "h" / "model.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match="no weights"):
        load_reward("h", spec(own, "h"))
    (own / "a" / "reward.json").unlink()
    with pytest.raises(ConfigError, match="does not say"):
        load_reward("a", spec(own, "a"))
    for path in (own / "p").iterdir():
        if path.name.startswith("tokenizer"):
            path.unlink()
    with pytest.raises(EnvironmentProblem, match="no tokenizer"):
        load_reward("p", spec(own, "p"))
