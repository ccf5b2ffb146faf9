"""A random-weight SDXL and a training set of six samples, and one call that trains on them in a run folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from craft_fast.cache import CachedSet
from craft_fast.config import EngineSettings, TrainSettings
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.store.run import open_run, read_log
from craft_fast.tiny.random_model import build_random_sdxl

if TYPE_CHECKING:
    from craft_fast.train import TrainResult

KEY = "5" * 64


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def load_model(sdxl_folder: Path) -> Callable[..., SdxlModel]:
    loaded: dict[tuple[str, str], SdxlModel] = {}

    def load(dtype: str = "float32", prediction_type: str = "epsilon") -> SdxlModel:
        key = (dtype, prediction_type)
        if key not in loaded:
            loaded[key] = load_sdxl(sdxl_folder, device="cpu", dtype=dtype, prediction_type=prediction_type)
        return loaded[key]

    return load


@pytest.fixture
def cached() -> CachedSet:
    draw = torch.Generator().manual_seed(3)
    return CachedSet(
        latents=torch.randn(6, 4, 8, 8, generator=draw),
        prompt_embeds=torch.randn(4, 32, 64, generator=draw),
        pooled_prompt_embeds=torch.randn(4, 32, generator=draw),
        prompt_index=torch.tensor([0, 1, 2, 0, 1, 2]),
        empty_index=3,
        weights=torch.rand(6, generator=draw) + 0.5,
        sample_ids=tuple(f"sample-{i}" for i in range(6)),
    )


# Of six samples; areas differ, as those of buckets do.
SIZES = [(8, 8), (4, 12), (8, 8), (12, 4), (4, 12), (8, 8)]


@pytest.fixture
def mixed(cached: CachedSet) -> CachedSet:
    """The same set with latents of three sizes."""
    draw = torch.Generator().manual_seed(9)
    return replace(cached, latents=tuple(torch.randn(4, h, w, generator=draw) for h, w in SIZES))


@dataclass
class Listener:
    """Progress that keeps what it is told, and can stop the run like a kill at a given step."""

    die_after: int | None = None
    warnings: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)
    done: int = 0

    def stage(self, name: str, index: int, total: int, note: str = "") -> None: ...

    @contextlib.contextmanager
    def task(self, label: str, total: int | None, unit: str) -> Iterator[Listener]:
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.done += n
        if self.die_after is not None and self.done >= self.die_after:
            raise Killed

    def info(self, message: str) -> None:
        self.infos.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Killed(BaseException):
    """Ends training without a chance to save, as SIGKILL does."""


@dataclass
class Trainer:
    """Trains in one run folder; the same call again continues."""

    root: Path
    model: SdxlModel
    cached: CachedSet
    seed: int = 11
    listener: Listener = field(default_factory=Listener)

    def __post_init__(self) -> None:
        self.unet = self.model.unet  # never trained itself

    def __call__(self, *, cached: CachedSet | None = None, stop_at: int | None = None, **settings: Any) -> TrainResult:
        # Not at the top: it brings Triton, which must not come before its interpreter is asked for.
        from craft_fast.train import train

        extra = {name: settings.pop(name) for name in ("samples", "memory_bytes") if name in settings}
        engine = EngineSettings(**settings.pop("engine", {}))
        options = {"method": "qlora", "rank": 4, "steps": 4, "micro_batch_size": 4, "learning_rate": 1e-3, **settings}
        step = iter(range(len(self.events("train_step")), 10**6))
        if self.model is not None:  # a fresh copy of the UNet, which is quicker than reading it from disk again
            self.model = copy.copy(self.model)
            self.model._parts = {**self.model._parts, "unet": copy.deepcopy(self.unet)}
            self.model.engine, self.model.resident = engine, engine.resident != "never"
        with open_run(self.root, create=True) as run:
            return train(
                run, self.model, cached or self.cached, settings=TrainSettings(**options), seed=self.seed, key=KEY,
                progress=self.listener, should_stop=lambda: next(step) >= (stop_at or 10**6), **extra,
            )  # fmt: skip

    def events(self, name: str) -> list[dict[str, Any]]:
        if not (self.root / "manifest.sqlite").exists():
            return []
        with open_run(self.root, read_only=True) as run:
            return [event for event in read_log(run) if event["event"] == name]


@pytest.fixture
def trainer(tmp_path: Path, load_model: Callable[..., SdxlModel], cached: CachedSet) -> Callable[..., Trainer]:
    def make(name: str = "run", *, dtype: str = "float32", prediction_type: str = "epsilon", **fields: Any) -> Trainer:
        return Trainer(tmp_path / name, load_model(dtype, prediction_type), cached, **fields)

    return make


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed


@pytest.fixture
def listener() -> type[Listener]:
    return Listener
