"""Random-weight models for all unit tests; building and loading them takes seconds, so it is done once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from craft_fast.config import EngineSettings
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.tiny.random_rewards import build_random_rewards


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of random rewards, one each family; tests must not change them."""
    return build_random_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def own(folders: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may break."""
    return Path(shutil.copytree(folders, tmp_path / "own"))
