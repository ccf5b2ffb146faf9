"""``craft-fast lora``: what a file is, other names, sums, lower ranks, whole models; and every file that is no LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.errors import ExitCode
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.layouts import adapted_shapes
from craft_fast.lora.metadata import header
from craft_fast.lora.reading import read_adapter
from craft_fast.lora.writing import write_adapter
from craft_fast.sdxl.source import open_source
from craft_fast.settings_io import load_settings, render_yaml
from craft_fast.tiny.random_model import build_random_sdxl
from tests.unit import original_layout as original
from tests.unit.small_adapters import everywhere, layer

PROGRAMS = ["diffusers", "ComfyUI", "A1111", "Forge"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two LoRAs of the tiny UNet's attention, in kohya's names."""
    folder = tmp_path_factory.mktemp("made")
    unet = {
        "unet": {name: shape for name, shape in adapted_shapes(open_source(model))["unet"].items() if ".attn" in name}
    }
    for name, rank, seed in (("sea", 6, 0), ("style", 4, 999)):
        adapter = everywhere(unet, rank=rank, seed=seed, alpha=3.0)
        facts = {"rewards": "h, p", "accepted": 12}
        adapter = Adapter(adapter.layers, header(adapter, name=name, facts=facts))
        write_adapter(folder / f"{name}.safetensors", adapter, unet_config=unet_config(model))
    return folder


def unet_config(model: Path) -> dict[str, Any]:
    return dict(open_source(model).main.config("unet"))


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the two LoRAs in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for file in made.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def lora(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["lora", *args], prog_name="craft-fast")
    assert done.exit_code == code, done.output
    return done


def result(*args: str, code: int = 0) -> dict[str, Any]:
    events = [json.loads(line) for line in lora(*args, "--json", code=code).stdout.splitlines()]
    found: dict[str, Any] = next(event for event in events if event["event"] == "result")
    return found


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


# ---- check


def test_check_says_what_it_is_and_who_loads_it(model: Path) -> None:
    said = result("check", "sea.safetensors", "--model", str(model))
    assert (said["ok"], said["naming"], said["misfits"]) == (True, "kohya's names with sgm blocks", [])
    assert (said["ranks"], said["alphas"], said["layers"]) == ({"6": 32}, {"3": 32}, {"unet": 32})
    assert said["dtypes"] == ["F32"]
    assert (said["craft"]["craft.rewards"], said["craft"]["craft.accepted"]) == ("h, p", "12")
    assert [(one["program"], one["verdict"]) for one in said["programs"]] == [(name, "loads") for name in PROGRAMS]
    text = lora("check", "sea.safetensors", "--model", str(model)).stdout
    assert "sea.safetensors: a LoRA in kohya's names with sgm blocks, rank 6, F32" in text
    assert all(name in text for name in ("ComfyUI    loads\n", " sdxl_base_v1-0\n", "craft.accepted"))


def test_a_hidden_one_is_named_so(model: Path) -> None:
    said = {**metadata("sea.safetensors"), "ss_base_model_version": "sd_v1"}
    said.pop("modelspec.architecture")
    save_file(load_file("sea.safetensors"), "hidden.safetensors", said)
    done = lora("check", "hidden.safetensors", "--model", str(model), code=ExitCode.INTEGRITY)
    assert "A1111      hidden: taken for Stable Diffusion 1" in done.stdout
    assert "ComfyUI    loads\n" in done.stdout
    assert "Forge      loads: listed as of unknown base" in done.stdout
    assert "craft-fast lora convert hidden.safetensors --to kohya" in done.stderr
    lora("convert", "hidden.safetensors", "--to", "kohya", "--model", str(model))
    lora("check", "hidden-kohya.safetensors", "--model", str(model))


