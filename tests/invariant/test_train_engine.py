"""Every switch of the engine gives the same training: bit for bit where it must, else as near as its rounding allows.

The reference is what a CPU does by default: PEFT's layers, bitsandbytes' optimizer, nothing recomputed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from craft_fast.config import TrainSettings

STEPS = 4
# B of ff.net.0.proj has moments in 8 bits, the other tensors in 32.
COMMON: dict[str, Any] = {
    "steps": STEPS, "rank": 16, "target_modules": ["to_q", "ff.net.0.proj"], "micro_batch_size": 4,
    "grad_accum_steps": 2, "learning_rate": 1e-3, "min_snr_gamma": 5.0,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "qlora, convs": {"method": "qlora", "nf4_convs": True},
}
ENGINES = list(itertools.product(("peft", "fused"), ("bitsandbytes", "flat")))

Train = Callable[..., Any]


@pytest.fixture
def train(trainer: Any) -> Train:
    numbers = itertools.count()

    def run(*, dtype: str = "float32", **settings: Any) -> Any:
        return trainer(f"{next(numbers)}", dtype=dtype)(**{**COMMON, **settings})

    return run


def assert_same(one: Any, other: Any) -> None:
    assert one.losses == other.losses
    assert all(torch.equal(value, other.adapter[name]) for name, value in one.adapter.items())


@pytest.mark.parametrize("method", METHODS)
def test_adapter_layer_and_optimizer(train: Train, method: str) -> None:
    results = {
        (lora, optimizer): train(**METHODS[method], engine={"lora": lora, "optimizer": optimizer})
        for lora, optimizer in ENGINES
    }
    reference = results["peft", "bitsandbytes"]
    assert len(set(reference.losses)) == STEPS
    for engine, result in results.items():
        assert result.losses == pytest.approx(reference.losses, rel=2e-5), engine
        assert result.adapter.keys() == reference.adapter.keys()
        for name, value in result.adapter.items():
            if name.endswith("lora_B.weight"):
                agreement = torch.cosine_similarity(value.flatten(), reference.adapter[name].flatten(), 0)
                assert agreement > 0.99, (engine, name)


@pytest.mark.parametrize("method", [*METHODS, "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_recomputation_changes_no_bit(train: Train, method: str, engine: tuple[str, str]) -> None:
    if method == "full" and engine[0] == "fused":
        pytest.skip("a full training has no adapter")
    settings = {**METHODS.get(method, {"method": method}), "engine": {"lora": engine[0], "optimizer": engine[1]}}
    settings["steps"] = 2
    plain = train(**settings, gradient_checkpointing="none")
    assert_same(train(**settings, gradient_checkpointing="all"), plain)


def test_memory_decides_what_is_recomputed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of some units keeps these, none at all keeps none that costs memory, and all give the same bits."""
    from craft_fast.qlora import engine

    chosen: list[int] = []
    recompute = engine.recompute

    def listen(unet: Any, kept: Any) -> None:
        chosen.append(len(kept))
        recompute(unet, kept)

    monkeypatch.setattr(engine, "recompute", listen)
    units = {name: train(steps=2, memory_bytes=budget) for name, budget in (("all", 1e12), ("none", 1.0))}
    unknown = train(steps=2)
    assert chosen[0] == chosen[2] > chosen[1]
    assert_same(units["none"], units["all"])
    assert_same(unknown, units["all"])


@pytest.mark.parametrize("lora", ["peft", "fused"])
def test_static_buffers_change_no_bit(train: Train, monkeypatch: pytest.MonkeyPatch, lora: str) -> None:
    """The way that a recorded step takes, against plain calls with the tensors as they come."""
    from craft_fast.sdxl.graph import Replay

    engine = {"lora": lora, "optimizer": "flat"}
    buffered = train(engine=engine)
    calls: list[int] = []

    def direct(self: Any, **tensors: torch.Tensor) -> Any:
        calls.append(len(tensors))
        return self.fn(**tensors)

    monkeypatch.setattr(Replay, "__call__", direct)
    assert_same(train(engine=engine), buffered)
    assert len(calls) == 3 * STEPS  # two micro-batches and one update in each step


def test_a_graph_is_asked_for_in_vain_on_a_cpu(train: Train) -> None:
    assert_same(train(engine={"graph": False}), train(engine={"graph": True}))


@pytest.mark.parametrize("lora", ["peft", "fused"])
def test_attention_is_torch_s_own_by_either_name(train: Train, lora: str) -> None:
    assert_same(train(engine={"lora": lora, "attention": "sdpa"}), train(engine={"lora": lora}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("engine", [{}, {"lora": "fused"}, {"lora": "fused", "autocast": True}])
def test_half_precision_with_and_without_autocast(train: Train, dtype: str, engine: dict[str, Any]) -> None:
    """PEFT's layers need autocast, ours do not; both stay near float32."""
    reference = train(method="lora")
    result = train(dtype=dtype, method="lora", engine=engine)
    assert {value.dtype for value in result.adapter.values()} == {torch.float32}
    assert result.losses == pytest.approx(reference.losses, rel=0.02)
    moved = [name for name in result.adapter if name.endswith("lora_B.weight")]
    agree = [torch.cosine_similarity(result.adapter[n].flatten(), reference.adapter[n].flatten(), 0) for n in moved]
    assert min(agree) > 0.8


# What dynamo itself does to tensors that it looks at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_compiled_blocks(train: Train) -> None:
    pytest.importorskip("triton")
    engine = {"lora": "fused", "optimizer": "flat"}
    plain = train(engine=engine, gradient_checkpointing="all")
    compiled = train(engine={**engine, "compile": True}, gradient_checkpointing="all")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("kind", ["flat", "bitsandbytes", "auto"])
def test_every_weight_by_every_optimizer(train: Train, kind: str) -> None:
    """``fused_backward`` clips each tensor by itself, so a clip that never acts is compared."""
    settings = {"method": "full", "max_grad_norm": 1e6, "learning_rate": 1e-4}
    reference = train(**settings, engine={"optimizer": "bitsandbytes"})
    assert train(**settings, engine={"optimizer": kind}).losses == pytest.approx(reference.losses, rel=2e-4)


def test_what_is_not_decided_is_refused(train: Train) -> None:
    assert TrainSettings(method="auto").method == "auto"
    with pytest.raises(ValueError, match="must be decided"):
        train(method="auto")


def test_parts_that_do_not_stay_on_the_device(trainer: Any) -> None:
    """The UNet is read from its files, trained, and gone from the model afterwards; the same bits come out."""
    expected = trainer("resident")(**COMMON)
    run = trainer("phases")
    result = run(**COMMON, engine={"resident": "never"})
    assert_same(result, expected)
    assert run.model.loaded == ()


def test_samples_prepare_before_the_unet_comes(trainer: Any) -> None:
    run = trainer()
    events: list[str] = []

    class Drawer:
        def prepare(self) -> None:
            run.model.use("text_encoder")
            events.append("prepare")

        def __call__(self, step: int, unet: Any) -> None:
            run.model.use("vae")
            assert run.model.loaded == ("vae",)
            assert any(p.requires_grad for p in unet.parameters())
            events.append(f"draw {step}")

    expected = trainer("undisturbed")(**COMMON)
    result = run(**COMMON, sample_every=2, samples=Drawer(), engine={"resident": "never"})
    assert events == ["prepare", "draw 2", "draw 4"]
    assert_same(result, expected)
