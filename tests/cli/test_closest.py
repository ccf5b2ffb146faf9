"""A word that is not known names the closest one: commands, options, settings, presets, runs, stages, choices."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.errors import ExitCode, closest

USAGE, CONFIG, ENVIRONMENT = ExitCode.USAGE, ExitCode.CONFIG, ExitCode.ENVIRONMENT


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("sea", "mountains"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "manifest.sqlite").touch()
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("typed", "meant", "code"),
    [
        # commands and options, by the parser
        ("trian", "'train'", USAGE),
        ("evalute", "'evaluate'", USAGE),
        ("docter", "'doctor'", USAGE),
        ("lora chek", "'check'", USAGE),
        ("rewards lits", "'list'", USAGE),
        ("bench kernel", "'kernels'", USAGE),
        ("train --nmae x", "--name", USAGE),
        ("run --josn", "--json", USAGE),
        ("train --varm 8", "--vram", USAGE),
        ("generate --ofline", "--offline", USAGE),
        ("lora resize sea --rnak 8", "--rank", USAGE),
        # runs, stages, choices
        ("status --name sae", "did you mean sea?", USAGE),
        ("train --name montains", "did you mean mountains?", USAGE),
        ("compare sea montains", "did you mean mountains?", USAGE),
        ("lora check montains", "did you mean mountains?", ENVIRONMENT),
        ("try montains --prompt x", "did you mean mountains?", ENVIRONMENT),
        ("run --until trian", "did you mean train?", USAGE),
        ("lora convert sea.safetensors --to kohaya", "did you mean kohya?", USAGE),
        ("lora merge sea -o x.safetensors --to difusers", "did you mean diffusers?", USAGE),
        ("dataset out --name sea --caption bse", "did you mean base?", USAGE),
        ("rewards score . --format jsno", "did you mean json?", USAGE),
        ("rewards score . --dtype flaot16", "did you mean float16?", USAGE),
        ("rewards verify --device cdua", "did you mean cuda?", USAGE),
        ("rewards verify --dtype bflaot16", "did you mean bfloat16?", USAGE),
        ("rewards fetch hpsv21", "did you mean hpsv2.1?", USAGE),
        ("rewards verify pikscore", "did you mean pickscore?", USAGE),
        ("rewards score . --reward pikscore", "did you mean pickscore?", USAGE),
        ("rewards install hpsv", "did you mean hpsv2?", USAGE),
        ("bench kernels gegl", "geglu", USAGE),
        ("bench kernels --device cdua", "did you mean cuda?", USAGE),
        ("bench sdxl step", "craft-fast bench sdxl steps", USAGE),
        ("bench sdxl --size tinny", "did you mean tiny?", USAGE),
        ("bench rewards pikscore", "did you mean pickscore?", USAGE),
        # settings, their values, presets, files
        ("run --set trian.rank=3", "did you mean train?", CONFIG),
        ("run --set train.rnak=3", "did you mean train.rank?", CONFIG),
        ("run --set rank=3", "did you mean train.rank?", CONFIG),
        ("run --set export.format=kohaya", "did you mean kohya?", CONFIG),
        ("run --set generate.scheduler=Euler", "did you mean euler?", CONFIG),
        ("run --set train.gradient_checkpointing=al", "did you mean all?", CONFIG),
        ("run --set rewards.h.kind=hpsv21", "did you mean hpsv2.1?", CONFIG),
        ("run --set rewards.h.wieght=2", "did you mean rewards.h.weight?", CONFIG),
        ("run --preset sdxl-8g", "did you mean sdxl-8gb?", CONFIG),
        ("init x.yaml --preset tny", "did you mean tiny?", CONFIG),
        ("run promts.txt", "prompts.txt?", CONFIG),
    ],
)
def test_the_closest_word_is_named(typed: str, meant: str, code: ExitCode) -> None:
    done = CliRunner().invoke(app, typed.split(), prog_name="craft-fast")
    assert done.exit_code == code, done.output
    assert meant in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_nothing_is_guessed_where_nothing_is_close() -> None:
    assert closest("xyz", ["train", "filter"]) == ""
    assert "did you mean" not in CliRunner().invoke(app, ["status", "--name", "xyz"], prog_name="craft-fast").stderr
    assert closest("kohaya", (word for word in ("kohya", "diffusers"))) == "did you mean kohya? "
