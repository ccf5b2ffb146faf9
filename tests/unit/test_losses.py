from __future__ import annotations

import pytest
import torch

from craft_fast.errors import ConfigError, CraftError
from craft_fast.losses import min_snr_weight, normalise_weights, sample_rows, snr

# a_t = 0.9, 0.5, 0.1: signal-to-noise ratios 9, 1, 1/9.
SCHEDULE = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)


def test_snr_by_hand() -> None:
    assert snr(SCHEDULE).tolist() == pytest.approx([9.0, 1.0, 1 / 9])


def test_min_snr_for_epsilon() -> None:
    weight = min_snr_weight(SCHEDULE, 3.0, "epsilon")
    assert weight is not None
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx([3 / 9, 1.0, 1.0])


def test_min_snr_for_v() -> None:
    weight = min_snr_weight(SCHEDULE, 3.0, "v_prediction")
    assert weight is not None
    assert weight.tolist() == pytest.approx([3 / 10, 1 / 2, (1 / 9) / (10 / 9)])


def test_zero_terminal_snr_has_a_finite_weight() -> None:
    schedule = torch.tensor([0.5, 0.0])
    epsilon, v = (min_snr_weight(schedule, 5.0, kind) for kind in ("epsilon", "v_prediction"))
    assert epsilon is not None
    assert v is not None
    assert epsilon.tolist() == [1.0, 1.0]
    assert v.tolist() == [0.5, 0.0]


def test_no_gamma_no_weight() -> None:
    assert min_snr_weight(SCHEDULE, None, "epsilon") is None


def test_unknown_prediction_type() -> None:
    with pytest.raises(ConfigError, match="prediction"):
        min_snr_weight(SCHEDULE, 5.0, "sample")


def test_positive_weights_are_divided_by_their_mean() -> None:
    assert normalise_weights(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([0.5, 1.0, 1.5])


def test_signed_weights_keep_their_signs_and_a_finite_size() -> None:
    """A whole group's advantages sum to zero: w / mean(w) would be infinite."""
    assert normalise_weights(torch.tensor([1.5, -0.5, -1.0])).tolist() == pytest.approx([1.5, -0.5, -1.0])
    assert normalise_weights(torch.tensor([-2.0, -6.0])).tolist() == pytest.approx([-0.5, -1.5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [([], "nothing to train on"), ([0.0, 0.0], "All sample weights are zero"), ([1.0, float("nan")], "not finite")],
)
def test_useless_weights(weights: list[float], message: str) -> None:
    with pytest.raises(CraftError, match=message):
        normalise_weights(torch.tensor(weights))


def test_every_epoch_holds_every_sample_once() -> None:
    n, batch = 6, 4
    stream = [row for step in range(6) for row, _ in sample_rows(n, batch, seed=1, step=step)]
    epochs = [stream[start : start + n] for start in range(0, len(stream), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = [row for step in range(6) for row, _ in sample_rows(n, batch, seed=2, step=step)]
    assert other != stream


def test_repeats_within_a_step_are_counted() -> None:
    rows = sample_rows(2, 5, seed=0, step=0)
    assert sorted(rows) in ([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])
