"""The reward networks on small official files, against plain references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError
from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.networks import AestheticReward, ClipReward, ImageReward, MpsReward, ScoreHead
from craft_fast.rewards.networks.build import forward_cost, read_network, weight_bytes
from craft_fast.store.atomic import write_safetensors
from craft_fast.store.official import read_official
from craft_fast.store.safe_load import load_safetensors
from tests.unit.official_rewards import NAMES, write_official

FAMILY = {"aesthetic-v2": "aesthetic", "image-reward": "image_reward", "mps": "mps"}


def spec_of(name: str, **values: Any) -> Preprocessing:
    return Preprocessing.model_validate({"family": FAMILY.get(name, "clip"), **values})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("official")
    return {name: write_official(folder / name, name) for name in NAMES}


def pixels(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def tokens(config: dict[str, Any], lengths: tuple[int, ...] = (4, 20, 77), padding: int | None = None) -> Tensor:
    """Texts of CLIP as its tokenizer makes them: start, words, end, padding to 77."""
    end = int(config["text_config"]["eos_token_id"])
    ids = torch.randint(1, 200, (len(lengths), 77), generator=torch.Generator().manual_seed(1))
    for row, length in zip(ids, lengths, strict=True):
        row[0], row[length - 1] = end - 1, end
        row[length:] = end if padding is None else padding
    return ids


def blip_tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 18, (3, 35), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((5, 20, 35)):
        ids[row, length:], mask[row, length:] = 0, 0
    return ids, mask


def config_of(files: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files["config"].read_text(encoding="utf-8"))
    return found


# ---- what the networks compute


@pytest.mark.parametrize("name", ["pickscore", "clipscore-l14"])
def test_clip_scores_are_transformers_own(name: str, files: dict[str, dict[str, Path]]) -> None:
    config = config_of(files[name])
    plain = CLIPModel(CLIPConfig(**config)).eval()
    plain.load_state_dict(load_safetensors(files[name]["weights"]))
    ids = tokens(config)
    with torch.no_grad():
        expected = plain(input_ids=ids, pixel_values=pixels()).logits_per_image.diagonal()
        found = read_network(spec_of(name, score_scale="logit_scale"), files[name])(pixels(), ids)
        bare = read_network(spec_of(name), files[name])(pixels(), ids)
    assert float((found - expected).abs().max()) < 2e-5
    assert torch.allclose(100 * bare, found, rtol=1e-4)
    assert float(found.std()) > 1


def test_padding_does_not_reach_a_clip_text(files: dict[str, dict[str, Path]]) -> None:
    network = read_network(spec_of("hpsv2.1"), files["hpsv2.1"])
    config = config_of(files["hpsv2.1"])
    assert isinstance(network, ClipReward)
    with torch.no_grad():
        by_end, by_zero = (network.text_embedding(tokens(config, padding=padding)) for padding in (None, 0))
        short = network.text_embedding(tokens(config, (4,))[:, :6])
    assert torch.equal(by_end, by_zero)
    assert float((short - by_end[:1]).abs().max()) < 1e-6


def test_open_clip_names_give_the_same_network(files: dict[str, dict[str, Path]]) -> None:
    stored = read_official(files["hpsv2.1"]["weights"])
    network = read_network(spec_of("hpsv2.1"), files["hpsv2.1"])
    assert isinstance(network, ClipReward)
    layer, block = network.clip.text_model.encoder.layers[1], "transformer.resblocks.1."
    query, key, value = stored[f"{block}attn.in_proj_weight"].float().chunk(3)
    assert torch.equal(layer.self_attn.q_proj.weight, query)
    assert torch.equal(layer.self_attn.k_proj.weight, key)
    assert torch.equal(layer.self_attn.v_proj.weight, value)
    assert torch.equal(network.clip.visual_projection.weight, stored["visual.proj"].T.float())


def test_the_aesthetic_score_is_the_head_of_the_unit_embedding(files: dict[str, dict[str, Path]]) -> None:
    paths = files["aesthetic-v2"]
    plain = CLIPModel(CLIPConfig(**config_of(paths))).eval()
    plain.load_state_dict(load_safetensors(paths["weights"]))
    head = read_official(paths["head"])
    with torch.no_grad():
        state = F.normalize(plain.visual_projection(plain.vision_model(pixels()).pooler_output), dim=-1)
        for index in (0, 2, 4, 6, 7):
            state = F.linear(state, head[f"layers.{index}.weight"], head[f"layers.{index}.bias"])
        found = read_network(spec_of("aesthetic-v2"), paths)(pixels())
    assert float((found - state[:, 0]).abs().max()) < 1e-6
    assert float(found.std()) > 0.01


def test_blip_with_fused_attention_is_blip(files: dict[str, dict[str, Path]]) -> None:
    paths, (ids, mask) = files["image-reward"], blip_tokens()
    network = read_network(spec_of("image-reward", score_mean=0.5, score_std=2.0), paths)
    assert isinstance(network, ImageReward)
    config = config_of(paths)
    vision = BlipVisionModel(BlipVisionConfig(**config["vision"])).eval()
    text = BlipTextConfig(**config["text"], encoder_hidden_size=32, is_decoder=True)
    reader = BlipTextModel(text, add_pooling_layer=False).eval()
    vision.load_state_dict(network.visual_encoder.state_dict())
    reader.load_state_dict(network.text_encoder.state_dict())
    with torch.no_grad():
        states = vision(pixels()).last_hidden_state
        seen = reader(
            ids, attention_mask=mask, encoder_hidden_states=states, is_decoder=False,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        ).last_hidden_state  # fmt: skip
        expected = (network.mlp(seen[:, 0]) - 0.5) / 2
        found = network(pixels(), ids, mask)
    assert type(vision.encoder.layers[0].self_attn) is not type(network.visual_encoder.encoder.layers[0].self_attn)
    assert float((found - expected).abs().max()) < 1e-6
    # Padding is not looked at: other ids there, the same scores.
    ids[0, 5:] = 9
    assert torch.equal(network(pixels(), ids, mask), found)


def plain_mps(network: MpsReward, picture: Tensor, ids: Tensor, condition: Tensor, threshold: float) -> float:
    """MPS for one picture and one prompt, from its description; one head, one token at a time where that is clear."""
    clip, cross = network.clip, network.config["cross"]
    heads, size = cross["heads"], cross["head_dim"]
    text = clip.text_model(input_ids=ids[None])
    context = clip.text_projection(text.last_hidden_state)[0]
    wish = clip.text_projection(clip.text_model(input_ids=condition[None]).last_hidden_state)[0]
    likeness = torch.stack([max(word @ other for other in wish) for word in context])
    kept = likeness / likeness.max() > threshold
    states = clip.visual_projection(clip.vision_model(picture[None]).last_hidden_state)[0]

    def feed(inner: Tensor, out: torch.nn.Linear) -> Tensor:
        value, gate = inner.chunk(2, dim=-1)
        return out(gate * gate.sigmoid() * value)

    def turned(rows: Tensor) -> Tensor:
        """Rotary positions: pairs (i, i + d/2) turn by the position times 10000 ** (-2 i / d)."""
        made = rows.clone()
        for position in range(rows.shape[0]):
            for i in range(size // 2):
                angle = torch.tensor(position * 10000.0 ** (-2 * i / size))
                first, second = rows[position, i], rows[position, i + size // 2]
                made[position, i] = first * angle.cos() - second * angle.sin()
                made[position, i + size // 2] = second * angle.cos() + first * angle.sin()
        return made

    for layer in network.cross.layers:
        part = layer.attend
        normed = part.norm(states)
        keys, values = part.to_kv(context[kept]).chunk(2, dim=-1)
        queries = part.to_q(normed)
        seen = [(queries[:, h * size : (h + 1) * size] @ keys.T / size**0.5).softmax(-1) @ values for h in range(heads)]
        states = states + part.to_out(torch.cat(seen, -1)) + feed(part.ff_in(normed), part.ff_out)
        part = layer.block
        wide = heads * size
        rows = part.fused(part.norm(states))
        queries, keys = rows[:, :wide], turned(rows[:, wide : wide + size])
        values, inner = rows[:, wide + size : wide + 2 * size], rows[:, wide + 2 * size :]
        seen = [
            (turned(queries[:, h * size : (h + 1) * size]) @ keys.T / size**0.5).softmax(-1) @ values
            for h in range(heads)
        ]
        states = states + part.attn_out(torch.cat(seen, -1)) + feed(inner, part.ff_out)
    pooled = clip.text_projection(text.pooler_output)[0]
    return float(clip.logit_scale.exp() * F.cosine_similarity(states[0], pooled, dim=0))


def mps(files: dict[str, dict[str, Path]], threshold: float) -> tuple[MpsReward, Tensor]:
    network = read_network(spec_of("mps", score_scale="logit_scale", threshold=threshold), files["mps"])
    assert isinstance(network, MpsReward)
    ids = tokens(config_of(files["mps"])["clip"])
    network.set_condition(tokens(config_of(files["mps"])["clip"], (30,))[0])
    return network, ids


@pytest.mark.parametrize("threshold", [0.01, 0.9])
def test_mps_is_its_description(threshold: float, files: dict[str, dict[str, Path]]) -> None:
    network, ids = mps(files, threshold)
    condition = tokens(config_of(files["mps"])["clip"], (30,))[0]
    with torch.no_grad():
        found, kept = network(pixels(), ids), network.encode_text(ids)[2]
        expected = [plain_mps(network, pixels()[i], ids[i], condition, threshold) for i in range(3)]
    assert float((found - torch.tensor(expected)).abs().max()) < 5e-5
    assert float(found.std()) > 1
    assert bool(kept.any(dim=1).all())
    assert bool(kept.all()) is (threshold == 0.01)


def test_an_mps_score_does_not_depend_on_what_is_scored_with_it(files: dict[str, dict[str, Path]]) -> None:
    network, ids = mps(files, 0.9)
    with torch.no_grad():
        together = network(pixels(), ids)
        alone = torch.cat([network(pixels()[i : i + 1], ids[i : i + 1]) for i in range(3)])
        per_text = [network.encode_text(ids[i : i + 1]) for i in range(3)]
        batched = network.encode_text(ids)
    assert float((together - alone).abs().max()) < 1e-5
    assert torch.equal(torch.cat([text[2] for text in per_text]), batched[2])


def test_mps_without_a_condition_says_so(files: dict[str, dict[str, Path]]) -> None:
    network = read_network(spec_of("mps"), files["mps"])
    with pytest.raises(ConfigError, match="condition"):
        network(pixels(), tokens(config_of(files["mps"])["clip"]))


# ---- reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_held_in_the_dtype_asked_for(
    name: str, dtype: torch.dtype, files: dict[str, dict[str, Path]]
) -> None:
    spec = spec_of(name, score_scale="logit_scale", max_tokens=35 if name == "image-reward" else 77)
    network = read_network(spec, files[name], dtype=dtype)
    wide = {key for key, value in network.state_dict().items() if value.dtype == torch.float32}
    if dtype != torch.float32:
        assert {key.split(".")[0] if "layers" in key else key for key in wide} <= {"mlp", "head", "clip.logit_scale"}
    held = sum(value.nbytes for value in network.state_dict().values())
    assert weight_bytes(spec, files[name], dtype) == held
    assert forward_cost(spec, files[name], dtype)[0] > 0
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(value.is_meta for value in [*network.parameters(), *network.buffers()])
    if hasattr(network, "logit_scale"):
        stored = 4.6052 if name != "hpsv2.1" else float(torch.tensor(4.6052).half())
        assert network.score_scale == pytest.approx(float(torch.tensor(stored).exp()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_scores_are_near_and_float32(name: str, files: dict[str, dict[str, Path]]) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        network = read_network(spec_of(name, threshold=0.01), files[name], dtype=dtype)
        config = config_of(files[name])
        ids, mask = blip_tokens() if name == "image-reward" else (tokens(config.get("clip", config)), None)
        if isinstance(network, MpsReward):
            network.set_condition(ids[1])
        with torch.inference_mode():
            found.append(network(pixels(), ids, mask))
    assert found[1].dtype == torch.float32
    assert 0 < float((found[0] - found[1]).abs().max()) < 0.05


def test_each_family_keeps_its_own_folder(tmp_path: Path, files: dict[str, dict[str, Path]]) -> None:
    kinds: dict[str, Any] = {
        "pickscore": ClipReward, "aesthetic-v2": AestheticReward, "image-reward": ImageReward, "mps": MpsReward,
    }  # fmt: skip
    for name, kind in kinds.items():
        network = read_network(spec_of(name), files[name])
        network.save_folder(tmp_path / name)
        again = kind.from_folder(tmp_path / name)
        half = kind.from_folder(tmp_path / name, dtype=torch.float16)
        paths = {"weights": tmp_path / name / "model.safetensors", "config": tmp_path / name / "config.json"}
        built = read_network(spec_of(name), paths | {"head": tmp_path / name / "head.safetensors"})
        for other in (again, built):
            assert other.state_dict().keys() == network.state_dict().keys()
            assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())
        assert next(half.parameters()).dtype in (torch.float16, torch.float32)
        assert half.state_dict().keys() == network.state_dict().keys()
        assert any(value.dtype == torch.float16 for value in half.state_dict().values())


def test_the_text_half_of_a_clip_is_not_read_for_its_tower(tmp_path: Path, files: dict[str, dict[str, Path]]) -> None:
    tensors = load_safetensors(files["aesthetic-v2"]["weights"])
    tensors["text_model.final_layer_norm.weight"] = torch.full((32,), float("nan"))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    paths = files["aesthetic-v2"] | {"weights": tmp_path / "model.safetensors"}
    assert read_network(spec_of("aesthetic-v2"), paths)(pixels()).isfinite().all()
    with pytest.raises(IntegrityError, match="NaN"):  # a whole CLIP does read it
        read_network(spec_of("pickscore"), {key: paths[key] for key in ("weights", "config")})


# ---- what does not fit


def test_a_weight_too_large_for_float16_says_what_to_set(tmp_path: Path, files: dict[str, dict[str, Path]]) -> None:
    tensors = load_safetensors(files["pickscore"]["weights"])
    tensors["visual_projection.weight"][0, 0] = 1e6
    write_safetensors(tmp_path / "model.safetensors", tensors)
    paths = files["pickscore"] | {"weights": tmp_path / "model.safetensors"}
    with pytest.raises(IntegrityError, match="too large") as caught:
        read_network(spec_of("pickscore"), paths, dtype=torch.float16)
    assert "1000000.0" in caught.value.why
    assert "float32" in caught.value.hint
    read_network(spec_of("pickscore"), paths, dtype=torch.float32)


@pytest.mark.parametrize(
    "damage",
    [b"not json", b"[1, 2]", b'{"vision_config": {"hidden_size": "wide"}}', b'{"vision_config": {"hidden_size": 64}}'],
)
def test_a_configuration_that_is_not_right_is_an_error(
    damage: bytes, tmp_path: Path, files: dict[str, dict[str, Path]]
) -> None:
    (tmp_path / "config.json").write_bytes(damage)
    with pytest.raises(IntegrityError):
        read_network(spec_of("pickscore"), files["pickscore"] | {"config": tmp_path / "config.json"})


def test_small_weights_without_a_configuration_are_of_no_published_size(files: dict[str, dict[str, Path]]) -> None:
    for name in NAMES:
        paths = {role: path for role, path in files[name].items() if role != "config"}
        with pytest.raises(IntegrityError):
            read_network(spec_of(name), paths)


def test_a_missing_file_and_a_head_of_another_tower(tmp_path: Path, files: dict[str, dict[str, Path]]) -> None:
    paths = files["aesthetic-v2"]
    with pytest.raises(EnvironmentProblem, match="missing") as caught:
        read_network(spec_of("aesthetic-v2"), {**paths, "head": tmp_path / "gone.pth"})
    assert "head" in caught.value.why
    with pytest.raises(EnvironmentProblem):
        read_network(spec_of("pickscore"), {})
    write_safetensors(tmp_path / "head.safetensors", ScoreHead(48, (16, 8, 8, 4)).state_dict())
    with pytest.raises(IntegrityError, match="head") as caught_head:
        read_network(spec_of("aesthetic-v2"), {**paths, "head": tmp_path / "head.safetensors"})
    assert "48" in caught_head.value.why


def test_a_file_of_another_family_is_refused(files: dict[str, dict[str, Path]]) -> None:
    for name, other in (("pickscore", "mps"), ("image-reward", "pickscore"), ("mps", "hpsv2.1")):
        with pytest.raises(IntegrityError) as caught:
            read_network(spec_of(name), files[other])
        assert str(files[other]["weights"]) in caught.value.where


def test_integers_where_weights_should_be_are_refused(tmp_path: Path, files: dict[str, dict[str, Path]]) -> None:
    tensors = load_safetensors(files["mps"]["weights"])
    tensors["mps.model.visual_projection.weight"] = tensors["mps.model.visual_projection.weight"].to(torch.int32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(IntegrityError, match="fraction"):
        read_network(spec_of("mps"), {**files["mps"], "weights": tmp_path / "model.safetensors"})
