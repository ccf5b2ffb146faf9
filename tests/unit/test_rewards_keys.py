"""The names of the official files at full size, as their authors' packages make them, against the networks here.

``facts`` holds the names and shapes of the models that these packages build, on the meta device: hpsv2x 1.2.0 (and
open-clip-torch 3.3.0, the same), image-reward 1.5 with timm 0.6.13 and BLIP's med_config.json, imscore 0.0.11 (MPS),
transformers 5.24 (CLIPModel); the head's are those of improved-aesthetic-predictor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from craft_fast.config import OFFICIAL_REWARDS
from craft_fast.errors import IntegrityError
from craft_fast.rewards import published
from craft_fast.rewards.costs import network_cost
from craft_fast.rewards.keys import Piece, pieces, recognise
from craft_fast.rewards.networks.filling import check_fit
from craft_fast.rewards.networks.random_weights import empty_network

FACTS = Path(__file__).with_name("facts")
# official name: its file's facts, network family, layout, parameters as the authors' package counts them.
FILES = {
    "hpsv2.1": ("open_clip_vit_h", "clip", "open_clip", 986_109_441),
    "hpsv2.0": ("open_clip_vit_h", "clip", "open_clip", 986_109_441),
    "pickscore": ("pickscore", "clip", "clip", 986_109_441),
    "clipscore-l14": ("clip_vit_l", "clip", "clip", 427_616_513),
    "clipscore-b32": ("clip_vit_b32", "clip", "clip", 151_277_313),
    "aesthetic-v2": ("clip_vit_l", "aesthetic", "tower", None),
    "image-reward": ("image_reward", "image_reward", "blip", None),
    "mps": ("mps", "mps", "mps", None),
}
# Tensors of a file that no score needs.
DROPPED = {
    "aesthetic-v2": r"text_model\..*|text_projection\.weight|logit_scale",
    "image-reward": r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids",
    "mps": r"mps\.cross_model\.layers\.[0-3]\.1\.fn\.rotary_emb\.inv_freq",
}


def facts(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official file; ``{0..31}`` stands for 32 numbers."""
    found: dict[str, tuple[int, ...]] = {}
    for pattern, shape in json.loads((FACTS / f"{name}.json").read_text(encoding="utf-8")).items():
        run = re.search(r"\{0\.\.(\d+)\}", pattern)
        names = [pattern] if run is None else [pattern.replace(run[0], str(i)) for i in range(int(run[1]) + 1)]
        found.update(dict.fromkeys(names, tuple(shape)))
    return found


def wanted(official: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the file fills: the tower alone where the head has a file of its own."""
    network = empty_network(FILES[official][1], published.OFFICIAL[official])
    part = {"clip": "clip", "aesthetic": "tower"}.get(FILES[official][1])
    module = network if part is None else getattr(network, part)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_every_published_model_is_listed_here() -> None:
    assert set(FILES) == set(OFFICIAL_REWARDS) == set(published.OFFICIAL)


@pytest.mark.parametrize("official", FILES)
def test_every_tensor_of_the_official_file_has_its_place_at_full_size(official: str) -> None:
    table, family, layout, _ = FILES[official]
    shapes = facts(table)
    assert recognise(shapes, family) == layout
    made = pieces(layout, shapes, "the file")  # type: ignore[arg-type]
    check_fit(wanted(official), made, shapes, Path("the file"))
    unused = shapes.keys() - {piece.source for piece in made.values()}
    expected = DROPPED.get(official, "nothing")
    assert unused == {name for name in shapes if re.fullmatch(expected, name)}
    # What is cut is used whole: as many values as the file holds, no more and no fewer.
    values = sum(torch.Size(piece.shape(shapes[piece.source])).numel() for piece in made.values())
    assert values == sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in unused)


@pytest.mark.parametrize("official", FILES)
def test_the_formulas_count_every_value_of_the_full_network(official: str) -> None:
    _, family, _, count = FILES[official]
    network = empty_network(family, published.OFFICIAL[official])
    real = sum(value.numel() for value in network.state_dict().values())
    cost = network_cost(family, published.OFFICIAL[official], element=2)
    assert cost.parameters + cost.float32_parameters == real
    assert count in (None, real)


def test_the_aesthetic_head_is_as_published() -> None:
    network = empty_network("aesthetic", published.AESTHETIC)
    found = {name: tuple(value.shape) for name, value in network.head.state_dict().items()}  # type: ignore[union-attr]
    assert found == facts("laion_head")


@pytest.mark.parametrize("official", ["hpsv2.1", "image-reward", "mps"])
def test_a_name_too_many_or_too_few_is_an_error_that_names_it(official: str) -> None:
    table, _, layout, _ = FILES[official]
    shapes, need = facts(table), wanted(official)
    victim = next(name for name in shapes if name.endswith("mlp.fc1.bias") or name.endswith("c_fc.bias"))
    with pytest.raises(IntegrityError, match="does not have") as caught:
        pieces(layout, [*shapes, f"{victim}.extra", "surprise"], "the file")  # type: ignore[arg-type]
    assert "surprise" in caught.value.why
    few = {name: shape for name, shape in shapes.items() if name != victim}
    with pytest.raises(IntegrityError) as caught:
        check_fit(need, pieces(layout, few), few, Path("the file"))  # type: ignore[arg-type]
    assert "missing keys: ['" in caught.value.why
    assert "unexpected keys: []" in caught.value.why
    other = {**shapes, victim: (7,)}
    with pytest.raises(IntegrityError) as caught:
        check_fit(need, pieces(layout, other), other, Path("the file"))  # type: ignore[arg-type]
    assert victim in caught.value.where
    assert "[7]" in caught.value.why


def test_a_layer_too_many_is_left_over() -> None:
    shapes = facts("open_clip_vit_h")
    shapes |= {name.replace(".31.", ".32."): shape for name, shape in shapes.items() if ".resblocks.31." in name}
    with pytest.raises(IntegrityError) as caught:
        check_fit(wanted("hpsv2.1"), pieces("open_clip", shapes), shapes, Path("the file"))
    assert "resblocks.32" in caught.value.why


def test_pieces_cut_and_turn() -> None:
    tensor = torch.arange(18.0).reshape(6, 3)
    assert torch.equal(Piece("x", third=1).apply(tensor), tensor[2:4])
    assert Piece("x", third=1).shape((6, 3)) == (2, 3)
    assert torch.equal(Piece("x", transpose=True).apply(tensor), tensor.T)
    assert Piece("x", transpose=True).shape((6, 3)) == (3, 6)
    assert Piece("x", third=0).shape((7, 3)) == (0, 3)  # fits nothing


def test_position_ids_of_older_files_are_passed_over() -> None:
    shapes = {**facts("pickscore"), "text_model.embeddings.position_ids": (1, 77)}
    shapes["vision_model.embeddings.position_ids"] = (1, 257)
    check_fit(wanted("pickscore"), pieces("clip", shapes), shapes, Path("the file"))
