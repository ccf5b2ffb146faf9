"""Pairs of scores, before and after: means, win rate, and the bootstrap's interval. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from craft_fast.errors import IntegrityError
from craft_fast.records import EvalRow, Provenance
from craft_fast.rng import derive_seed


def paired_rows(
    base: Mapping[str, Sequence[float]],
    tuned: Mapping[str, Sequence[float]],
    held_out: Mapping[str, bool],
    *,
    bootstrap_samples: int,
    seed: int,
    provenances: Mapping[str, Collection[Provenance | None]] | None = None,
) -> list[EvalRow]:
    """Means, win rate (a tie counts one half) and the interval of the mean paired difference, tuned minus base.

    The interval is the percentile bootstrap's 95 %: prompts are drawn with replacement, the same draws for every
    reward, so rows can be compared.

    Args:
        base: scores by reward, in prompt order.
        tuned: likewise, of the same prompts.
        held_out: by reward; its order is the order of the rows.
        bootstrap_samples: draws.
        seed: of the draws.
        provenances: by reward, all the ways in which its scores came about, of both sides.

    Raises:
        IntegrityError: the scores of one reward came about in more than one way.
    """
    rows: list[EvalRow] = []
    for name, is_held_out in held_out.items():
        _refuse_mixed(name, list((provenances or {}).get(name, ())))
        before, after = np.asarray(base[name], dtype=np.float64), np.asarray(tuned[name], dtype=np.float64)
        if before.shape != after.shape or before.size == 0:
            raise ValueError(f"{name}: {before.size} base scores, {after.size} tuned scores; need equal numbers, not 0")
        difference = after - before
        win_rate = float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))
        low, high = bootstrap_interval(difference, samples=bootstrap_samples, seed=derive_seed(seed, "bootstrap"))
        means = float(before.mean()), float(after.mean())
        rows.append(EvalRow(name, is_held_out, *means, win_rate, low, high, int(before.size)))
    return rows


def _refuse_mixed(name: str, ways: Sequence[Provenance | None]) -> None:
    if len(ways) > 1:
        one, two = ways[:2]
        differs = one.differences(two) if one and two else ["how some came about is not recorded"]
        raise IntegrityError(
            "Scores that came about in different ways are not compared",
            where=f"reward {name}, pictures of the base model and of the tuned one",
            why="; ".join(differs),
            hint="evaluate again, which judges anew what differs: craft-fast evaluate",
        )


def bootstrap_interval(difference: np.ndarray, *, samples: int, seed: int) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the mean over ``samples`` draws of ``difference`` [n] with replacement."""
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    rows_at_once = max(1, 4_000_000 // difference.size)
    for start in range(0, samples, rows_at_once):
        stop = min(start + rows_at_once, samples)
        drawn = rng.integers(0, difference.size, size=(stop - start, difference.size))
        means[start:stop] = difference[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
