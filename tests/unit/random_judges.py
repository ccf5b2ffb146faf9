"""What tests of reward folders share: which random reward is of which family, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from craft_fast.config import RewardSettings

KINDS = {"h": "clip", "p": "clip", "a": "aesthetic", "image_reward": "image_reward"}


def spec(folders: Path, name: str, **changes: Any) -> RewardSettings:
    """Settings of a reward of ``build_random_rewards``."""
    return RewardSettings(**{"kind": KINDS[name], "path": str(folders / name), **changes})
