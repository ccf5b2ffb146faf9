"""``craft-fast try`` as a user meets it: a run or a file, strengths, what fits which model, what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import Result

from craft_fast.errors import ExitCode
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.reading import read_adapter
from craft_fast.lora.writing import kohya_tensors
from craft_fast.sdxl.load import open_source
from craft_fast.store import atomic
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import Run, open_run
from tests.cli.small_pair import craft, result

LORA = "lora/craft.safetensors"


@pytest.fixture(scope="module")
def here(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``one``, and its LoRA alone as ``mine.safetensors``."""
    root = tmp_path_factory.mktemp("try")
    shutil.copytree(pair / "runs" / "one", root / "runs" / "one")
    shutil.copy(pair / "runs" / "one" / LORA, root / "mine.safetensors")
    return root


def attempt(root: Path, lora: str, *args: str) -> Result:
    target = () if "-o" in args else ("-o", str(root / "grid.png"))
    return craft("try", lora, "--runs", str(root / "runs"), *target, *args)


def evaluated(run: Run) -> tuple[dict[str, dict[str, str]], list[str]]:
    """sha256 of the evaluated pictures by side and prompt, and the prompts in their order."""
    rows = {row.name: row for row in run.manifest.stages()}
    texts = {one.prompt.prompt_id: one.prompt.text for one in run.manifest.groups(rows["expand"].key, "heldout")}
    shas = {
        side: {
            texts[name]: ref.sha256 for name, ref in run.manifest.files(f"eval_{side}", rows["evaluate"].key).items()
        }
        for side in ("base", "tuned")
    }
    return shas, list(texts.values())


@pytest.fixture(scope="module")
def tried(here: Path) -> dict[str, Any]:
    """All prompts of the run's evaluation, at strengths 0 and 1."""
    with open_run(here / "runs" / "one", read_only=True) as run:
        _, prompts = evaluated(run)
    typed = [word for prompt in prompts for word in ("-p", prompt)]
    return result(
        attempt(here, "one", *typed, "--strength", "0", "--strength", "1", "--each", str(here / "each"), "--json")
    )


def test_strength_0_is_the_evaluated_base_and_1_the_tuned_picture(here: Path, tried: Mapping[str, Any]) -> None:
    with open_run(here / "runs" / "one", read_only=True) as run:
        wanted, prompts = evaluated(run)
    for strength, side in ((0, "base"), (1, "tuned")):
        found = {one["prompt"]: one["sha256"] for one in tried["pictures"] if one["strength"] == strength}
        assert found == wanted[side]
    assert wanted["base"] != wanted["tuned"]
    assert (tried["prompts"], tried["seeds"], tried["strengths"]) == (prompts, [0], [0.0, 1.0])
    assert tried["moved"][0] == {"strength": 0.0, "levels": 0.0}
    assert tried["moved"][1]["levels"] > 0
    assert not tried["changes_nothing"]


def test_the_grid_says_what_it_is(here: Path, tried: Mapping[str, Any]) -> None:
    assert tried["path"] == str(here / "grid.png")
    assert tried["lora_sha256"] == sha256_file(here / "mine.safetensors")
    files = {one["file"]: one["sha256"] for one in tried["pictures"]}
    assert len(files) == 14
    for name, sha256 in files.items():
        assert sha256_file(here / "each" / name) == sha256
    plain = attempt(here, "one", "-p", "a star", "-o", str(here / "plain.png"), "--seed", "3", "--seed", "4")
    assert plain.exit_code == 0, plain.output
    assert "mean change of a colour value against strength 0" in plain.stdout
    assert f"grid: {here / 'plain.png'}" in plain.stdout
    with Image.open(here / "plain.png") as grid:
        said = grid.text  # type: ignore[attr-defined]
    assert json.loads(said["craft.strengths"]) == [0.0, 0.5, 1.0, 1.5]
    assert json.loads(said["craft.seeds"]) == [3, 4]
    assert json.loads(said["craft.prompts"]) == ["a star"]
    assert json.loads(said["craft.lora_sha256"]) == tried["lora_sha256"]


def test_both_formats_and_a_file_beside_its_run_give_equal_pictures(here: Path) -> None:
    mine, peft = str(here / "mine.safetensors"), str(here / "peft.safetensors")
    converted = craft("lora", "convert", mine, "--to", "diffusers", "-o", peft, "--model", open_settings(here)["path"])
    assert converted.exit_code == 0, converted.output
    typed = ("-p", "a red circle", "--strength", "1", "--strength", "-0.5", "--json")
    config = ("--config", str(here / "runs" / "one" / "config.yaml"))
    tries = [
        attempt(here, str(here / "runs" / "one" / LORA), *typed),
        attempt(here, mine, *typed, *config),
        attempt(here, peft, *typed, *config),
    ]
    shas = [[one["sha256"] for one in result(done)["pictures"]] for done in tries]
    assert shas[0] == shas[1] == shas[2]
    assert len(set(shas[0])) == 2


