"""``craft-fast export``: write the LoRA."""

from __future__ import annotations

from craft_cli.commands.stage import stage_command
from craft_cli.options import help_text

HELP = help_text(
    "Stage 7: write the LoRA file and check that it loads.",
    "In kohya's key names, which ComfyUI, A1111, Forge and diffusers load, unless export.format says otherwise. It is "
    "held against each program's rules; a file that one of them would not load is exit code 6.",
    examples=(
        "craft-fast export --name sea",
        "craft-fast export --name sea --set export.dtype=float16",
    ),
)
export = stage_command("export", gpu=False)
