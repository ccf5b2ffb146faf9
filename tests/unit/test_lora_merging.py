"""Several LoRAs as one: the sum of what they add, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from craft_fast.errors import IntegrityError, UsageError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.merging import layer_shape, merge_adapters, merge_reduced
from tests.unit.small_adapters import layer

CONV = (8, 6, 3, 3)


def some(seed: int, *, rank: int, alpha: float | None, dtype: torch.dtype = torch.float32) -> Adapter:
    return Adapter(
        {"unet.a": layer((20, 16), rank, seed, alpha=alpha, dtype=dtype),
         "unet.conv": layer(CONV, rank + 1, seed + 2, alpha=alpha, dtype=dtype),
         f"unet.only{seed}": layer((12, 12), 2, seed + 4, alpha=alpha, dtype=dtype)},
        {"from": str(seed)},
    )  # fmt: skip


def total(parts: list[tuple[Adapter, float]], name: str) -> Tensor:
    """The weighted sum in float64."""
    terms = [
        (one.up.double().flatten(1) @ one.down.double().flatten(1)).view(one.up.shape[0], *one.down.shape[1:])
        * (one.scale * weight)
        for adapter, weight in parts
        for one in filter(None, [adapter.layers.get(name)])
    ]
    return torch.stack(terms).sum(0)


def exact(one: LoraLayer) -> Tensor:
    return total([(Adapter({"x": one}), 1.0)], "x")


def test_the_sum_is_exact_whatever_ranks_alphas_signs_and_layers() -> None:
    parts = [
        (some(1, rank=4, alpha=2.0), 0.7),
        (some(10, rank=7, alpha=None), -1.3),
        (some(20, rank=1, alpha=9.0), 0.01),
    ]
    merged = merge_adapters(parts)
    assert list(merged.layers) == ["unet.a", "unet.conv", "unet.only1", "unet.only10", "unet.only20"]
    assert [one.rank for one in merged.layers.values()] == [12, 15, 2, 2, 2]
    assert merged.metadata == {"from": "1"}
    for name, one in merged.layers.items():
        assert (one.scale, one.alpha) == (1.0, float(one.rank))
        want = total(parts, name)
        # One rounding of each up to float32, relative 2^-24, against terms of about the sum's size.
        assert float((exact(one) - want).norm() / want.norm()) < 2**-23
    assert merged.layers["unet.conv"].down.shape == (15, 6, 3, 3)
    assert merged.layers["unet.conv"].up.shape == (8, 15, 1, 1)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rounding_is_once_and_down_keeps_its_bits(dtype: torch.dtype, unit: float) -> None:
    first, second = some(1, rank=4, alpha=3.0, dtype=dtype), some(10, rank=5, alpha=1.0, dtype=torch.float32)
    merged = merge_adapters([(first, 0.9), (second, 0.3)]).layers["unet.a"]
    a, b = first.layers["unet.a"], second.layers["unet.a"]
    assert {merged.up.dtype, merged.down.dtype} == {dtype}
    assert torch.equal(merged.down[:4], a.down)
    want = torch.cat([a.up.float() * (0.9 * 0.75), b.up * (0.3 * 0.2)], dim=1)
    assert bool(((merged.up.float() - want).abs() <= unit * want.abs() + 2**-24).all())
    assert merge_adapters([(first, 1.0)], dtype=torch.float32).layers["unet.a"].up.dtype is torch.float32


def test_one_lora_with_weight_1_is_what_it_was() -> None:
    one = some(1, rank=4, alpha=4.0, dtype=torch.float16)
    merged = merge_adapters([(one, 1.0)])
    assert torch.equal(merged.layers["unet.a"].up, one.layers["unet.a"].up)
    assert torch.equal(merged.layers["unet.a"].down, one.layers["unet.a"].down)


def test_a_reduced_sum_is_the_best_of_its_rank_and_says_how_far_it_is() -> None:
    parts = [(some(1, rank=6, alpha=6.0), 1.0), (some(10, rank=6, alpha=6.0), 0.5)]
    reduced, report = merge_reduced(parts, 5)
    for name in ("unet.a", "unet.conv"):
        want = total(parts, name).flatten(1)
        values = torch.linalg.svdvals(want)
        best = float(values[5:].norm() / values.norm())
        found = exact(reduced.layers[name]).flatten(1)
        assert float((found - want).norm() / want.norm()) == pytest.approx(best, rel=1e-5)
        assert report.layers[name].error == pytest.approx(best, rel=1e-5)
        assert (reduced.layers[name].rank, report.layers[name].rank_before) == (5, 12 if name == "unet.a" else 14)
    # A layer that is not cut is as it is without a rank.
    assert torch.equal(reduced.layers["unet.only1"].up, merge_adapters(parts).layers["unet.only1"].up)
    assert torch.equal(merge_adapters(parts, rank=5).layers["unet.a"].up, reduced.layers["unet.a"].up)


def test_a_reduced_sum_is_rounded_once() -> None:
    """As one matrix the first up would leave float16's range; shared by both factors its size has room."""
    huge = Adapter({"unet.a": layer((20, 16), 4, alpha=4e6, dtype=torch.float16)})
    reduced, report = merge_reduced([(huge, 1.0), (huge, 0.5)], 4)
    want = total([(huge, 1.5)], "unet.a")
    assert float((exact(reduced.layers["unet.a"]) - want).norm() / want.norm()) < 2**-10
    assert 0 < report.error < 2**-10


