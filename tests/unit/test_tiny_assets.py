"""What ships in the package: an ordinary SDXL folder and judges that agree with the world."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import craft_fast.tiny
from craft_fast.config import RewardSettings
from craft_fast.progress import Silent
from craft_fast.rewards.registry import load_reward
from craft_fast.tiny import render, world
from craft_fast.tiny.fitting import Batch, Fitter
from craft_fast.tiny.pictures import WordTokens, web_items

ASSETS = Path(craft_fast.tiny.__file__).parent / "assets"


def test_the_assets_are_small_and_hold_no_pickle() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_the_model_opens_in_diffusers_own_pipeline() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(ASSETS / "sdxl").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("a red circle", num_inference_steps=4, guidance_scale=2.0, height=64, width=64, output_type="np")
    assert result.images.shape == (1, 64, 64, 3)


def test_prompts_are_captions_and_held_out_ones_are_kept_apart() -> None:
    train = (ASSETS / "prompts" / "train.txt").read_text().splitlines()
    heldout = (ASSETS / "prompts" / "heldout.txt").read_text().splitlines()
    assert len(heldout) == 1000
    assert not set(train) & set(heldout)
    assert all(world.parse(text) is not None for text in train + heldout)
    assert set(json.loads((ASSETS / "words.json").read_text())) == set(world.WORDS)


def test_the_build_log_meets_what_the_world_promises() -> None:
    log = json.loads((ASSETS / "build.json").read_text())
    assert min(log["judges_agreement"].values()) >= 0.85
    assert log["oracle"]["right"] >= 0.98
    plain, rich = log["base"]["plain guidance 2"], log["base"]["rich guidance 2"]
    assert 0.35 <= plain["all_checks"] <= 0.65
    assert rich["all_checks"] >= plain["all_checks"] + 0.2


@pytest.mark.parametrize("name", ["h", "p", "image_reward"])
def test_a_judge_prefers_the_picture_that_its_prompt_asks_for(name: str) -> None:
    rng = random.Random(11)
    scenes = [world.random_scene(rng, name_background=0.3) for _ in range(160)]
    right, wrong = (
        torch.tensor([render.encode_scene(s) for s in group])
        for group in (scenes, [world.mistaken(s, rng) for s in scenes])
    )
    generator = torch.Generator().manual_seed(1)
    kind = "image_reward" if name == "image_reward" else "clip"
    settings = RewardSettings.model_validate({"kind": kind, "path": str(ASSETS / "rewards" / name)})
    judge = load_reward(name, settings, "cpu")
    captions = [world.caption(s) for s in scenes]
    scores = [judge.score(render.to_uint8(render.render(codes, generator)[0]), captions) for codes in (right, wrong)]
    assert float((scores[0] > scores[1]).float().mean()) >= 0.8


def test_the_aesthetic_judge_prefers_clean_pictures() -> None:
    rng = random.Random(12)
    codes = torch.tensor([render.encode_scene(world.random_scene(rng, name_background=0.3)) for _ in range(160)])
    generator = torch.Generator().manual_seed(1)
    clean = render.render(codes, generator)[0]
    flaws = torch.rand(160, 3, generator=generator) < 0.5
    flaws[:, 0] |= ~flaws.any(1)
    flawed = render.add_flaws(clean, flaws, generator)
    settings = RewardSettings.model_validate({"kind": "aesthetic", "path": str(ASSETS / "rewards" / "a")})
    judge = load_reward("a", settings, "cpu")
    better = judge.score(render.to_uint8(clean), [""] * 160) > judge.score(render.to_uint8(flawed), [""] * 160)
    assert float(better.float().mean()) >= 0.85


def test_word_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    words = WordTokens(tmp_path)
    texts = [item.text for item in web_items(200, 4)] + [""]
    own = words.tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert torch.equal(words.encode(texts), own)


def test_rich_captions_go_with_better_pictures() -> None:
    items = web_items(4000, 8)
    rich = [item for item in items if any(word in item.text for word in world.QUALITY_WORDS)]
    plain = [item for item in items if item not in rich]
    flawed = [sum(any(item.flaws) for item in group) / len(group) for group in (rich, plain)]
    assert flawed[0] < 0.15
    assert flawed[1] > 0.5


class _Killed(Exception):
    pass


def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def fitted(folder: str, kill_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def draw(step: int) -> Batch:
            if step == kill_at:
                raise _Killed
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 3, generator=generator)
            return x, x.sum(1, keepdim=True)

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (module(x) - y).square().mean()

        (tmp_path / folder).mkdir(exist_ok=True)
        Fitter(module, loss, draw, rate=1e-2).fit(12, tmp_path / folder / "fit.safetensors", Silent(), "fit")
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    whole = fitted("whole", None)
    with pytest.raises(_Killed):
        fitted("killed", 8)
    assert torch.equal(fitted("killed", None), whole)
    torch.manual_seed(0)
    untrained = nn.Linear(3, 1)
    assert not torch.equal(whole, torch.cat([p.detach().flatten() for p in untrained.parameters()]))
