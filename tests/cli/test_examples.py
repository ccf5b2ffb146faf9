"""Every example of every help text and page is run, in one workspace; none may end in a usage or settings error.

The runs that examples name are there already, finished, of a small random model. What cannot end here (published
weights, a download, minutes of measuring) is in one of the tables below, with how it ends.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.errors import ExitCode
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.writing import write_adapter
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards

ROOT = Path(__file__).parents[2]
SETTINGS = """
preset: none
model: {path: ROOT/models/sdxl}
prompts: {file: ROOT/prompts.txt, heldout_file: ROOT/heldout.txt}
expand:
  variants: 2
  templates: ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean", "{prompt}, dark", "{prompt}, light"]
generate: {num_inference_steps: 2, guidance_scale: 1.5, batch_size: 12, max_images: 12}
rewards:
  h: {kind: clip, path: ROOT/rewards/h}
  p: {kind: clip, path: ROOT/rewards/p}
filter: {rewards: [h], target_samples: 4, block_groups: 4}
train: {rank: 2, lora_alpha: 2, steps: 2, micro_batch_size: 4, warmup_steps: 0, sample_every: 0, weighting: exponential}
evaluate: {prompts: 2, bootstrap_samples: 100}
report: {grid_prompts: 2}
"""
ATTENTION = [f"unet.down_blocks.1.attentions.{n}.transformer_blocks.0.attn1.to_q" for n in (0, 1)]
RUNS = ("tiny", "two", "mine", "own", "third", "demo", "other", "again", "mountains", "pony")
# Measures for minutes, or installs gigabytes: tests of their own run these; here the parser reads them.
ELSEWHERE = (r"craft-fast bench ", r"craft-fast rewards install (?!.*--dry-run)", r"craft-fast --install-completion")
# A whole run on the embedded model takes minutes (make demo is one): here up to its first stage.
LONG = (r"craft-fast run --config ",)
# What is missing here, by the example's words; exit code 4 says so.
MISSING = (
    r"--preset sdxl", r"pony\.safetensors", r"hpsv2|pickscore|image-reward", r"rewards verify$", r"rewards fetch",
    r"doctor", r"rewards score pictures/", r"--model sdxl\.safetensors", r"try pony",
)  # fmt: skip
# Timing the blocks of a whole SDXL takes minutes on a CPU; the plan by formula is the same command.
UNPROBED = (r"craft-fast plan .*--preset",)
TOO_LARGE = (r"craft-fast plan .*--preset sdxl",)  # exit code 5 is what plan is for
# LoRA files here are of SDXL's size, models/sdxl is a small one: exit code 6.
OTHER_SIZE = (r"style\.safetensors:0\.4 --model models/sdxl",)


def examples() -> list[str]:
    """Every ``craft-fast`` line of help texts and of code blocks in README and docs, each once."""
    found: dict[str, None] = {}

    def walk(command: Any) -> None:
        found.update(dict.fromkeys(re.findall(r"^ {2,4}(craft-fast .*?)\s*$", command.help or "", re.MULTILINE)))
        for inner in getattr(command, "commands", {}).values():
            walk(inner)

    walk(typer.main.get_command(app))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = (re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines())
            found.update(dict.fromkeys(line for line in lines if line.startswith("craft-fast ")))
    return list(found)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("workspace")
    build_random_sdxl(root / "models/sdxl")
    build_random_rewards(root / "rewards")
    prompts = ["a red circle", "a blue square", "two green stars", "a black cross"]
    for name in ("prompts.txt", "my-prompts.txt"):
        (root / name).write_text("\n".join(prompts))
    (root / "prompts.csv").write_text("prompt\n" + "\n".join(prompts))
    (root / "prompts.jsonl").write_text("\n".join(f'{{"prompt": "{text}"}}' for text in prompts))
    (root / "heldout.txt").write_text("a white star\na yellow square\n")
    for folder in ("pictures", "shapes"):
        (root / folder).mkdir()
        for number in range(4):
            Image.effect_noise((64, 64), 60).convert("RGB").save(root / folder / f"p{number}.png")
            (root / folder / f"p{number}.txt").write_text(prompts[number % 2])
    (root / "captions.csv").write_text(
        "image,prompt\n" + "\n".join(f"pictures/p{n}.png,a red circle" for n in range(4))
    )
    (root / "small.yaml").write_text(SETTINGS.replace("ROOT", str(root)))
    here = Path.cwd()
    os.chdir(root)
    try:
        craft("craft-fast run --config small.yaml --name sea", code=0)
        for name in RUNS:
            shutil.copytree("runs/sea", f"runs/{name}")
        some = {name: LoraLayer(torch.ones(4, 640), torch.ones(640, 4), 4.0) for name in ATTENTION}
        for name in ("sea", "style"):
            write_adapter(
                Path(f"{name}.safetensors"), Adapter(some), metadata={"ss_base_model_version": "sdxl_base_v1-0"}
            )
        write_adapter(Path("sea-peft.safetensors"), Adapter(some), format="diffusers")
        craft("craft-fast init sea.yaml --preset sdxl --set train.rank=32", code=0)
        (root / "sea.yaml").unlink()
        yield root
    finally:
        os.chdir(here)


def craft(example: str, *more: str, code: int | None = None) -> Any:
    done = CliRunner().invoke(app, [*shlex.split(example)[1:], *more], prog_name="craft-fast")
    assert code is None or done.exit_code == code, done.output
    return done


def clear_output(root: Path, example: str) -> None:
    """Two examples may write to one name; what an earlier one left is not what this one is about."""
    for name in re.findall(r"(?:-o|--output|craft-fast dataset) (\S+)", example):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def fits(patterns: tuple[str, ...], example: str) -> bool:
    return any(re.search(pattern, example) for pattern in patterns)


def test_examples_are_found() -> None:
    assert len(examples()) > 90
    assert "craft-fast run" in examples()
    for table in (ELSEWHERE, LONG, MISSING, UNPROBED, TOO_LARGE, OTHER_SIZE):
        for pattern in table:
            assert any(re.search(pattern, example) for example in examples()), f"no example needs {pattern}"


def test_every_example_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(workspace / "hub"))
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(workspace / "shelf"))
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(workspace / "packages"))
    wrong = []
    for example in examples():
        clear_output(workspace, example)
        if fits(ELSEWHERE, example):
            done = craft(example, "--help")
        elif fits(LONG, example):
            done = craft(example, "--until", "expand")
        elif fits(UNPROBED, example):
            done = craft(example, "--no-probe")
        else:
            done = craft(example)
        allowed = {int(ExitCode.OK)}
        allowed |= {int(ExitCode.ENVIRONMENT)} if fits(MISSING, example) else set()
        allowed |= {int(ExitCode.RESOURCE)} if fits(TOO_LARGE, example) else set()
        allowed |= {int(ExitCode.INTEGRITY)} if fits(OTHER_SIZE, example) else set()
        if done.exit_code not in allowed:
            last = done.output.strip().splitlines()[-6:]
            wrong.append(f"{example}\n  exit {done.exit_code}: " + "\n    ".join(last))
    assert not wrong, "\n".join(wrong)
