"""Which expander the settings ask for; each is imported only when it is the one."""

from __future__ import annotations

from pathlib import Path

from craft_fast.config import ExpandSettings
from craft_fast.expanders.base import Expander


def make_expander(
    settings: ExpandSettings, *, cache_dir: Path, device: str = "auto", offline: bool = False
) -> Expander:
    """The expander that ``settings.kind`` asks for.

    Args:
        settings: the expand section.
        cache_dir: where answers of a server are kept, inside the run's folder.
        device: for a local model.
        offline: a local model must be local; a server that ``openai`` names is asked all the same.
    """
    if settings.kind == "template":
        from craft_fast.expanders.template import TemplateExpander

        return TemplateExpander(settings.templates, settings.slots)
    if settings.kind == "file":
        from craft_fast.expanders.file import FileExpander

        return FileExpander(settings.file or "")
    if settings.kind == "openai":
        from craft_fast.expanders.openai import OpenAIExpander

        return OpenAIExpander(settings, cache_dir)
    from craft_fast.expanders.transformers import TransformersExpander

    return TransformersExpander(settings, device, offline=offline)
