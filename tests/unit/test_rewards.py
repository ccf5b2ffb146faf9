"""Rewards: reward.json, the families from folders, what one network does with memory, prompts and precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from craft_fast.errors import ConfigError, CraftError, ResourceError
from craft_fast.rewards import network_reward
from craft_fast.rewards.base import read_preprocessing
from craft_fast.rewards.network_reward import Need
from craft_fast.rewards.pixels import Pictures
from craft_fast.rewards.registry import load_reward, reward_key
from tests.unit.random_judges import KINDS, spec


def pictures(n: int = 6, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- reward.json


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


def test_a_prompt_is_encoded_once(folders: Path) -> None:
    for name in ("h", "image_reward"):
        reward: Any = load_reward(name, spec(folders, name))
        asked: list[list[int]] = []
        encode = reward._network.encode_text
        reward._network.encode_text = lambda ids, mask, asked=asked, encode=encode: (
            asked.extend(ids.tolist()),
            encode(ids, mask),
        )[1]
        for _ in range(2):
            reward.score(pictures(), ["a red circle", "a star"] * 3)
        assert asked == [reward._texts.tokens(prompt)[0].tolist() for prompt in ("a red circle", "a star")]


def test_a_special_token_in_a_prompt_stays_text(folders: Path) -> None:
    reward = load_reward("h", spec(folders, "h"))
    cut, whole = (reward.score(pictures(1), [t]) for t in ("a red <|endoftext|> circle", "a red"))
    assert not torch.allclose(cut, whole)


def test_long_prompts_are_cut_and_counted_not_refused(folders: Path) -> None:
    for name in ("h", "image_reward"):
        reward: Any = load_reward(name, spec(folders, name))
        long = "red circle " * 200
        assert bool(torch.isfinite(reward.score(pictures(2), [long, "a star"])).all())
        assert reward.cut.keys() == {long}
        assert reward.cut[long] > 300
    aesthetic: Any = load_reward("a", spec(folders, "a"))
    aesthetic.score(pictures(1), ["red circle " * 200])
    assert aesthetic.cut == {}


def test_a_closed_reward_says_so_and_numbers_must_match(folders: Path) -> None:
    reward = load_reward("a", spec(folders, "a"))
    with pytest.raises(CraftError, match="differ in number"):
        reward.score(pictures(2), ["x"])
    reward.rest()
    reward.close()
    with pytest.raises(CraftError, match="closed"):
        reward.score(pictures(1), ["x"])


# ---- scores from what the network gives


@pytest.mark.parametrize("name", ["h", "a", "image_reward"])
def test_scale_floor_mean_and_std_are_applied_to_every_family(own: Path, name: str) -> None:
    texts = ["a red circle"] * 6
    path = own / name / "reward.json"
    plain = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("score_")}
    path.write_text(json.dumps(plain))
    bare = load_reward(name, spec(own, name)).score(pictures(), texts)
    floor = float(bare.median()) * 3
    path.write_text(json.dumps(plain | {"score_scale": 3.0, "score_floor": floor, "score_mean": 0.5, "score_std": 4.0}))
    found = load_reward(name, spec(own, name)).score(pictures(), texts)
    assert torch.allclose(found, ((bare * 3).clamp(min=floor) - 0.5) / 4, atol=1e-6)
    assert len(set(found.tolist())) in (4, 5)


def test_a_prefix_is_read_before_every_prompt(own: Path) -> None:
    plain = load_reward("h", spec(own, "h")).score(pictures(), ["a red circle"] * 6)
    path = own / "h" / "reward.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prefix": "a red "}))
    found = load_reward("h", spec(own, "h")).score(pictures(), ["circle"] * 6)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_holds_the_weights_and_gives_nearly_the_same(folders: Path, name: str) -> None:
    texts = ["a red circle"] * 6
    expected = load_reward(name, spec(folders, name)).score(pictures(), texts)
    for dtype in ("float16", "bfloat16"):
        reward: Any = load_reward(name, spec(folders, name), dtype=dtype)
        held = {str(value.dtype) for key, value in reward._network.named_parameters() if "encoder" in key}
        assert held == {f"torch.{dtype}"}
        assert reward.provenance.precision == dtype
        found = reward.score(pictures(), texts)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert torch.allclose(found, expected, atol=(0.01 if dtype == "float16" else 0.1) * float(expected.abs().max()))


# ---- memory


class Watched:
    """A network's ``score_encoded`` that notes how many pictures it is given, and has room for so many."""

    def __init__(self, reward: Any, room: int = 1000) -> None:
        self.inner = reward._network.score_encoded
        self.room = room
        self.sizes: list[int] = []
        reward._network.score_encoded = self

    def __call__(self, pixels: Tensor, *texts: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")
        found: Tensor = self.inner(pixels, *texts)
        return found


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_the_same_whatever_the_micro_batch(folders: Path, name: str) -> None:
    texts = ["a red circle", "a blue square", "a star"] * 3
    expected = load_reward(name, spec(folders, name)).score(pictures(9), texts)
    for at_once, sizes in ((1, [1] * 9), (4, [4, 4, 1]), (100, [9])):
        reward: Any = load_reward(name, spec(folders, name))
        reward.need = Need(weight_bytes=5000, image_bytes=100, image_gflop=1.0)
        reward.memory_budget = 5000 + 100 * at_once + 99
        seen = Watched(reward)
        found = reward.score(pictures(9), texts)
        assert seen.sizes == sizes
        assert torch.allclose(found, expected, atol=1e-6, rtol=1e-6)
        assert reward.memory_bytes(9) == 5000 + 100 * sizes[0]


def test_memory_known_to_be_too_small_still_takes_one_picture_at_a_time(folders: Path) -> None:
    reward: Any = load_reward("a", spec(folders, "a"), memory_budget=0)
    reward.need = Need(weight_bytes=5000, image_bytes=100)
    seen = Watched(reward)
    reward.score(pictures(3), [""] * 3)
    assert seen.sizes == [1, 1, 1]


@pytest.mark.parametrize("name", KINDS)
def test_out_of_memory_halves_the_micro_batch_from_then_on(folders: Path, name: str) -> None:
    texts = ["a red circle", "a blue square", "a star"] * 3
    expected = load_reward(name, spec(folders, name)).score(pictures(9), texts)
    reward: Any = load_reward(name, spec(folders, name))
    seen = Watched(reward, room=2)
    assert torch.allclose(reward.score(pictures(9), texts), expected, atol=1e-6, rtol=1e-6)
    assert seen.sizes == [9, 4, 2, 2, 2, 2, 1]
    seen.sizes.clear()
    reward.score(pictures(4), texts[:4])
    assert seen.sizes == [2, 2]


def test_one_picture_that_does_not_fit_says_what_to_do(folders: Path) -> None:
    reward: Any = load_reward("h", spec(folders, "h"))
    Watched(reward, room=0)
    with pytest.raises(ResourceError) as caught:
        reward.score(pictures(4), ["a star"] * 4)
    assert caught.value.exit_code == 5
    assert "reward h" in caught.value.where
    assert "1.50 GiB" in caught.value.why
    for word in ("engine.resident=never", "score.dtype=float16", "rewards.h=null"):
        assert word in caught.value.hint


def test_weights_that_leave_the_device_come_back_as_they_were(folders: Path) -> None:
    """The meta device stands in for a GPU: what is there has no values, so the weights must have stayed here."""
    for name in KINDS:
        reward: Any = load_reward(name, spec(folders, name))
        expected = reward.score(pictures(), ["a red circle"] * 6)

        def devices(network: Any = reward._network) -> set[str]:
            return {value.device.type for value in (*network.parameters(), *network.buffers())}

        reward.device = torch.device("meta")
        reward.stay = True
        for _ in range(2):
            reward._move_in()
            assert devices() == {"meta"}
            reward.rest()
            assert devices() == {"meta"}
        reward.stay = False
        reward.rest()
        reward.device = torch.device("cpu")
        assert devices() == {"cpu"}
        assert torch.equal(reward.score(pictures(), ["a red circle"] * 6), expected)


def test_a_network_that_is_not_resident_is_there_between_score_and_rest(folders: Path) -> None:
    reward: Any = load_reward("h", spec(folders, "h"), resident=False)
    assert reward._network is None
    first = reward.score(pictures(), ["a star"] * 6)
    assert reward._network is not None
    reward.rest()
    assert reward._network is None
    assert torch.equal(reward.score(pictures(), ["a star"] * 6), first)


def test_texts_seen_longest_ago_are_let_go(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_reward, "_KEPT_TEXT_BYTES", 3 * 16 * 4)  # three embeddings of 16 numbers
    reward: Any = load_reward("h", spec(folders, "h"))
    texts = ["a star", "a heart", "a circle", "a square", "a red star"]
    found = reward.score(pictures(5), texts)
    assert list(reward._encoded) == texts[2:]
    assert torch.equal(reward.score(pictures(5), texts), found)


# ---- pictures that are shared


def test_pictures_are_shaped_once_for_rewards_of_one_form(folders: Path) -> None:
    expected = [load_reward(n, spec(folders, n)).score(pictures(), ["a star"] * 6) for n in KINDS]
    shared = Pictures.of(pictures())
    rewards: list[Any] = [load_reward(n, spec(folders, n)) for n in KINDS]
    assert len({reward.pixel_form for reward in rewards}) == 1
    first = rewards[0].score_pictures(shared, ["a star"] * 6)
    shared.drop_images()
    found = [first, *(reward.score_pictures(shared, ["a star"] * 6) for reward in rewards[1:])]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


# ---- what is no number


def test_a_score_that_is_not_a_number_names_reward_prompt_and_precision(folders: Path) -> None:
    for dtype, hint in (("float16", "score.dtype=float32"), ("float32", "")):
        reward: Any = load_reward("h", spec(folders, "h"), dtype=dtype)
        reward._network.score_encoded = lambda pixels, text: torch.tensor([0.5, float("nan"), float("inf")])
        with pytest.raises(CraftError, match="not a number") as caught:
            reward.score(pictures(3), ["a star", "a <heart>", "a circle"])
        assert "reward h" in caught.value.where
        assert "a <heart>" in caught.value.where
        assert "nan for 2 of 3 pictures" in caught.value.why
        assert dtype in caught.value.why
        assert hint in caught.value.hint
        assert bool(caught.value.hint) == bool(hint)
