"""Sets the environment of every test before torch is imported, and keeps tests apart from one another."""

from __future__ import annotations

import gc
import os
import sys

# Read by OpenMP, tokenizers and huggingface_hub at import time, so they must be set before any of them is loaded.
_IMPORTED_EARLY = [name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules]
for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads on a busy machine were measured 90x slower
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)
# What a developer has set for own runs must not decide what the tests see; CRAFT_PARITY_* is for the tests.
for _name in [name for name in os.environ if name.startswith("CRAFT_") and not name.startswith("CRAFT_PARITY_")]:
    del os.environ[_name]

from craft_fast.quiet import quiet_third_party  # noqa: E402  (the environment comes first)

quiet_third_party()

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    if _IMPORTED_EARLY:
        raise pytest.UsageError(f"{', '.join(_IMPORTED_EARLY)} came before tests/conftest.py set OMP_* and HF_*")
    if config.getoption("markexpr").startswith("not gpu"):
        # Read where a kernel is defined: without a GPU, Triton's interpreter runs the kernels, on the CPU.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch finds none here")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Leaves what is imported by now out of later collections of garbage, which end every phase of a run.

    Beside everything that a test process imports, one took 0.23 s, and such collections half the time of test files
    that run whole pipelines. What the tests make is collected as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_place_and_environment() -> Iterator[None]:
    """A test that changes the working folder or the environment does not hand them to the next one."""
    folder, environment = os.getcwd(), dict(os.environ)
    yield
    os.chdir(folder)
    for name in set(os.environ) - set(environment):
        # PYTEST_CURRENT_TEST is pytest's own and changes between the phases of a test.
        if name != "PYTEST_CURRENT_TEST":
            del os.environ[name]
    for name, value in environment.items():
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != value:
            os.environ[name] = value
