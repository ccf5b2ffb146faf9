"""What tests of the evaluation share: six prompts, a judge whose scores can be computed, a LoRA that shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_fast import rng
from craft_fast.config import EvaluateSettings, ExportSettings, GenerateSettings, ModelSettings, Settings, TrainSettings
from craft_fast.evaluate import evaluate
from craft_fast.export import export_lora
from craft_fast.qlora.lora import add_lora, lora_state_dict
from craft_fast.records import Prompt, Provenance
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.store.run import Run

GENERATE = GenerateSettings(num_inference_steps=3, guidance_scale=2.0, batch_size=4)
EVALUATE = EvaluateSettings(prompts=6, bootstrap_samples=200)
PROMPTS = [Prompt(f"h{i}", f"a blue star {i}", "heldout") for i in range(6)]


@dataclass
class Brightness:
    """Mean of one channel: a judge whose scores a test can compute."""

    name: str = "brightness"
    channel: int = 0
    held_out: bool = False
    key: str = "b1"
    calls: int = 0
    rests: int = 0
    seen: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=lambda: Provenance("test", "0" * 64, precision="float32"))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        self.seen += prompts
        return images[:, self.channel].float().mean((1, 2))

    def rest(self) -> None:
        self.rests += 1

    def close(self) -> None:
        self.calls = -1


def write_lora(run: Run, folder: Path, strength: float = 0.3) -> Path:
    """An exported LoRA, and its copy in diffusers' keys, that changes the pictures; alpha differs from rank."""
    settings = Settings(
        model=ModelSettings(path=str(folder)),
        train=TrainSettings(rank=4, lora_alpha=6.0),
        export=ExportSettings(name="mine", format="both"),
    )
    unet = load_sdxl(folder, device="cpu", dtype="float32").unet
    add_lora(unet, rank=4, lora_alpha=6.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    state = {
        name: value + strength * rng.normal(value.shape, i)
        for i, (name, value) in enumerate(lora_state_dict(unet).items())
    }
    return run.path(export_lora(run, state, settings=settings, metadata={}).path)


def do(run: Run, model: SdxlModel, lora: Path, rewards: Sequence[Any], **changes: Any) -> Any:
    options: dict[str, Any] = {"settings": EVALUATE, "generate_settings": GENERATE, "seed": 3, "key": "k" * 64}
    return evaluate(run, model, lora, PROMPTS, rewards, **{**options, **changes})
