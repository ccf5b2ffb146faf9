"""Keeps third-party import notices off the user's screen; warnings that matter stay.

Notices that are handled (each with the reason why a user need not act):

* bitsandbytes on CPUs with AVX512-BF16 offers an optional kernel from a hub; the built-in path is used.
* transformers tells that torchvision is absent; nothing here needs it.
* diffusers names optional packages that are absent; each feature that needs one says so itself.
* tokenizers warns about forks after use of its thread pool; parallel tokenising is not used.
* huggingface_hub and transformers draw their own progress bars over ours.
"""

from __future__ import annotations

import logging
import os
import warnings

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


def quiet_progress_bars() -> None:
    """Turn off the loading bars of transformers and diffusers; call once they are imported."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