def test_what_should_load_and_does_not_is_an_error(model: Path) -> None:
    tensors = load_file("sea.safetensors")
    name = next(name for name in tensors if name.endswith("attn2_to_k.lora_down.weight"))
    tensors[name.replace("attn2", "attn9")] = tensors.pop(name)
    save_file(tensors, "broken.safetensors", metadata("sea.safetensors"))
    done = lora("check", "broken.safetensors", "--model", str(model), code=ExitCode.INTEGRITY)
    assert "loads partly, 31 of " in done.stdout
    assert "attn9" in done.stderr
    for command in (["convert", "--to", "kohya"], ["resize", "--rank", "2"]):
        refused = lora(command[0], "broken.safetensors", *command[1:], "--model", str(model), code=ExitCode.INTEGRITY)
        assert "attn9" in refused.stderr
    assert not list(Path().glob("broken-*"))


# ---- convert, merge, resize


def test_there_and_back_to_the_bit(model: Path) -> None:
    lora("convert", "sea.safetensors", "--to", "diffusers", "--model", str(model))
    said = result("check", "sea-diffusers.safetensors", "--model", str(model))
    assert (said["ok"], said["naming"]) == (True, "diffusers' names")
    assert [one["should_load"] for one in said["programs"]] == [True, False, False, False]
    assert [one["verdict"] for one in said["programs"]] == ["loads", *["does not load"] * 3]
    done = result(
        "convert", "sea-diffusers.safetensors", "--to", "kohya", "-o", "back.safetensors", "--model", str(model)
    )
    assert (done["format"], done["layers"]) == ("kohya", 32)
    assert Path("back.safetensors").read_bytes() == Path("sea.safetensors").read_bytes()
    lora("convert", "sea.safetensors", "--to", "kohya", "--dtype", "float16", "--model", str(model))
    half, full = load_file("sea-kohya.safetensors"), load_file("sea.safetensors")
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    lora("convert", "sea.safetensors", "--to", "onnx", code=ExitCode.USAGE)


def test_merge_adds_what_the_loras_add(model: Path) -> None:
    Path("style.safetensors").rename("a:1.safetensors")
    args = ["sea.safetensors:0.7", "a:1.safetensors:-.5", "-o", "both.safetensors", "--model", str(model)]
    said = result("merge", *args)
    assert (said["ranks"], [one["weight"] for one in said["merged"]]) == ({"10": 32}, [0.7, -0.5])
    config = unet_config(model)
    sea, style, both = (read_adapter(Path(f"{name}.safetensors"), config) for name in ("sea", "a:1", "both"))
    for name, one in both.layers.items():
        want = 0.7 * sea.layers[name].delta() - 0.5 * style.layers[name].delta()
        assert (one.delta() - want).abs().max() < 1e-6
    parts = json.loads(metadata("both.safetensors")["craft.merged"])
    assert [(one["lora"], one["weight"]) for one in parts] == [("sea.safetensors", 0.7), ("a:1.safetensors", -0.5)]
    assert "craft.rewards" not in both.metadata  # one training's facts are not the sum's
    lora("check", "both.safetensors", "--model", str(model))
    refused = lora("merge", *args, code=ExitCode.USAGE)
    assert "--force" in refused.stderr
    cut = result("merge", *args, "--rank", "5", "--force")
    assert (cut["ranks"], 0 < cut["error"] < 1, len(cut["layers"])) == ({"5": 32}, True, 32)
    # A file whose name ends like a weight is that file.
    shutil.copy("sea.safetensors", "odd:2")
    assert result("merge", "odd:2", "-o", "one.safetensors", "--model", str(model))["merged"][0]["weight"] == 1.0


