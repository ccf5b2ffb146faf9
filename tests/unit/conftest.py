"""One random-weight SDXL for all unit tests; building and loading it takes seconds, so it is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from craft_fast.config import EngineSettings
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.tiny.random_model import build_random_sdxl


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL folder in diffusers' layout; tests must not change it."""
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session")
def sdxl(sdxl_folder: Path) -> SdxlModel:
    """That folder, loaded on the CPU in float32; tests must leave it as they found it."""
    return load_sdxl(sdxl_folder, device="cpu", dtype="float32")


@pytest.fixture
def apart(sdxl_folder: Path) -> SdxlModel:
    """The model, its parts loaded for their phase alone."""
    return load_sdxl(sdxl_folder, device="cpu", dtype="float32", engine=EngineSettings(resident="never"))
