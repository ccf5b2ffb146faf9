"""What a file says about its UNet's prediction, and another VAE than the model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from craft_fast.config import EngineSettings
from craft_fast.errors import ConfigError, EnvironmentProblem
from craft_fast.sdxl.load import SdxlModel, load_sdxl, model_digest
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


# ---- what the UNet predicts


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ([], {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ([], {"modelspec.predict_key": "V"}, ("v_prediction", False)),
        ([], {"modelspec.prediction_type": "v_prediction"}, ("v_prediction", False)),
        (["v_pred"], {}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "v"}, ("v_prediction", True)),
    ],
)
def test_prediction_is_what_the_file_says(
    state: dict[str, Tensor],
    tmp_path: Path,
    opened: Callable[..., SdxlModel],
    keys: list[str],
    metadata: dict[str, str],
    expected: tuple[str, bool],
) -> None:
    path = original.write({**state, **{key: torch.tensor([]) for key in keys}}, tmp_path / "m.safetensors", metadata)
    model = opened(path, engine=NEVER)
    assert (model.prediction_type, model.zero_terminal_snr) == expected
    assert model.scheduler.config.prediction_type == expected[0]
    told = opened(path, engine=NEVER, prediction_type="epsilon", zero_terminal_snr="no")
    assert (told.prediction_type, told.zero_terminal_snr) == ("epsilon", False)


@pytest.mark.parametrize(
    ("keys", "metadata", "said"),
    [
        ([], {}, "does not say"),
        ([], {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "does not say"),
        (["ztsnr"], {}, "does not say"),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "contradicts itself"),
        ([], {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, "contradicts itself"),
        ([], {"modelspec.prediction_type": "sample"}, "'sample'"),
        (["ztsnr"], {"modelspec.prediction_type": "epsilon"}, "pure noise"),
    ],
)
def test_prediction_is_asked_for_and_never_guessed(
    state: dict[str, Tensor],
    tmp_path: Path,
    opened: Callable[..., SdxlModel],
    keys: list[str],
    metadata: dict[str, str],
    said: str,
) -> None:
    path = original.write({**state, **{key: torch.tensor([]) for key in keys}}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ConfigError, match=said) as asked:
        opened(path, engine=NEVER)
    assert asked.value.exit_code == 3
    assert "--set model.prediction_type=" in asked.value.hint
    assert opened(path, engine=NEVER, prediction_type="v_prediction").prediction_type == "v_prediction"


def test_the_folder_of_the_tokenizers_does_not_say_what_a_file_predicts(
    state: dict[str, Tensor], sdxl_folder: Path, tmp_path: Path
) -> None:
    assert "epsilon" in (sdxl_folder / "scheduler" / "scheduler_config.json").read_text()
    path = original.write(state, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="does not say"):
        load_sdxl(path, device="cpu", config=str(sdxl_folder), engine=NEVER)


def test_a_schedule_that_ends_in_noise_reaches_the_samplers(file: Path, opened: Callable[..., SdxlModel]) -> None:
    import diffusers

    plain = opened(file, engine=NEVER, prediction_type="v_prediction")
    model = opened(file, engine=NEVER, prediction_type="v_prediction", zero_terminal_snr="yes")
    assert float(plain.scheduler.alphas_cumprod[-1]) == pytest.approx(0.0047, rel=0.05)
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6
    # arXiv 2305.08891, algorithm 1: the first value stays, the rest is stretched.
    assert float(model.scheduler.alphas_cumprod[0]) == pytest.approx(float(plain.scheduler.alphas_cumprod[0]))
    for cls in (
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DDIMScheduler,
    ):
        sampler = cls.from_config(model.scheduler.config)
        sampler.set_timesteps(4)
        assert int(sampler.timesteps[0]) == 999
        assert float(sampler.alphas_cumprod[-1]) < 1e-6


# ---- another VAE


def vae_state(sdxl_folder: Path) -> dict[str, Tensor]:
    return {name: value * 1.5 for name, value in load_file(next((sdxl_folder / "vae").glob("*.safetensors"))).items()}


@pytest.mark.parametrize("kind", ["folder", "pipeline", "diffusers", "old", "original", "whole"])
def test_another_vae(
    sdxl_folder: Path, state: dict[str, Tensor], file: Path, tmp_path: Path, opened: Callable[..., SdxlModel], kind: str
) -> None:
    other = vae_state(sdxl_folder)
    place = tmp_path / "vae.safetensors"
    if kind in ("folder", "pipeline"):
        place = tmp_path / "other" if kind == "folder" else tmp_path / "other" / "vae"
        shutil.copytree(sdxl_folder / "vae", place)
        save_file(other, next(place.glob("*.safetensors")), metadata={"format": "pt"})
        place = tmp_path / "other"
    elif kind == "diffusers":
        original.write(other, place)
    elif kind == "old":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            other_names = {name: name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.") for name in other}
            other = {other_names[name]: value for name, value in other.items()}
        original.write(other, place)
    elif kind == "original":
        original.write({**original.vae_names(other, ""), "loss.logvar": torch.zeros(())}, place)
    else:
        original.write({**state, **original.vae_names(other)}, place)
    for path in (sdxl_folder, file):
        model = opened(path, vae=str(place))
        loaded = model.vae.state_dict()
        expected = vae_state(sdxl_folder)
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        assert model.digest != opened(path, engine=NEVER).digest
        assert model.digest == model_digest(path, config=str(sdxl_folder), vae=str(place))


def test_the_dtype_of_the_vae(sdxl_folder: Path, file: Path, opened: Callable[..., SdxlModel]) -> None:
    vae = str(sdxl_folder / "vae")
    assert opened(file, dtype="bfloat16", engine=NEVER).vae.dtype == torch.float32
    assert opened(file, dtype="bfloat16", engine=NEVER, vae=vae).vae.dtype == torch.bfloat16
    assert opened(file, dtype="float32", engine=NEVER, vae=vae, vae_dtype="float16").vae.dtype == torch.float16
    assert opened(file, dtype="bfloat16", engine=NEVER, vae_dtype="bfloat16").vae_dtype == torch.bfloat16


def test_a_vae_of_another_model_is_refused(
    sdxl_folder: Path, file: Path, tmp_path: Path, opened: Callable[..., SdxlModel]
) -> None:
    shutil.copytree(sdxl_folder / "vae", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    with pytest.raises(ConfigError, match=r"scaling_factor is 0\.18215, the model's 0\.5"):
        opened(file, vae=str(tmp_path / "other"))
    old = original.write(
        vae_state(sdxl_folder), tmp_path / "old.safetensors", {"modelspec.architecture": "stable-diffusion-v1/vae"}
    )
    with pytest.raises(ConfigError, match="stable-diffusion-v1"):
        opened(file, vae=str(old))
    lora = original.write({"lora_unet_x.lora_down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(EnvironmentProblem, match=r"Not a VAE(.|\n)*LoRA"):
        opened(file, vae=str(lora))


def test_a_file_without_a_vae_takes_another(
    sdxl_folder: Path, state: dict[str, Tensor], tmp_path: Path, opened: Callable[..., SdxlModel]
) -> None:
    bare = {name: value for name, value in state.items() if not name.startswith("first_stage_model.")}
    path = original.write(bare, tmp_path / "bare.safetensors", EPSILON)
    with pytest.raises(EnvironmentProblem, match=r"no VAE(.|\n)*model\.vae"):
        opened(path)
    assert opened(path, vae=str(sdxl_folder / "vae")).loaded == ("text_encoder", "text_encoder_2", "unet", "vae")