def test_resize_says_what_is_lost(model: Path) -> None:
    done = lora("resize", "sea.safetensors", "--rank", "2", "--model", str(model))
    assert "sea-rank2.safetensors: 32 of 32 layers cut" in done.stdout
    assert "worst layers" in done.stdout
    said = result("resize", "sea.safetensors", "--rank", "2", "--model", str(model), "--force")
    config = unet_config(model)
    before, after = (read_adapter(Path(f"{name}.safetensors"), config) for name in ("sea", "sea-rank2"))
    lost = sum(float((after.layers[name].delta() - one.delta()).square().sum()) for name, one in before.layers.items())
    size = sum(float(one.delta().square().sum()) for one in before.layers.values())
    assert said["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert after.metadata["craft.rewards"] == "h, p"
    assert (after.metadata["ss_network_dim"], after.metadata["ss_output_name"]) == ("2", "sea-rank2")
    same = result("resize", "sea.safetensors", "--rank", "6", "-o", "same.safetensors", "--model", str(model))
    assert (same["error"], same["changed"]) == (0.0, 0)
    close = result("resize", "sea.safetensors", "--max-error", "0.3", "-o", "c.safetensors", "--model", str(model))
    assert all(one["error"] <= 0.3 + 1e-6 for one in close["layers"].values())
    for wrong in ([], ["--rank", "0"], ["--max-error", "1.5"]):
        lora("resize", "sea.safetensors", *wrong, "-o", "no.safetensors", "--model", str(model), code=ExitCode.USAGE)
    assert not Path("no.safetensors").exists()


# ---- apply


def test_apply_to_a_folder_and_a_file(model: Path) -> None:
    said = result("apply", "sea.safetensors:0.5", "--model", str(model), "-o", "whole")
    assert (said["form"], said["changed"]) == ("folder", 32)
    lora("apply", "sea.safetensors:0.5", "--model", str(model), "-o", "whole.safetensors")
    again = ["apply", "style.safetensors", "--model", "whole.safetensors", "--model-config", str(model), "-o"]
    lora(*again, "more.safetensors")
    assert [one["strength"] for one in json.loads(metadata("more.safetensors")["craft.merged"])] == [0.5, 1.0]
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    path = "unet/diffusion_pytorch_model.safetensors"
    base, found = load_file(model / path)[f"{key}.weight"], load_file(Path("whole") / path)[f"{key}.weight"]
    delta = read_adapter(Path("sea.safetensors"), unet_config(model)).layers[f"unet.{key}"].delta()
    assert torch.equal(found, base + 0.5 * delta)
    assert "--force" in lora(*again, "more.safetensors", code=ExitCode.USAGE).stderr
    assert "--model" in lora("apply", "sea.safetensors", "-o", "x", code=ExitCode.USAGE).stderr
    assert not Path("x").exists()


def test_a_run_is_named_for_its_lora_and_its_model(model: Path, folder: Path) -> None:
    (folder / "runs/boats/lora").mkdir(parents=True)
    (folder / "runs/boats/manifest.sqlite").touch()
    settings = render_yaml(load_settings("tiny", None, [f"model.path={model}"]))
    (folder / "runs/boats/config.yaml").write_text(settings)
    none = lora("check", "boats", code=ExitCode.ENVIRONMENT)
    assert "has no LoRA yet" in none.stderr
    shutil.copy("sea.safetensors", "runs/boats/lora/craft.safetensors")
    lora("convert", "boats", "--to", "diffusers", "-o", "runs/boats/lora/craft-diffusers.safetensors")
    assert result("check", "boats")["model"] == str(model)
    assert result("check", "runs/boats/lora/craft.safetensors")["model"] == str(model)
    assert result("apply", "boats:0.3", "-o", "whole")["merged"][0]["strength"] == 0.3
    shutil.copy("style.safetensors", "runs/boats/lora/other.safetensors")
    assert result("check", "boats")["file"] == "runs/boats/lora/craft.safetensors"  # the one that the run exported
    (folder / "runs/boats/config.yaml").unlink()
    assert "craft.safetensors, other.safetensors" in lora("check", "boats", code=ExitCode.USAGE).stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("baots", "boats"), ("sae.safetensors", "sea.safetensors"), ("stile", "style")]
)
def test_the_closest_is_named(typed: str, meant: str, folder: Path) -> None:
    (folder / "runs/boats").mkdir(parents=True)
    (folder / "runs/boats/manifest.sqlite").touch()
    for name in (typed, f"{typed}:0.5"):
        command = ["merge", name, "-o", "x.safetensors"] if ":" in name else ["check", name]
        assert f"did you mean {meant}" in lora(*command, code=ExitCode.ENVIRONMENT).stderr


