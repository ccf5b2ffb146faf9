"""A LoRA of a lower rank: the closest there is, untouched where nothing is cut, and an error that is true."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from craft_fast.errors import IntegrityError, UsageError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.reading import ALPHA_DTYPES
from craft_fast.lora.resizing import ResizeReport, distance, resize_adapter
from tests.unit.small_adapters import layer

SHAPES = [(20, 16), (8, 6, 3, 3), (6, 5, 1, 1), (64, 3)]


def of(shape: tuple[int, ...], rank: int, **options: object) -> Adapter:
    return Adapter({"unet.a": layer(shape, rank, 3, **options)}, {"kept": "yes"})  # type: ignore[arg-type]


def relative(after: LoraLayer, before: LoraLayer) -> float:
    return float((after.delta() - before.delta()).norm() / before.delta().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [None, 3.0, -2.0])
def test_it_is_the_best_of_its_rank_by_the_dense_svd(shape: tuple[int, ...], alpha: float | None) -> None:
    before = of(shape, 10, alpha=alpha)
    old = before.layers["unet.a"]
    adapter, report = resize_adapter(before, 2)
    new, said = adapter.layers["unet.a"], report.layers["unet.a"]
    values = torch.linalg.svdvals(old.delta().double().flatten(1))
    assert relative(new, old) == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert said.error == pytest.approx(relative(new, old), rel=1e-4)
    assert said.kept == pytest.approx(float(values[:2].norm() / values.norm()), rel=1e-5)
    assert said.norm == pytest.approx(float(old.delta().norm()), rel=1e-5)
    assert (said.rank_before, said.rank_after, new.rank) == (10, 2, 2)
    assert new.delta().shape == shape
    assert new.down.shape[1:] == old.down.shape[1:]
    assert new.up.shape[2:] == old.up.shape[2:]
    # The strength that people read off alpha / rank stays; a scale below 0 becomes 1.
    assert new.scale == pytest.approx(old.scale if old.scale > 0 else 1.0)
    assert new.alpha == float(torch.tensor(new.alpha, dtype=torch.float32))
    assert adapter.metadata == {"kept": "yes"}
    # Both factors are of one size.
    assert float(new.up.norm()) == pytest.approx(float(new.down.norm()), rel=1e-4)


def test_a_layer_of_that_rank_or_lower_is_left_to_the_bit() -> None:
    before = Adapter({"unet.a": layer((20, 16), 4), "unet.b": layer((20, 16), 8), "unet.c": layer((20, 16), 9)})
    after, report = resize_adapter(before, 8)
    assert after.layers["unet.a"] is before.layers["unet.a"]
    assert after.layers["unet.b"] is before.layers["unet.b"]
    assert after.layers["unet.c"].rank == 8
    assert (report.layers["unet.a"].error, report.changed) == (0.0, 1)
    assert [name for name, _ in report.worst()] == ["unet.c"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_files_dtype_holds_the_alpha(dtype: torch.dtype) -> None:
    """Files hold alpha in the dtype of the weights: 8 / 3 is no float16."""
    before = Adapter({"unet.a": layer((20, 16), 9, alpha=3.0, dtype=dtype)}, {ALPHA_DTYPES: '{"unet.a": "int64"}'})
    after, report = resize_adapter(before, 8)
    alpha = after.layers["unet.a"].alpha
    assert alpha == pytest.approx(8 / 3, rel=2**-8)
    assert alpha == float(torch.tensor(alpha, dtype=dtype))
    assert report.error == pytest.approx(relative(after.layers["unet.a"], before.layers["unet.a"]), rel=0.02)
    assert after.metadata == {}
    tiny = Adapter({"unet.a": layer((20, 16), 9, alpha=1e-30)})
    assert resize_adapter(tiny, 4, dtype=torch.float16)[0].layers["unet.a"].alpha == 4.0


def test_totals_are_roots_of_summed_squares() -> None:
    before = Adapter({"unet.a": layer((20, 16), 6, 1), "unet.b": layer((30, 16), 6, 5, alpha=60.0)})
    after, report = resize_adapter(before, 2)
    old = torch.cat([one.delta().flatten() for one in before.layers.values()])
    new = torch.cat([one.delta().flatten() for one in after.layers.values()])
    assert report.error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    assert report.norm == pytest.approx(float(old.norm()), rel=1e-5)
    assert report.kept**2 + report.error**2 == pytest.approx(1, abs=1e-5)
    assert ResizeReport({}).error == 0.0


def test_the_error_tells_rounding_too() -> None:
    """Rank 3 in a file of rank 8: cutting to 3 loses nothing, storing in float16 does."""
    low = layer((20, 16), 3, 1, alpha=None)
    padded = LoraLayer(torch.cat([low.down, torch.zeros(5, 16)]), torch.cat([low.up, torch.zeros(20, 5)], 1))
    exact, report = resize_adapter(Adapter({"unet.a": padded}), 3)
    assert report.error < 1e-6
    half, rough = resize_adapter(Adapter({"unet.a": padded}), 3, dtype=torch.float16)
    assert half.layers["unet.a"].up.dtype is torch.float16
    assert 1e-5 < rough.error < 1e-3
    assert rough.error == pytest.approx(relative(half.layers["unet.a"], padded), rel=1e-3)
    assert exact.layers["unet.a"].up.dtype is torch.float32


def test_the_rank_by_error() -> None:
    values = torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001])
    u, v = (torch.linalg.qr(layer((20, 5), 5, seed).delta())[0] for seed in (1, 5))
    before = Adapter({"unet.a": LoraLayer((v * values).T.contiguous(), u)})
    for limit, rank in ((0.5, 1), (0.1, 2), (0.01, 3), (0.001, 4), (0.0, 5)):
        after, report = resize_adapter(before, None, max_error=limit)
        assert after.layers["unet.a"].rank == rank
        assert report.error <= limit + 1e-6
    assert resize_adapter(before, 2, max_error=0.001)[0].layers["unet.a"].rank == 2


def test_a_layer_that_adds_nothing() -> None:
    """The up of a LoRA that was never trained is all zeros."""
    zero = LoraLayer(layer((20, 16), 4).down, torch.zeros(20, 4), 4.0)
    for options in ({"rank": 2}, {"rank": None, "max_error": 0.1}):
        after, report = resize_adapter(Adapter({"unet.a": zero}), **options)  # type: ignore[arg-type]
        assert after.layers["unet.a"].delta().abs().max() == 0
        assert (report.error, report.kept) == (0.0, 1.0)


def test_more_rank_than_inputs() -> None:
    before = of((64, 3), 10)
    after, report = resize_adapter(before, 8)
    assert after.layers["unet.a"].rank == 3
    assert report.error < 1e-6


@pytest.mark.parametrize(
    ("rank", "max_error"), [(None, None), (0, None), (-1, None), (None, 1.0), (None, -0.1), (None, math.nan)]
)
def test_what_cannot_be_asked(rank: int | None, max_error: float | None) -> None:
    with pytest.raises(UsageError):
        resize_adapter(of((20, 16), 4), rank, max_error=max_error)


def test_nan_is_refused_by_the_layers_name() -> None:
    bad = layer((20, 16), 4)
    bad.down[1, 2] = torch.nan
    with pytest.raises(IntegrityError, match=r"unet\.bad"):
        resize_adapter(Adapter({"unet.bad": bad}), 2)


def test_distance_is_that_of_the_dense_deltas() -> None:
    a, b = layer((20, 16), 4, 1, alpha=2.0), layer((20, 16), 7, 5, alpha=None)
    assert distance(a, b) == pytest.approx(float((a.delta().double() - b.delta().double()).norm()), rel=1e-6)
    assert distance(a, replace(a, up=a.up.clone())) < 1e-7
