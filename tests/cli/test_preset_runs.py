"""Presets of full size, run to the end on a CPU: the same engine settings, on the embedded model and its judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from craft_cli.main import app
from craft_fast.settings_io import load_settings
from craft_fast.store.safe_load import load_safetensors

SMALL = """
preset: PRESET
model: {path: "package:craft_fast.tiny/assets/sdxl", device: cpu}
prompts:
  file: package:craft_fast.tiny/assets/prompts/train.txt
  heldout_file: package:craft_fast.tiny/assets/prompts/heldout.txt
  limit: 4
expand:
  variants: 2
  templates: ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]
generate: {height_px: 64, width_px: 64, num_inference_steps: 2, max_images: 12, batch_size: 6}
rewards:
  h: {kind: clip, path: "package:craft_fast.tiny/assets/rewards/h"}
  p: {kind: clip, path: "package:craft_fast.tiny/assets/rewards/p"}
  a: {kind: aesthetic, path: "package:craft_fast.tiny/assets/rewards/a"}
  image_reward: {kind: image_reward, path: "package:craft_fast.tiny/assets/rewards/image_reward"}
filter: {rewards: [a], target_samples: 4, block_groups: 4}
train: {TRAIN, rank: 2, steps: 2, grad_accum_steps: 2, warmup_steps: 0, sample_every: 0}
evaluate: {prompts: 2, bootstrap_samples: 100}
report: {grid_prompts: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "train", "exported"),
    [
        ("sdxl-6gb", "micro_batch_size: 1", "craft-sdxl.safetensors"),
        ("sdxl-paper", "weighting: positive", "craft-sdxl-paper-unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_preset_runs_to_the_end(
    preset: str, train: str, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL.replace("PRESET", preset).replace("TRAIN", train))
    options = ["--config", "small.yaml", "--offline", "--json"]
    done = CliRunner().invoke(app, ["run", *options], prog_name="craft-fast")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["event"] == "result"
    assert result["accepted"] > 0
    assert {stage["state"] for stage in result["stages"]} == {"done"}
    run = tmp_path / "runs" / "small"
    weights = load_safetensors(run / "lora" / exported)
    assert len(weights) > 100
    saved, wanted = load_settings(config=run / "config.yaml"), load_settings(preset)
    assert saved.engine == wanted.engine
    assert saved.engine.resident == "never"
    assert saved.model.offline
    assert (saved.train.method, saved.train.nf4_convs) == (wanted.train.method, wanted.train.nf4_convs)
