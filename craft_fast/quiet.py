"""Keeps third-party import notices off the user's screen; warnings that matter stay.

Notices that are handled (each with the reason why a user need not act):

* bitsandbytes on CPUs with AVX512-BF16 asks a hub for an optional kernel; see ``import_bitsandbytes``.
* transformers tells that torchvision is absent; nothing here needs it.
* diffusers names optional packages that are absent; each feature that needs one says so itself.
* tokenizers warns about forks after use of its thread pool; parallel tokenising is not used.
* huggingface_hub and transformers draw their own progress bars over ours.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from types import ModuleType
from typing import Any

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_LOUD_LOGGERS = ("bitsandbytes", "transformers", "diffusers", "peft", "accelerate", "torchao", "kernels")
_done = False


def quiet_third_party() -> None:
    """Set environment and log levels so that third-party imports print nothing but errors.

    Call before torch, diffusers, transformers or bitsandbytes are imported: the environment is read at import
    time. Variables the user has set are kept. ``CRAFT_DEBUG=1`` keeps every notice. Imports none of them itself.
    """
    global _done
    if _done:
        return
    _done = True
    # Spinning threads on a busy machine were measured 90x slower: waiting must be passive.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("CRAFT_DEBUG") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in _LOUD_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*torchvision.*", category=UserWarning)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(diffusers|transformers|peft|bitsandbytes)\b.*")


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes without its request to a model hub; diffusers and PEFT import it too, so call this first.

    On CPUs with AVX512-BF16 the package asks a hub for an optional inference kernel while it is imported: 3 s, a
    notice, and on machines that reach the hub another result than on those that do not. That kernel is never used
    here, so ``kernels`` is hidden during the import.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    missing = object()
    hidden: Any = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        if hidden is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


def quiet_progress_bars() -> None:
    """Turn off the loading bars of transformers and diffusers; call once they are imported."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
