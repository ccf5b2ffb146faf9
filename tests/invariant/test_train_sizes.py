"""Samples of several sizes in one batch: how it is cut changes nothing, nor does a kill; what is done about memory.

That each sample counts as the equation says is in test_train_objective.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from craft_fast.cache import CachedSet

FORWARD = UNet2DConditionModel.forward
SETTINGS: dict[str, Any] = {"steps": 3, "micro_batch_size": 8, "learning_rate": 1e-4, "prompt_dropout": 0.3}


def assert_same(one: Any, other: Any) -> None:
    assert one.losses == other.losses
    assert all(torch.equal(value, other.adapter[name]) for name, value in one.adapter.items())


def forwards(monkeypatch: pytest.MonkeyPatch, *fail_at: int) -> list[tuple[int, ...]]:
    """The (B, h, w) of each forward of the UNet, as they come; those counted in ``fail_at``, from 1, lack memory."""
    seen: list[tuple[int, ...]] = []

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(sample), *sample.shape[2:]))
        if len(seen) in fail_at:
            raise torch.OutOfMemoryError("injected")
        return FORWARD(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return seen


def test_how_a_batch_is_cut_changes_rounding_alone(trainer: Any, mixed: CachedSet) -> None:
    whole = trainer("whole")(cached=mixed, **SETTINGS)
    cut = trainer("cut")(cached=mixed, **{**SETTINGS, "micro_batch_size": 2, "grad_accum_steps": 4})
    assert len(set(whole.losses)) == 3
    assert cut.losses == pytest.approx(whole.losses, abs=1e-5)


def test_equal_sizes_are_trained_as_one_tensor_is(trainer: Any, cached: CachedSet) -> None:
    same = dataclasses.replace(cached, latents=tuple(cached.latents))
    assert_same(trainer("rows")(cached=same, steps=3), trainer("tensor")(steps=3))


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_broken_run_ends_like_an_unbroken_one(
    trainer: Any, mixed: CachedSet, method: str, killed: Any, listener: Any
) -> None:
    options: dict[str, Any] = {"cached": mixed, "steps": 4, "method": method, "checkpoint_every": 2}
    expected = trainer("whole")(**options)
    broken = trainer("broken", listener=listener(die_after=3))
    with pytest.raises(killed):
        broken(**options)
    assert [path.name for path in (broken.root / "checkpoints").iterdir()] == ["step-000002"]
    broken.listener = listener()
    assert_same(broken(**options), expected)
    assert broken.listener.infos == ["Training continues after step 2."]


def test_a_sample_that_is_not_finite_is_named(trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_fast.qlora.inputs import Inputs

    select = Inputs.select

    def spoil(self: Any, batch: Any) -> Any:
        found = select(self, batch)
        found.latents[batch.rows == 4] = float("nan")
        return found

    monkeypatch.setattr(Inputs, "select", spoil)
    run = trainer()
    assert run(cached=mixed, steps=1, micro_batch_size=6).losses == [None]
    assert [event["samples"] for event in run.events("train_skipped")] == [["sample-4"]]


# ---- memory


def test_the_largest_size_decides_what_is_recomputed(
    trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_fast.qlora import engine

    choose, asked = engine.choose_kept, []

    def listen(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["height_px"], kwargs["width_px"]))
        return choose(*args, **kwargs)

    monkeypatch.setattr(engine, "choose_kept", listen)
    small_first = dataclasses.replace(mixed, latents=tuple(reversed(mixed.latents[1:])) + mixed.latents[:1])
    run = trainer()
    run(cached=small_first, steps=1, memory_bytes=1e9)
    assert asked == [(8 * run.model.vae_scale_factor,) * 2]


def test_out_of_memory_halves_what_was_tried(trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight samples no more than a few are of one size: half of eight would be no less."""
    settings = {**SETTINGS, "cached": mixed, "gradient_checkpointing": "all"}
    seen = forwards(monkeypatch)
    expected = trainer("whole")(**settings)
    longest = max(size for size, *_ in seen[:3])
    assert sum(size for size, *_ in seen[:3]) == 8
    forwards(monkeypatch, 2)
    result = trainer("short")(**settings)
    assert result.micro_batch_size == (longest + 1) // 2 < 4
    assert result.losses == pytest.approx(expected.losses, abs=1e-5)


def test_a_dry_run_has_the_largest_part_behind_another(
    trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights change in backward nothing is tried that was not tried before, with gradients held beside it."""
    from craft_fast.qlora.step import Stepper

    gradients, fits = Stepper.gradients, 0
    dry_runs: list[int] = []

    def listen(self: Any, parts: Any, **kwargs: Any) -> Any:
        nonlocal fits
        elements = [part.latents.numel() for part in parts]
        if self.optimizer._dry:
            assert elements == [max(elements)] * 2
            fits = max(elements)
            dry_runs.append(fits)
        assert max(elements) <= fits
        return gradients(self, parts, **kwargs)

    monkeypatch.setattr(Stepper, "gradients", listen)
    result = trainer()(cached=mixed, method="full", steps=8, micro_batch_size=3)
    assert len(set(result.losses)) == 8
    assert dry_runs == sorted(set(dry_runs))


def test_graphs_go_first(trainer: Any, mixed: CachedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to be recording, which it can not be here: what is not recorded needs memory beside what is."""
    from craft_fast.qlora.step import Stepper

    expected = trainer("whole")(cached=mixed, **SETTINGS)
    made = Stepper.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.record = True

    monkeypatch.setattr(Stepper, "__init__", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    forwards(monkeypatch, 1)
    run = trainer("short")
    assert_same(run(cached=mixed, **SETTINGS), expected)
    (event,) = run.events("train_out_of_memory")
    assert (event["change"], event["micro_batch_size"]) == ("steps run without a CUDA graph", 8)


def test_blocks_are_not_compiled(trainer: Any, mixed: CachedSet) -> None:
    run = trainer("asked")
    asked = run(cached=mixed, **SETTINGS, engine={"compile": True})
    assert_same(asked, trainer("plain")(cached=mixed, **SETTINGS))
    (warning,) = run.listener.warnings
    assert "several sizes" in warning
