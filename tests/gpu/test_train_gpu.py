"""Training on a GPU: near the CPU's losses with every switch of the engine, bit-identical where it must be, recorded or
not, on resume, beside sample images; and a real shortage of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.cache import CachedSet
from craft_fast.config import EngineSettings, TrainSettings
from craft_fast.guards import StepWatch
from craft_fast.progress import Silent
from craft_fast.sdxl.graph import Replay
from craft_fast.sdxl.load import free_memory, load_sdxl
from craft_fast.store.run import open_run, read_log
from craft_fast.tiny.random_model import build_random_sdxl
from craft_fast.train import TrainResult, train

pytestmark = pytest.mark.gpu

Train = Callable[..., TrainResult]
# Long enough for a warm-up, a recording and many replays.
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def training_set(side: int = 16, *, mixed: bool = False) -> CachedSet:
    draw = torch.Generator().manual_seed(3)
    latents: Any = torch.randn(6, 4, side, side, generator=draw)
    if mixed:
        sizes = [(side, side), (side // 2, side * 3 // 2)] * 3
        latents = tuple(torch.randn(4, h, w, generator=draw) for h, w in sizes)
    return CachedSet(
        latents=latents,
        prompt_embeds=torch.randn(4, 32, 64, generator=draw),
        pooled_prompt_embeds=torch.randn(4, 32, generator=draw),
        prompt_index=torch.tensor([0, 1, 2, 0, 1, 2]),
        empty_index=3,
        weights=torch.rand(6, generator=draw) + 0.5,
        sample_ids=tuple(f"sample-{i}" for i in range(6)),
    )


@dataclass
class Listener(Silent):
    """Keeps what it is warned of."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def trained(folder: Path, tmp_path: Path, listener: Listener) -> Train:
    def run_training(
        name: str,
        *,
        device: str = "cuda",
        dtype: str = "bfloat16",
        stop_at: int = 10**6,
        side: int = 16,
        mixed: bool = False,
        engine: dict[str, Any] | None = None,
        samples: Any = None,
        memory_bytes: float | None = None,
        **options: Any,
    ) -> TrainResult:
        model = load_sdxl(folder, device=device, dtype=dtype, engine=EngineSettings(**(engine or {})))
        settings = {
            "rank": 16,
            "target_modules": ["to_q", "ff.net.0.proj"],
            "steps": 6,
            "micro_batch_size": 4,
            **options,
        }
        asked = iter(range(10**6))
        with open_run(tmp_path / name, create=True) as run:
            return train(
                run, model, training_set(side, mixed=mixed), settings=TrainSettings(**settings), seed=11, key="5" * 64,
                should_stop=lambda: next(asked) >= stop_at, progress=listener, samples=samples,
                memory_bytes=memory_bytes,
            )  # fmt: skip

    return run_training


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Replay[Any]]:
    """Every Replay that recorded, as they come."""
    found: list[Replay[Any]] = []
    capture = Replay._capture

    def listen(self: Replay[Any], device: torch.device) -> None:
        capture(self, device)
        found.append(self)

    monkeypatch.setattr(Replay, "_capture", listen)
    return found


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert one.losses == other.losses
    assert all(torch.equal(value, other.adapter[name]) for name, value in one.adapter.items())


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_losses_are_near_those_of_the_cpu(trained: Train, method: str, dtype: str, tolerance: float) -> None:
    if method == "full" and dtype == "float16":
        pytest.skip("whole float16 weights underflow in AdamW; bfloat16 is for that")
    expected = trained("cpu", device="cpu", dtype="float32", method=method)
    found = trained("gpu", dtype=dtype, method=method)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert all(bool(value.isfinite().all()) for value in found.adapter.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernels_train_like_plain_torch(trained: Train, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    results = []
    for form in ("torch", "triton"):
        monkeypatch.setenv("CRAFT_KERNELS_IMPL", form)
        results.append(trained(form, dtype=dtype))
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5 if dtype == "float32" else 5e-3)


# ---- the engine


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("engine", [{}, {"lora": "peft"}, {"optimizer": "bitsandbytes"}, {"autocast": True}], ids=str)
def test_a_recorded_step_gives_the_same_bits(
    trained: Train, recordings: list[Any], listener: Listener, method: str, engine: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"method": method, "steps": STEPS, "micro_batch_size": 3, "grad_accum_steps": 2}
    plain = trained("plain", engine={**engine, "graph": False}, **settings)
    assert recordings == []
    recorded = trained("recorded", engine=engine, **settings)
    # One for the micro-batches, all of one shape, and one for the update where the optimizer can be recorded.
    assert len(recordings) == (1 if engine.get("optimizer") == "bitsandbytes" else 2)
    assert not any(replay.fallback for replay in recordings)
    assert listener.warnings == []
    assert len(set(plain.losses)) == STEPS
    assert_same(recorded, plain)


@pytest.mark.parametrize("limit", [8, 1])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_steps_of_several_shapes_give_the_same_bits(
    trained: Train, recordings: list[Any], listener: Listener, monkeypatch: pytest.MonkeyPatch, method: str, limit: int
) -> None:
    """Two sizes in batches of six, cut by three: some shapes are recorded, what is beyond the limit runs as it is."""
    from craft_fast.qlora import step as step_module

    monkeypatch.setattr(step_module, "MAX_RECORDED", limit)
    settings: dict[str, Any] = {"method": method, "steps": STEPS, "micro_batch_size": 3, "grad_accum_steps": 2}
    plain = trained("plain", mixed=True, engine={"graph": False}, **settings)
    assert recordings == []
    recorded = trained("recorded", mixed=True, **settings)
    # Whole epochs have three samples of each size, so two shapes; and the update.
    assert len(recordings) == (3 if limit == 8 else 2)
    assert not any(replay.fallback for replay in recordings)
    assert listener.warnings == []
    assert len(set(plain.losses)) == STEPS
    assert_same(recorded, plain)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_losses_of_several_sizes_are_near_those_of_the_cpu(trained: Train, method: str) -> None:
    expected = trained("cpu", mixed=True, device="cpu", dtype="float32", method=method)
    found = trained("gpu", mixed=True, dtype="float32", method=method)
    assert found.losses == pytest.approx(expected.losses, rel=2e-3)
    again = trained("stopped", mixed=True, dtype="float32", method=method, stop_at=4)
    assert not again.finished
    assert_same(trained("stopped", mixed=True, dtype="float32", method=method), found)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_recomputation_changes_no_bit(trained: Train, graph: bool, checkpointing: str) -> None:
    reference = trained("reference", engine={"graph": False}, gradient_checkpointing="none")
    assert_same(trained("found", engine={"graph": graph}, gradient_checkpointing=checkpointing), reference)


@pytest.mark.parametrize(
    "engine",
    [{"lora": "peft"}, {"optimizer": "bitsandbytes"}, {"autocast": True}, {"compile": True}, {"attention": "sdpa"},
     {"compile": True, "graph": False}, {"resident": "never"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_every_switch_trains_alike(trained: Train, method: str, engine: dict[str, Any]) -> None:
    reference = trained("reference", method=method, steps=STEPS)
    found = trained("found", method=method, steps=STEPS, engine=engine)
    assert found.losses == pytest.approx(reference.losses, rel=2e-2)
    exact = engine.keys() <= {"attention", "resident"}
    if exact:
        assert_same(found, reference)


def test_convolutions_in_nf4(trained: Train) -> None:
    expected = trained("cpu", device="cpu", dtype="float32", nf4_convs=True)
    assert trained("gpu", nf4_convs=True).losses == pytest.approx(expected.losses, rel=5e-2)


def test_a_step_that_cannot_be_recorded_goes_on_without(
    trained: Train, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    from craft_fast.qlora.step import Stepper

    expected = trained("expected", engine={"graph": False})
    whole = Stepper._forward_backward

    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, errors = whole(self, *args, **kwargs)
        loss.item()
        return loss, errors

    monkeypatch.setattr(Stepper, "_forward_backward", waits)
    assert_same(trained("found"), expected)
    assert sum("CUDA graph" in line for line in listener.warnings) == 1


def test_values_that_are_not_finite_are_refused_by_a_recorded_step(
    trained: Train, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    from craft_fast.qlora.inputs import Inputs

    select = Inputs.select

    def spoil(self: Any, batch: Any) -> Any:
        found = select(self, batch)
        if batch.step == 8:
            found.weights[1] = float("nan")
        return found

    monkeypatch.setattr(Inputs, "select", spoil)
    result = trained("run", steps=STEPS)
    assert [i for i, loss in enumerate(result.losses) if loss is None] == [8]
    assert all(bool(value.isfinite().all()) for value in result.adapter.values())
    assert any("Step 9" in line and "nothing was updated" in line for line in listener.warnings)


def test_steps_are_watched_from_the_first_settled_one(
    trained: Train, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    seen: list[float] = []

    def observe(self: StepWatch, seconds: float) -> str | None:
        seen.append(seconds)
        return "so slow" if len(seen) == 4 else None

    monkeypatch.setattr(StepWatch, "observe", observe)
    trained("run", steps=STEPS)
    assert len(seen) == STEPS - 4  # the first makes buffers, two warm up and one records, at most
    assert all(0 < seconds < 60 for seconds in seen)
    assert listener.warnings == ["so slow"]


# ---- resume, samples


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("stop_at", [2, 4, 11])
def test_stopped_run_ends_like_an_unbroken_one(trained: Train, method: str, stop_at: int) -> None:
    """Stopped while it warms up, right after the recording, and in the middle of replays."""
    expected = trained("whole", method=method, steps=STEPS)
    assert not trained("stopped", method=method, stop_at=stop_at, steps=STEPS).finished
    assert_same(trained("stopped", method=method, steps=STEPS), expected)


def test_sampling_does_not_disturb_a_recorded_step(trained: Train, recordings: list[Any]) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def samples(step: int, unet: Any) -> None:
        seen.append((step, torch.is_grad_enabled(), unet.training))
        text = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
        given = {name: value.to("cuda", torch.bfloat16) for name, value in text.items()}
        latents, states = torch.randn(1, 4, 16, 16), torch.zeros(1, 32, 64)
        noise_pred = unet(
            latents.to("cuda", torch.bfloat16), 5, states.to("cuda", torch.bfloat16), added_cond_kwargs=given
        )
        assert bool(noise_pred.sample.isfinite().all())

    quiet = trained("quiet", steps=STEPS)
    count = len(recordings)
    drawn = trained("drawn", steps=STEPS, sample_every=5, samples=samples)
    assert seen == [(5, False, False), (10, False, False), (15, False, False), (20, False, False)]
    assert len(recordings) == 2 * count  # nothing was recorded anew for them
    assert_same(drawn, quiet)


def test_graphs_make_room_for_samples(trained: Train, listener: Listener) -> None:
    """Memory that runs out while drawing is given by the graphs, once; then training goes on as it would have."""
    calls: list[int] = []

    def samples(step: int, unet: Any) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")

    quiet = trained("quiet", steps=STEPS)
    drawn = trained("drawn", steps=STEPS, sample_every=10, samples=samples)
    assert calls == [10, 10, 20]
    assert not any("sample images" in line for line in listener.warnings)
    assert_same(drawn, quiet)


# ---- memory


def test_gradient_checkpointing_needs_less_memory(trained: Train) -> None:
    peaks = []
    for choice in ("none", "all"):
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        trained(f"checkpointing-{choice}", steps=2, side=64, micro_batch_size=16, gradient_checkpointing=choice)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]


def test_memory_is_returned(trained: Train) -> None:
    """Nothing of a training stays on the device: a second one needs no more than the first."""
    after = []
    for name in ("one", "two", "three"):
        trained(name, side=64, micro_batch_size=16, steps=STEPS)
        free_memory()
        after.append(torch.cuda.memory_reserved())
    assert after[2] <= after[0] + 2**21
    assert after[0] < 200 * 2**20  # libraries' workspaces


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_a_real_shortage_of_memory(
    trained: Train, tmp_path: Path, graph: bool, checkpointing: str, mixed: bool
) -> None:
    """Less than the whole batch needs: the same losses come out, recomputed or in smaller pieces."""
    settings: dict[str, Any] = {"steps": 5, "side": 64, "micro_batch_size": 32, "dtype": "float32", "mixed": mixed}
    settings |= {"engine": {"graph": graph}, "gradient_checkpointing": checkpointing}
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    expected = trained("roomy", **settings)
    # Not what was reserved: a recording and the steps before it reserve one after the other.
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    free_memory()
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
        found = trained("narrow", **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()
    with open_run(tmp_path / "narrow", read_only=True) as run:
        events = [event for event in read_log(run) if event["event"] == "train_out_of_memory"]
    assert events
    assert found.finished
    if checkpointing == "all":
        assert found.micro_batch_size < 32
    if found.micro_batch_size == 32:
        assert_same(found, expected)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)


def test_a_budget_decides_what_is_recomputed(trained: Train) -> None:
    peaks, results = [], []
    for name, budget in (("wide", 1e12), ("narrow", 1.0)):
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        results.append(trained(name, side=64, micro_batch_size=16, memory_bytes=budget))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]
    assert_same(*results)
