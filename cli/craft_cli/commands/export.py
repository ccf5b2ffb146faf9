"""``craft-fast export``: write the LoRA."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 7: write the LoRA file and check that it loads.",
    "The file is what diffusers' pipe.load_lora_weights takes.",
    examples=(
        "craft-fast export --name sea",
        "craft-fast export --name sea --set export.dtype=float16",
    ),
)
export = stage_command("export", gpu=False)
