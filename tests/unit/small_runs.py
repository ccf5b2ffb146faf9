"""What tests of whole runs share."""

from __future__ import annotations

from typing import Any

from craft_fast.config import Settings


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    """The same settings with other values in some sections."""
    tree = settings.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Settings.model_validate(tree)
