"""Loading an SDXL: what is taken, what is refused and how, and what is freed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, IntegrityError
from craft_fast.sdxl.load import load_sdxl, model_digest, pick_device, pick_dtype, unload, weight_files
from craft_fast.sdxl.unet import is_pristine, pristine_unet
from craft_fast.tiny.random_model import WORDS, build_random_sdxl


@pytest.fixture
def copy(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sdxl_folder, tmp_path / "model"))


def test_what_is_loaded(sdxl_folder: Path) -> None:
    model = load_sdxl(sdxl_folder, device="auto", dtype="float32")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.prediction_type == "epsilon"
    assert model.vae_scale_factor == 4
    assert model.digest == model_digest(sdxl_folder)
    assert not model.unet.training
    assert not any(p.requires_grad for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters())
    stored = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.unet.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name].cpu()) for name in stored)
    assert all(len(model.tokenizer(word).input_ids) == 3 for word in WORDS)
    unload(model)
    assert model.unet is None
    assert model.vae is None


def test_float16_keeps_the_vae_in_float32(sdxl_folder: Path) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float16")
    assert model.unet.dtype == torch.float16
    assert model.text_encoder.dtype == torch.float16
    assert model.vae.dtype == torch.float32


def test_prediction_type_comes_from_the_scheduler_or_the_caller(copy: Path) -> None:
    config = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "prediction_type": "v_prediction"}))
    assert load_sdxl(copy, device="cpu", dtype="float32").prediction_type == "v_prediction"
    assert load_sdxl(copy, device="cpu", dtype="float32", prediction_type="epsilon").prediction_type == "epsilon"
    config.write_text(json.dumps({**values, "prediction_type": "sample"}))
    with pytest.raises(ConfigError, match="sample"):
        load_sdxl(copy, device="cpu", dtype="float32")


def test_only_the_fp16_variant_there(copy: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        [file] = (copy / part).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert load_sdxl(copy, device="cpu", dtype="float32").unet.dtype == torch.float32


def test_both_variants_there_takes_the_full_one(copy: Path) -> None:
    [full] = (copy / "unet").glob("*.safetensors")
    shutil.copy(full, full.with_name(f"{full.stem}.fp16.safetensors"))
    assert weight_files(copy / "unet") == [full]


def test_missing_things_are_environment_problems(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as missing:
        load_sdxl(tmp_path / "nowhere", device="cpu")
    assert missing.value.exit_code == 4
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(EnvironmentProblem, match="text_encoder_2"):
        load_sdxl(copy, device="cpu")
    with pytest.raises(EnvironmentProblem, match="text_encoder_2"):
        model_digest(copy)


def test_a_hub_id_that_cannot_be_had_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentProblem, match="hub") as missing:
        model_digest("nobody/no-such-model")
    assert "model.path" in missing.value.hint


def test_a_part_without_weights(copy: Path) -> None:
    next((copy / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(EnvironmentProblem, match="no weights"):
        load_sdxl(copy, device="cpu")


def test_pickled_weights_are_refused_with_the_command_that_converts(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(IntegrityError) as refused:
        load_sdxl(copy, device="cpu")
    assert refused.value.exit_code == 6
    assert "weights_only=True" in refused.value.hint


def test_a_pickle_renamed_to_safetensors_is_refused(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(IntegrityError, match="pickle"):
        load_sdxl(copy, device="cpu")


def test_not_finite_weights_are_refused(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"conv_in\.weight"):
        load_sdxl(copy, device="cpu")


@pytest.mark.parametrize("damage", ["truncate", "config"])
def test_damaged_files_are_integrity_errors(copy: Path, damage: str) -> None:
    if damage == "truncate":
        [file] = (copy / "unet").glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:5000])
    else:
        (copy / "tokenizer" / "tokenizer.json").write_text("{ not json")
    with pytest.raises(IntegrityError):
        load_sdxl(copy, device="cpu")


def test_the_digest_follows_weights_and_settings_alone(copy: Path) -> None:
    before = model_digest(copy)
    (copy / "README.md").write_text("words")
    assert model_digest(copy) == before
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    changed = model_digest(copy)
    assert changed != before
    build_random_sdxl(copy, seed=1)
    assert model_digest(copy) not in {before, changed}


def test_devices_and_dtypes_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="tpu9"):
        pick_device("tpu9")
    with pytest.raises(EnvironmentProblem, match="GPU"):
        pick_device("cuda:99")
    with pytest.raises(ConfigError, match="float8"):
        pick_dtype("float8", torch.device("cpu"))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_changed_unet_is_read_again(sdxl_folder: Path) -> None:
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    assert pristine_unet(model) is model.unet
    original = model.unet
    model.unet.requires_grad_(True)
    assert not is_pristine(model.unet)
    assert pristine_unet(model) is not original
    assert is_pristine(model.unet)
    import bitsandbytes as bnb

    model.unet.time_embedding.linear_1 = bnb.nn.Linear4bit(32, 128, quant_type="nf4")
    assert isinstance(model.unet.time_embedding.linear_1, nn.Linear)
    assert not is_pristine(model.unet)


def test_imports_and_loading_print_nothing(sdxl_folder: Path) -> None:
    program = (
        "import sys; from craft_fast.sdxl.load import load_sdxl; import craft_fast.sdxl.sampling, bitsandbytes, peft;"
        "from diffusers import StableDiffusionXLPipeline; load_sdxl(sys.argv[1], device='cpu', dtype='float32')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(sdxl_folder)], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout == ""
    assert result.stderr == ""


def test_errors_are_ours(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "down_block_types": 3}')
    with pytest.raises(CraftError):
        load_sdxl(copy, device="cpu")