def open_settings(root: Path) -> dict[str, Any]:
    from craft_fast.settings_io import load_settings

    return load_settings(config=root / "runs" / "one" / "config.yaml").model.model_dump()


def test_a_lora_that_changes_nothing_is_told(here: Path) -> None:
    config: Any = open_source(open_settings(here)["path"]).config("unet")
    adapter = read_adapter(here / "mine.safetensors", config)
    still = {name: LoraLayer(one.down, torch.zeros_like(one.up), one.alpha) for name, one in adapter.layers.items()}
    atomic.write_safetensors(here / "still.safetensors", kohya_tensors(Adapter(still), config))
    done = attempt(
        here, str(here / "still.safetensors"), "-p", "a", "--strength", "0", "--strength", "1",
        "--config", str(here / "runs" / "one" / "config.yaml"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "the LoRA changes nothing" in done.stderr
    assert f"craft-fast lora check {here / 'still.safetensors'}" in done.stderr
    assert "0.00 of 255" in done.stdout


def test_a_lora_of_another_size_names_the_option(here: Path) -> None:
    layer = LoraLayer(torch.ones(1, 2048), torch.ones(640, 1), 1.0)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    atomic.write_safetensors(here / "full.safetensors", kohya_tensors(Adapter({name: layer}), None))
    full = attempt(here, str(here / "full.safetensors"), "-p", "a")
    assert full.exit_code == ExitCode.USAGE
    assert "--preset sdxl-8gb" in full.stderr
    assert "--set model.path=" in full.stderr
    # And one of the tiny model's size with another model.
    tiny = open_source("package:craft_fast.tiny/assets/sdxl")
    out, width = tiny.main.shapes("unet")["add_embedding.linear_2.weight"]
    small = {"unet.add_embedding.linear_2": LoraLayer(torch.ones(1, width), torch.ones(out, 1), 1.0)}
    atomic.write_safetensors(here / "small.safetensors", kohya_tensors(Adapter(small), tiny.config("unet")))
    other = attempt(
        here, str(here / "small.safetensors"), "-p", "a", "--set", f"model.path={open_settings(here)['path']}"
    )
    assert other.exit_code == ExitCode.USAGE
    assert "--preset tiny" in other.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("-p", "a", "--strength", "nan"), ExitCode.USAGE, "This strength cannot be used"),
        (("-p", "a", "--strength", "inf"), ExitCode.USAGE, "This strength cannot be used"),
        (("-p", "\x1b[31mred"), ExitCode.USAGE, "control character U+001B"),
        (("-p", "a", "-o", "grid.jpg"), ExitCode.USAGE, "--output grid.png"),
        (("-p", "a", "--seed", "-1"), ExitCode.USAGE, "--seed"),
        (("-p", "a", "--set", "generate.width_px=8192", "--set", "generate.height_px=4096"),
         ExitCode.USAGE, "4 pictures of 8192 x 4096 px"),
        (("-p", "a", "--set", "generate.nosuch=1"), ExitCode.CONFIG, "generate.nosuch"),
        ((), ExitCode.USAGE, "--prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(here: Path, args: tuple[str, ...], code: ExitCode, said: str) -> None:
    before = sorted(here.iterdir())
    done = attempt(here, "one", *args)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert sorted(here.iterdir()) == before


def test_what_is_no_lora_is_refused(here: Path, tmp_path: Path) -> None:
    unknown = attempt(here, "on", "-p", "a")
    assert (unknown.exit_code, "did you mean one?" in unknown.stderr) == (ExitCode.ENVIRONMENT, True)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickled")
    assert attempt(here, str(tmp_path / "bad.safetensors"), "-p", "a").exit_code == ExitCode.INTEGRITY
    mine = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(mine)
    kept = mine.read_bytes()
    done = attempt(here, "one", "-p", "a", "-o", str(mine))
    assert (done.exit_code, mine.read_bytes()) == (ExitCode.USAGE, kept)
    (here / "runs" / "one" / "lora" / "craft-unet").mkdir()
    full = attempt(here, "one", "-p", "a")
    (here / "runs" / "one" / "lora" / "craft-unet").rmdir()
    assert (full.exit_code, "the whole UNet" in full.stderr) == (ExitCode.USAGE, True)