# ---- what is no LoRA of an SDXL


def kohya(name: str, shape: tuple[int, ...], rank: int = 4) -> dict[str, torch.Tensor]:
    one = layer(shape, rank)
    return {f"{name}.lora_down.weight": one.down, f"{name}.lora_up.weight": one.up, f"{name}.alpha": torch.tensor(4.0)}


def sd1(path: Path) -> None:
    save_file(kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 768)), path)


def sd1_middle(path: Path) -> None:
    """Names that SDXL has too."""
    save_file(kohya("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1280, 768)), path)


def sd2(path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    one = layer((320, 1024), 4)
    save_file({f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up}, path)


def flux(path: Path) -> None:
    save_file(kohya("lora_unet_double_blocks_0_img_attn_qkv", (96, 32)), path)


def lokr(path: Path) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.zeros(4, 4)}, path)


def loha(path: Path) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(4, 4)}, path)


def dora(path: Path) -> None:
    stem = "lora_unet_middle_block_1_proj_in"
    save_file({**kohya(stem, (1280, 1280)), f"{stem}.dora_scale": torch.zeros(1280, 1)}, path)


def nan(path: Path) -> None:
    tensors = kohya("lora_unet_middle_block_1_proj_in", (1280, 1280))
    tensors["lora_unet_middle_block_1_proj_in.lora_up.weight"][3, 1] = torch.nan
    save_file(tensors, path)


def pickled(path: Path) -> None:
    torch.save({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")


def cut(path: Path) -> None:
    path.write_bytes(Path("sea.safetensors").read_bytes()[:-100])


def half(path: Path) -> None:
    save_file({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.zeros(4, 1280)}, path)


def empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (sd1, "Stable Diffusion 1.5"),
        (sd1_middle, "Stable Diffusion 1.5"),
        (sd2, "Stable Diffusion 2"),
        (flux, "FLUX"),
        (lokr, "LoKr"),
        (loha, "LoHa"),
        (dora, "DoRA"),
        (nan, "NaN"),
        (pickled, "pickle"),
        (pointer, "Git LFS pointer"),
        (cut, "cut off"),
        (half, "lack one of their two"),
        (empty, "empty file"),
    ],
)
def test_what_is_no_sdxl_lora_is_called_by_its_name(make: Callable[[Path], None], said: str) -> None:
    make(Path("bad.safetensors"))
    for args in (
        ["check", "bad.safetensors"],
        ["resize", "bad.safetensors", "--rank", "2", "-o", "out.safetensors"],
        ["merge", "bad.safetensors:0.5", "-o", "out.safetensors"],
    ):
        done = lora(*args, code=ExitCode.INTEGRITY)
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not Path("out.safetensors").exists()


def test_a_whole_model_is_no_lora_and_a_lora_is_no_model(model: Path) -> None:
    original.write(original.from_folder(model), Path("whole.safetensors"), {"modelspec.prediction_type": "epsilon"})
    done = lora("check", "whole.safetensors", code=ExitCode.INTEGRITY)
    assert "this is a whole SDXL" in done.stderr
    assert "--model whole.safetensors" in done.stderr
    args = ["--model", "sea.safetensors", "-o", "out.safetensors"]
    done = lora("apply", "style.safetensors", *args, code=ExitCode.ENVIRONMENT)
    assert "this is a LoRA or another adapter" in done.stderr
    assert "craft-fast lora apply FILE --model BASE" in done.stderr
    assert not Path("out.safetensors").exists()
