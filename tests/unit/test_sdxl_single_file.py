"""A whole SDXL in one file: the same networks as from the folder, read part by part, and every deviation refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from craft_fast.config import EngineSettings, ModelSettings
from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.sdxl import published
from craft_fast.sdxl.load import SdxlModel, load_sdxl, model_digest, open_source
from craft_fast.sdxl.text import encode_prompts
from craft_fast.sdxl.unet import base_unet
from tests.unit import original_layout as original

EPSILON = {"modelspec.prediction_type": "epsilon"}
NEVER = EngineSettings(resident="never")


@pytest.fixture(scope="module")
def state(sdxl_folder: Path) -> dict[str, Tensor]:
    return original.from_folder(sdxl_folder)


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original.write(state, tmp_path_factory.mktemp("file") / "model.safetensors", EPSILON)


@pytest.fixture
def opened(sdxl_folder: Path) -> Callable[..., SdxlModel]:
    def load(path: Path, **options: object) -> SdxlModel:
        return load_sdxl(path, device="cpu", **{"dtype": "float32", "config": str(sdxl_folder), **options})  # type: ignore[arg-type]

    return load


def outputs(model: SdxlModel) -> list[Tensor]:
    """What UNet, text encoders and VAE make of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator).to(model.dtype)
    with torch.inference_mode():
        embeds = encode_prompts(model, ["a red circle left of a blue square", "two green hearts, sharp"])
        conditions = {"text_embeds": embeds.pooled_prompt_embeds, "time_ids": torch.full((2, 6), 64.0).to(model.dtype)}
        noise = model.unet(
            latents, torch.tensor([7, 900]), encoder_hidden_states=embeds.prompt_embeds, added_cond_kwargs=conditions
        ).sample
        image = model.vae.decode(latents.to(model.vae_dtype)).sample
        moments = model.vae.encode(image.clamp(-1, 1)).latent_dist.parameters
    return [embeds.prompt_embeds, embeds.pooled_prompt_embeds, noise, image, moments]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_those_of_the_folder_bit_by_bit(
    sdxl_folder: Path, file: Path, opened: Callable[..., SdxlModel], dtype: str
) -> None:
    single, folder = opened(file, dtype=dtype), load_sdxl(sdxl_folder, device="cpu", dtype=dtype)
    for a, b in zip(outputs(single), outputs(folder), strict=True):
        assert torch.equal(a, b)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(single, part), getattr(folder, part)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        assert {(p.dtype, p.requires_grad) for p in mine.parameters()} == {
            (p.dtype, p.requires_grad) for p in theirs.parameters()
        }
        assert not mine.training
        assert {name: b.tolist() for name, b in mine.named_buffers()} == {
            name: b.tolist() for name, b in theirs.named_buffers()
        }
    assert dict(single.vae_config)["scaling_factor"] == folder.vae_config.scaling_factor
    assert single.latent_shape(64, 64) == folder.latent_shape(64, 64) == (4, 16, 16)


