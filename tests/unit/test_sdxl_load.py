"""Loading an SDXL: what is taken, what is refused and how, and what is freed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from craft_fast.config import EngineSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, IntegrityError
from craft_fast.sdxl.load import WEIGHTED, load_sdxl, model_digest, pick_device, pick_dtype, unload, weight_files
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
    assert model.loaded == WEIGHTED
    unload(model)
    assert model.loaded == ()


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


# ---- folders that are not whole


def test_a_weight_that_is_missing_is_not_left_at_random(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"conv_out\.bias"):
        load_sdxl(copy, device="cpu")
    [file] = (copy / "text_encoder").glob("*.safetensors")
    save_file({"nothing": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="text_encoder"):
        load_sdxl(copy, device="cpu", engine=EngineSettings(resident="never")).use("text_encoder")


def test_a_missing_piece_of_split_weights_is_named(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(EnvironmentProblem, match="1 of 2 files"):
        load_sdxl(copy, device="cpu")


def test_split_weights_load(copy: Path, sdxl_folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    shutil.rmtree(copy / "unet")
    UNet2DConditionModel.from_pretrained(sdxl_folder / "unet").save_pretrained(copy / "unet", max_shard_size="200KB")
    assert len(weight_files(copy / "unet")) > 1
    loaded = load_sdxl(copy, device="cpu", dtype="float32").unet.state_dict()
    stored = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_copies_that_are_not_used_do_not_count(copy: Path) -> None:
    before = model_digest(copy)
    [full] = (copy / "unet").glob("*.safetensors")
    shutil.copy(full, full.with_name(f"{full.stem}.fp16.safetensors"))
    shutil.copy(full, full.with_name(f"{full.stem}.non_ema.safetensors"))
    assert weight_files(copy / "unet") == [full]
    assert model_digest(copy) == before


# ---- noise schedules


def schedule(folder: Path, **values: object) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def test_a_folders_schedule_that_ends_in_noise(copy: Path) -> None:
    schedule(copy, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    options = {"device": "cpu", "dtype": "float32", "engine": EngineSettings(resident="never")}
    model = load_sdxl(copy, **options)  # type: ignore[arg-type]
    assert model.zero_terminal_snr
    assert model.scheduler.config.timestep_spacing == "trailing"
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6
    plain = load_sdxl(copy, zero_terminal_snr="no", **options)  # type: ignore[arg-type]
    assert not plain.zero_terminal_snr
    assert float(plain.scheduler.alphas_cumprod[-1]) > 1e-3
    schedule(copy, prediction_type="epsilon")
    with pytest.raises(ConfigError, match="pure noise"):
        load_sdxl(copy, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "UNet2DConditionModel", "no"])
def test_a_schedule_of_another_kind_is_refused(copy: Path, name: str) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(EnvironmentProblem, match=name):
        load_sdxl(copy, device="cpu")


# ---- the network


def hub_cache(root: Path, name: str, source: Path) -> Path:
    """Lay ``source`` out as the hub's cache does."""
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(source, repository / "snapshots" / ("0" * 40)))


NO_NETWORK = """
import json, socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(str(args[:2]))
    raise OSError("the network was asked: " + str(args[:2]))
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
from craft_fast.errors import CraftError
from craft_fast.sdxl.load import load_sdxl
for options in json.loads(sys.argv[1]):
    try:
        model = load_sdxl(**options, device="cpu", dtype="float32")
        print(model.digest, *model.loaded)
    except CraftError as error:
        print(type(error).__name__, error.why, error.hint)
    print(len(asked))
"""


def without_network(cache: Path, *calls: dict[str, object]) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home")}
    result = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, json.dumps(calls)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_no_network_is_asked_when_all_is_here(sdxl_folder: Path, tmp_path: Path) -> None:
    hub_cache(tmp_path, "some/sdxl", sdxl_folder)
    folder, none, hub, none_2, other, none_3 = without_network(
        tmp_path,
        {"path": str(sdxl_folder)},
        {"path": "some/sdxl"},
        {"path": "some/sdxl", "vae": "some/sdxl", "config": "some/sdxl", "offline": True},
    )
    assert folder == hub == other
    assert folder == " ".join([model_digest(sdxl_folder), *WEIGHTED])
    assert none == none_2 == none_3 == "0"


def test_offline_names_the_command_and_asks_nobody(sdxl_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "some/sdxl", sdxl_folder)
    shutil.rmtree(snapshot / "vae")
    said, count, online, tried = without_network(
        tmp_path, {"path": "some/sdxl", "offline": True}, {"path": "some/sdxl"}
    )
    assert said.startswith("EnvironmentProblem")
    assert "lacks vae" in said
    assert "model.offline is set" in said
    assert "hf download some/sdxl --include" in said
    assert "model_index.json" in said
    assert count == "0"
    # The guard itself works: without offline the missing part is asked for.
    assert "EnvironmentProblem" in online
    assert int(tried) > 0
