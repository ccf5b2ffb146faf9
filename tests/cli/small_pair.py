"""Two small finished runs that only their seeds set apart, for tests of what is done with finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from craft_cli.main import app
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'x' \u202a"[:-2]
SETTINGS = """
preset: none
model: {path: ROOT/model}
prompts: {file: ROOT/prompts.txt, heldout_file: ROOT/heldout.txt}
expand: {variants: 2, templates: ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]}
generate: {num_inference_steps: 2, guidance_scale: 1.5, batch_size: 8, max_images: 12}
rewards:
  h: {kind: clip, path: ROOT/rewards/h}
  image_reward: {kind: image_reward, path: ROOT/rewards/image_reward, held_out: true}
filter: {rewards: [h], target_samples: 100, block_groups: 4}
train: {rank: 2, lora_alpha: 3, steps: 4, micro_batch_size: 4, warmup_steps: 0, learning_rate: 0.05, sample_every: 0}
evaluate: {prompts: 7, bootstrap_samples: 100}
report: {grid_prompts: 2}
"""


def craft(*args: str) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, list(args), prog_name="craft-fast")


def result(done: Result) -> dict[str, Any]:
    """The object that a command with ``--json`` ends with."""
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    [found] = [row for row in rows if row["event"] == "result"]
    return dict(found)


def build(root: Path) -> Path:
    """``root`` with a random model, rewards, prompts, ``small.yaml``, and ``runs/one`` and ``runs/two``, finished."""
    build_random_sdxl(root / "model")
    build_random_rewards(root / "rewards")
    (root / "prompts.txt").write_text("red circle\nblue square\ngreen star\nblack heart\n")
    lines = [HOSTILE, *(f"two {colour} stars" for colour in ("red", "green", "blue", "pink", "gold", "white"))]
    (root / "heldout.txt").write_text("\n".join(lines) + "\n")
    (root / "small.yaml").write_text(SETTINGS.replace("ROOT", str(root)))
    for name, seed in (("one", 0), ("two", 5)):
        where = ("--config", str(root / "small.yaml"), "--runs", str(root / "runs"))
        done = craft("run", "--name", name, *where, "--set", f"seed={seed}", "--quiet")
        assert done.exit_code == 0, done.output
    return root
