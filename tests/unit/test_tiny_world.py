"""The small world: its words, its pictures, and the oracle that judges them."""

from __future__ import annotations

import random

import pytest
import torch

from craft_fast.errors import ConfigError
from craft_fast.tiny import oracle, render, world
from craft_fast.tiny.world import Scene, Thing

SCENES = [world.random_scene(random.Random(i), name_background=0.4) for i in range(400)]
CAPTIONS = [world.caption(scene) for scene in SCENES]


def pictures(scenes: list[Scene], seed: int = 0) -> torch.Tensor:
    codes = torch.tensor([render.encode_scene(scene) for scene in scenes])
    return render.to_uint8(render.render(codes, torch.Generator().manual_seed(seed))[0])


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return pictures(SCENES)


def test_a_caption_is_read_back_as_its_scene() -> None:
    assert [world.parse(caption) for caption in CAPTIONS] == SCENES


def test_quality_words_and_articles_change_nothing() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "left of", "white")
    text = "Red circle left of a blue square on a white background, sharp, vivid"
    assert world.parse(text) == scene
    assert world.parse("a red dog") is None
    assert world.parse("red") is None


def test_every_word_of_every_caption_is_a_known_word() -> None:
    used = {word for caption in CAPTIONS for word in caption.replace(",", " , ").split()}
    assert used <= set(world.WORDS)


def test_a_mistaken_scene_differs_in_one_attribute() -> None:
    rng = random.Random(3)
    for scene in SCENES:
        wrong = world.mistaken(scene, rng)
        assert wrong != scene
        assert len(wrong.things) == len(scene.things)
        changed = sum(a != b for a, b in zip(wrong.things, scene.things, strict=True))
        other = (wrong.relation != scene.relation) + (wrong.background != scene.background)
        assert (changed and not other) or (other == 1 and not changed)


def test_prompt_sets_are_distinct_and_disjoint() -> None:
    train, heldout = world.prompt_sets(1, 100, 200)
    assert len(set(train)) == 100
    assert len(set(heldout)) == 200
    assert not set(train) & set(heldout)


def test_the_oracle_is_right_on_clean_renderings(drawn: torch.Tensor) -> None:
    rng = random.Random(5)
    wrong = [world.caption(world.mistaken(scene, rng)) for scene in SCENES]
    assert float(oracle.passed(drawn, CAPTIONS).mean()) >= 0.98
    assert float(oracle.passed(drawn, wrong).mean()) <= 0.02


def test_alignment_is_the_share_of_checks_met() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "left of", "white")
    picture = pictures([scene])
    # Checks: count, two shapes, two colours, relation, background.
    for text, met, made in (
        ("a red circle left of a blue square on a white background", 7, 7),
        ("a red circle left of a blue square", 6, 6),
        ("a red circle right of a blue square", 5, 6),
        ("a red circle left of a green square", 5, 6),
        ("a red circle left of a blue square on a black background", 6, 7),
        ("a blue square right of a red circle", 6, 6),
        ("a red circle", 2, 3),
    ):
        assert float(oracle.alignment(picture, [text])) == pytest.approx(met / made), text


def test_flaws_lower_cleanliness_and_fail_the_picture(drawn: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    before = oracle.clean(drawn, CAPTIONS)
    for kind in range(3):
        flaws = torch.zeros(len(drawn), 3, dtype=torch.bool)
        flaws[:, kind] = True
        after = oracle.clean(render.to_uint8(render.add_flaws(drawn.float(), flaws, generator)), CAPTIONS)
        assert float((after < before).float().mean()) >= 0.98
        assert float((after < oracle.CLEAN_THRESHOLD).float().mean()) >= 0.7, world.FLAW_WORDS[kind]


def test_an_empty_picture_meets_no_check_of_things() -> None:
    blank = torch.full((1, 3, 64, 64), 245, dtype=torch.uint8)
    assert float(oracle.alignment(blank, ["a red circle left of a blue square"])) == 0.0
    assert float(oracle.passed(blank, ["a red circle"])) == 0.0


def test_a_picture_does_not_depend_on_its_neighbours(drawn: torch.Tensor) -> None:
    alone = torch.cat([oracle.clean(drawn[i : i + 1], CAPTIONS[i : i + 1]) for i in range(20)])
    assert torch.equal(alone, oracle.clean(drawn[:20], CAPTIONS[:20]))


def test_a_prompt_of_another_world_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="cannot read") as caught:
        oracle.alignment(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a photo of a dog"])
    assert "rewards.oracle=null" in caught.value.hint


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        oracle.look(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
