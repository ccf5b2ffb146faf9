"""Who writes the variants ``e_ij`` of a prompt: templates, a file, a server, or a local model."""

from craft_fast.expanders.base import Expander, ExpandResult, Expansion, build_groups
from craft_fast.expanders.registry import make_expander

__all__ = ["ExpandResult", "Expander", "Expansion", "build_groups", "make_expander"]