def test_an_alpha_that_bfloat16_holds() -> None:
    one = Adapter({"unet.a": layer((20, 16), 301, alpha=301.0, dtype=torch.bfloat16)})
    merged = merge_adapters([(one, 1.0)]).layers["unet.a"]
    assert (merged.rank, merged.alpha) == (301, 300.0)
    want = total([(one, 1.0)], "unet.a")
    assert float((exact(merged) - want).norm() / want.norm()) < 2**-8


def test_weight_0_leaves_a_lora_out() -> None:
    one, two = some(1, rank=4, alpha=4.0), some(10, rank=4, alpha=4.0)
    merged = merge_adapters([(one, 1.0), (two, 0.0)])
    assert merged.layers.keys() == one.layers.keys()
    assert merged.layers["unet.a"].rank == 4
    with pytest.raises(UsageError, match="All weights are 0"):
        merge_adapters([(one, 0.0)])


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e5])
def test_weights_are_plain_numbers(weight: float) -> None:
    with pytest.raises(UsageError, match="plain number"):
        merge_adapters([(some(1, rank=4, alpha=4.0), weight)])


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_adapters([])
    with pytest.raises(IntegrityError, match="without layers"):
        merge_adapters([(Adapter({}), 1.0)])
    other = Adapter({"unet.a": layer((20, 24), 4)})
    with pytest.raises(IntegrityError, match=r"unet\.a(.|\n)*\[20, 16\](.|\n)*\[20, 24\]"):
        merge_adapters([(some(1, rank=4, alpha=4.0), 1.0), (other, 1.0)])
    huge = Adapter({"unet.a": layer((20, 16), 4, alpha=4e6, dtype=torch.float16)})
    with pytest.raises(IntegrityError, match="too large for its number format"):
        merge_adapters([(huge, 1.0)])


def test_a_1x1_convolution_is_the_matrix_it_is() -> None:
    """kohya's files of some tools hold proj_in so, of others as a matrix."""
    matrix, conv = layer((6, 5), 2, 1), layer((6, 5, 1, 1), 3, 2)
    assert layer_shape(matrix) == layer_shape(conv) == (6, 5)
    merged = merge_adapters([(Adapter({"unet.p": matrix}), 1.0), (Adapter({"unet.p": conv}), 1.0)]).layers["unet.p"]
    want = matrix.delta() + conv.delta()[:, :, 0, 0]
    assert (merged.delta() - want).abs().max() < 1e-6