def test_the_published_layout_fits_the_published_configurations(sdxl_folder: Path, tmp_path: Path) -> None:
    parts = {part: published.empty(part, config).state_dict() for part, config in (
        ("unet", published.UNET), ("vae", published.VAE), ("text_encoder", published.TEXT_ENCODER),
        ("text_encoder_2", published.TEXT_ENCODER_2))}  # fmt: skip
    whole = {
        **original.unet_names(parts["unet"], published.UNET), **original.vae_names(parts["vae"]),
        **original.clip_names(parts["text_encoder"]), **original.open_clip_names(parts["text_encoder_2"]),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.empty(1, 77, device="meta"),
        "conditioner.embedders.1.model.logit_scale": torch.empty((), device="meta"),
        "denoiser.sigmas": torch.empty(1000, device="meta"),
    }  # fmt: skip
    # Names as in the published file.
    for name, shape in {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert tuple(whole[name].shape) == shape
    texts = tmp_path / "texts"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(sdxl_folder / name, texts / name)
    path = original.write_hollow(
        {name: tuple(value.shape) for name, value in whole.items()}, tmp_path / "xl.safetensors"
    )
    assert path.stat().st_size > 6_900_000_000
    started = time.perf_counter()
    source = open_source(path, config=str(texts))
    source.check()
    assert time.perf_counter() - started < 60
    assert source.config("unet").cross_attention_dim == 2048
    assert source.config("vae").scaling_factor == 0.13025
    assert len(source.main.shapes("unet")) == 1680


def test_a_part_is_read_alone_and_only_when_it_is_used(
    state: dict[str, Tensor], tmp_path: Path, opened: Callable[..., SdxlModel]
) -> None:
    bad = dict(state)
    name = "model.diffusion_model.out.2.weight"
    bad[name] = torch.full_like(bad[name], float("inf"))
    model = opened(original.write(bad, tmp_path / "bad.safetensors", EPSILON), engine=NEVER)
    model.use("text_encoder", "text_encoder_2")
    assert model.loaded == ("text_encoder", "text_encoder_2")
    model.use("vae")
    with pytest.raises(IntegrityError, match=r"NaN or infinity(.|\n)*conv_out\.weight"):
        model.use("unet")


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.diffusion_model.out.2.bias"), r"1 missing, such as conv_out\.bias"),
        (without("model.diffusion_model.time_embed.0.bias"), r"1 missing, such as time_embedding\.linear_1\.bias"),
        (without("first_stage_model.decoder.mid.attn_1.q.weight"), r"1 missing, such as decoder.*to_q\.weight"),
        (without("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"), "3 missing"),
        (without("conditioner.embedders.1.model.text_projection"), "text_projection"),
        (without("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"), "1 missing"),
        (without("model.diffusion_model.label_emb.0.0.weight"), "label_emb"),
        (put("model.diffusion_model.extra.weight", torch.zeros(2)), r"1 not known, such as .*extra\.weight"),
        (put("first_stage_model.extra.weight", torch.zeros(2)), r"1 not known, such as .*extra\.weight"),
        (put("conditioner.embedders.1.model.extra", torch.zeros(2)), "1 not known"),
        (put("conditioner.embedders.0.transformer.text_model.extra", torch.zeros(2)), "1 not known"),
        (put("model.diffusion_model.out.2.bias", torch.zeros(5)), r"conv_out\.bias \[5\] instead of \[4\]"),
        (put("motion.module", torch.zeros(2)), "such as motion.module"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_loaded(
    state: dict[str, Tensor],
    tmp_path: Path,
    opened: Callable[..., SdxlModel],
    change: Callable[[dict[str, Tensor]], None],
    said: str,
) -> None:
    changed = dict(state)
    change(changed)
    path = original.write(changed, tmp_path / "changed.safetensors", EPSILON)
    with pytest.raises(CraftError, match=said):
        opened(path, engine=NEVER)


def test_what_is_harmless_changes_nothing(
    state: dict[str, Tensor], file: Path, tmp_path: Path, opened: Callable[..., SdxlModel]
) -> None:
    besides = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(32, 4, 3, 3),
        "denoiser.sigmas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    model = opened(original.write({**state, **besides}, tmp_path / "more.safetensors", EPSILON))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(opened(file)), strict=True))


def test_the_text_projection_is_not_square_by_chance(tmp_path: Path) -> None:
    config = {
        **published.TEXT_ENCODER_2, "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 24,
    }  # fmt: skip
    _, module = published.random_text_encoders(
        device="cpu", dtype=torch.float32, config={**config, "projection_dim": 32}, config_2=config
    )
    path = original.write(original.open_clip_names(module.state_dict()), tmp_path / "text.safetensors")
    from craft_fast.sdxl.identify import read_header
    from craft_fast.sdxl.single_file import check_part, load_part

    header = read_header(path)
    assert header.shapes["conditioner.embedders.1.model.text_projection"] == (32, 24)
    check_part(header, "text_encoder_2", config)
    loaded = load_part(header, "text_encoder_2", config, torch.device("cpu"), torch.float32)
    ids = torch.tensor([[1, 5, 7, 99]])
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], module(ids)[0])


# ---- what stands beside the file


def test_tokenizers_that_are_not_here_are_asked_for_by_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for options in ({"offline": True}, {}):
        with pytest.raises(EnvironmentProblem) as missing:
            load_sdxl(file, device="cpu", config="somebody/not-here", **options)  # type: ignore[arg-type]
        assert "vocab.json" in missing.value.hint
        assert "model.config=FOLDER" in missing.value.hint
        assert "hf download somebody/not-here" in missing.value.hint
        assert "safetensors" not in missing.value.hint
    empty = tmp_path / "empty"
    (empty / "tokenizer").mkdir(parents=True)
    with pytest.raises(EnvironmentProblem, match=r"tokenizer lacks vocab\.json"):
        load_sdxl(file, device="cpu", config=str(empty))


def test_the_digest_of_a_file(file: Path, sdxl_folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    config = Path(shutil.copytree(sdxl_folder, tmp_path / "config"))
    before = model_digest(file, config=str(config))
    assert before == model_digest(file, config=str(sdxl_folder))
    assert before != model_digest(sdxl_folder)
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    assert model_digest(file, config=str(config)) == before
    # What the folder's scheduler says of prediction is not the file's.
    schedule = config / "scheduler" / "scheduler_config.json"
    values = {**json.loads(schedule.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule.write_text(json.dumps(values))
    assert model_digest(file, config=str(config)) == before
    model = load_sdxl(file, device="cpu", config=str(config), engine=NEVER)
    assert (model.prediction_type, model.zero_terminal_snr) == ("epsilon", False)
    schedule.write_text(json.dumps({**values, "beta_end": 0.013}))
    assert model_digest(file, config=str(config)) != before
    schedule.write_text(json.dumps(values))
    words = config / "tokenizer_2" / "tokenizer_config.json"
    words.write_text(words.read_text() + " ")
    assert model_digest(file, config=str(config)) != before
    name = "first_stage_model.quant_conv.bias"
    other = original.write({**state, name: state[name] + 1}, tmp_path / "other.safetensors", EPSILON)
    assert model_digest(other, config=str(sdxl_folder)) != before


def test_what_export_needs_of_a_file_is_what_the_folder_says(file: Path, sdxl_folder: Path) -> None:
    single = base_unet(ModelSettings(path=str(file), config=str(sdxl_folder)))
    folder = base_unet(ModelSettings(path=str(sdxl_folder)))
    assert single.shapes == folder.shapes
    config, expected = json.loads(single.config_json), json.loads(folder.config_json)
    assert config["_class_name"] == "UNet2DConditionModel"
    assert all(expected[name] == value for name, value in config.items())


def test_no_marker_is_read_as_a_weight(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = original.write({**state, "v_pred": torch.tensor([])}, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as opened_file:
        assert opened_file.get_slice("v_pred").get_shape() == [0]
