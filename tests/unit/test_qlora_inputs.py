"""What a step takes from the training set, by size, and what is refused before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.losses import draw_batch
from craft_fast.qlora import inputs as inputs_module
from craft_fast.qlora.inputs import Inputs, MicroBatch, refuse_non_finite
from tests.unit.training_sets import CPU, IDS, batch, dataset, inputs


def check_selection(found: MicroBatch, wanted: Any) -> None:
    data = dataset()
    text = [3 if off else int(data["prompt_index"][row]) for row, off in zip(wanted.rows, wanted.dropped, strict=True)]
    assert torch.equal(found.latents, data["latents"][wanted.rows])
    assert torch.equal(found.prompt_embeds, data["prompt_embeds"][text])
    assert torch.equal(found.pooled_prompt_embeds, data["pooled_prompt_embeds"][text])
    assert torch.equal(found.timesteps, wanted.timesteps)
    assert torch.equal(found.noise_ids, wanted.noise_ids)
    assert torch.equal(found.weights, data["weights"][wanted.rows])


def test_what_is_selected() -> None:
    wanted = batch(step=3)
    assert bool(wanted.dropped.any())
    assert not bool(wanted.dropped.all())
    found = inputs().select(wanted)
    assert len(found) == 5
    check_selection(found, wanted)


def test_a_large_set_stays_in_the_machine_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Inputs):
        """Says that it is on another device, and sends by a plain copy: no pinned memory without a GPU."""

        def _send(self, tensor: Tensor) -> Tensor:
            sent.append(tuple(tensor.shape))
            return tensor.clone()

    sent: list[tuple[int, ...]] = []
    monkeypatch.setattr(inputs_module, "ON_DEVICE_BYTES", 10)
    far = Elsewhere(**dataset(), dtype=torch.float32, device=torch.device("meta"))
    assert far.home == CPU
    wanted = batch(step=2)
    check_selection(far.select(wanted), wanted)
    assert len(sent) == 5


def test_texts_are_kept_in_the_unet_s_dtype_and_latents_are_not() -> None:
    found = inputs(torch.bfloat16).select(batch())
    assert found.latents.dtype == found.weights.dtype == torch.float32
    assert found.prompt_embeds.dtype == found.pooled_prompt_embeds.dtype == torch.bfloat16


def test_parts_are_views_in_order() -> None:
    whole = inputs().select(batch())
    parts = whole.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in vars(whole):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert getattr(parts[0], name).data_ptr() == getattr(whole, name).data_ptr()


# ---- samples of several sizes


SIDES = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])


@settings(max_examples=60, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=9), st.integers(1, 20), st.integers(1, 5), st.integers(0, 30))
def test_a_batch_is_cut_into_parts_of_one_size_each(sides: list[Any], size: int, most: int, step: int) -> None:
    """No sample is lost or doubled and none changes its draws, also one that comes twice at the seam of two epochs."""
    n = len(sides)
    several = Inputs(
        latents=tuple(torch.full((4, *side), float(i)) for i, side in enumerate(sides)),
        prompt_embeds=torch.arange(n + 1.0).view(-1, 1, 1), pooled_prompt_embeds=torch.arange(n + 1.0).view(-1, 1),
        prompt_index=torch.arange(n), empty_index=n, weights=torch.arange(float(n)), dtype=torch.float32, device=CPU,
    )  # fmt: skip
    ids = [f"s{i}" for i in range(n)]
    wanted = draw_batch(ids, seed=1, step=step, timesteps=100, batch_size=size, prompt_dropout=0.4)
    parts = several.by_size(wanted)
    cut = [piece for part in parts for piece in several.select(part).split(most)]
    assert max(len(piece) for piece in cut) <= most
    found = []
    for piece in cut:
        rows = piece.weights.long().tolist()
        assert {sides[row] for row in rows} == {tuple(piece.latents.shape[2:])}
        assert piece.latents.amax((1, 2, 3)).tolist() == piece.latents.amin((1, 2, 3)).tolist() == rows
        assert torch.equal(piece.prompt_embeds.flatten(), piece.pooled_prompt_embeds.flatten())
        found += zip(
            rows, piece.timesteps.tolist(), piece.noise_ids.tolist(), piece.prompt_embeds.flatten().tolist(),
            strict=True,
        )  # fmt: skip
    texts = torch.where(wanted.dropped, n, wanted.rows).double().tolist()
    drawn = zip(wanted.rows.tolist(), wanted.timesteps.tolist(), wanted.noise_ids.tolist(), texts, strict=True)
    assert sorted(found) == sorted(drawn)
    # By the order in which sizes come in the batch, samples of a size in theirs.
    in_order = [row for side in dict.fromkeys(sides[row] for row in wanted.rows) for row in wanted.rows.tolist()
                if sides[row] == side]  # fmt: skip
    assert torch.cat([part.rows for part in parts]).tolist() == in_order


def test_one_size_is_one_batch_and_one_tensor() -> None:
    wanted = batch()
    for latents in (dataset()["latents"], tuple(dataset()["latents"])):
        found = Inputs(**{**dataset(), "latents": latents}, dtype=torch.float32, device=CPU)
        (whole,) = found.by_size(wanted)
        assert whole is wanted
        check_selection(found.select(wanted), wanted)
    data = dataset()
    kept = Inputs(**data, dtype=torch.float32, device=CPU).latents
    assert [one.data_ptr() for one in kept] == [data["latents"].data_ptr()]  # no copy of it


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("where", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
def test_a_value_that_is_not_finite_is_refused_by_name(where: str, mixed: bool) -> None:
    data = dataset(mixed=mixed)
    data[where][2].view(-1)[1] = float("nan")
    given_values = [data[name] for name in ("latents", "prompt_embeds", "pooled_prompt_embeds")]
    named = "sample-2" if where == "latents" else "text rows [2]"
    with pytest.raises(IntegrityError, match="NaN or infinite") as caught:
        refuse_non_finite(*given_values, IDS)
    assert named in caught.value.where
