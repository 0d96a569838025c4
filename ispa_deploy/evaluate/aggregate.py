"""From per-pair rows to what a table says: means, paired ratios and recovered gaps, with bootstrap intervals.

The unit that is resampled is the pair: chunks of one video are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Sample = NDArray[np.float64]
Statistic = Callable[[Sample], Sample]
"""(..., pairs, columns) -> (...)."""

ERRORS = ("error_first", "error_next", "error_later")
"""Latent error in the first chunk after the transition, in the two that follow, and from there on."""

RESAMPLES = 4000


class Interval(NamedTuple):
    """A statistic of all pairs and the central 95 % of its bootstrap distribution."""

    value: float
    low: float
    high: float


def bootstrap(sample: ArrayLike, statistic: Statistic, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Percentile interval of `statistic` over the rows of `sample`, (pairs,) or (pairs, columns)."""
    rows = np.asarray(sample, dtype=np.float64)
    rows = rows.reshape(len(rows), -1)
    picks = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.quantile(statistic(rows[picks]), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(rows)), float(low), float(high))


def mean(sample: Sample) -> Sample:
    """Of the first column."""
    return np.asarray(sample[..., 0].mean(-1))


def geometric_ratio(sample: Sample) -> Sample:
    """exp of the mean log of (first column / second column): every pair counts alike, whatever its size."""
    return np.asarray(np.exp(np.log(sample[..., 0] / sample[..., 1]).mean(-1)))


def pooled_recovery(sample: Sample) -> Sample:
    """Share of the second column's total that is gone in the first's."""
    return np.asarray(1 - sample[..., 0].sum(-1) / sample[..., 1].sum(-1))


def median_recovery(sample: Sample) -> Sample:
    """Median over pairs of 1 - first / second."""
    return np.asarray(np.median(1 - sample[..., 0] / sample[..., 1], -1))


def aggregate(
    rows: Sequence[dict[str, Any]], rivals: Iterable[tuple[str, str]], reference: str, seed: int = 0
) -> dict[str, Any]:
    """Rows {variant, metrics: {name: float}}, pairs in the same order for every variant -> plain JSON types.

    `summary`: variant -> metric -> mean over pairs. `to_reference`: variant -> metric -> mean of the paired difference
    from the reference. `comparisons`: see `compare`. Intervals are {value, low, high}.
    """
    by_variant: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row["metrics"])
    base = by_variant[reference]
    return {
        "summary": {name: _means(metrics, seed) for name, metrics in by_variant.items()},
        "to_reference": {
            name: _means([_difference(*both) for both in zip(metrics, base, strict=True)], seed)
            for name, metrics in by_variant.items()
            if name != reference
        },
        "comparisons": [
            {"variant": name, "against": against, **compare(by_variant[name], by_variant[against], seed)}
            for name, against in rivals
            if name in by_variant and against in by_variant
        ],
    }


def compare(metrics: Sequence[dict[str, float]], against: Sequence[dict[str, float]], seed: int = 0) -> dict[str, Any]:
    """Two variants' errors, pair by pair, for each part of the video that they have:

    `ratio`: geometric mean of the pairs' quotients; `wins`: pairs with the smaller error; `recovery` and
    `recovery_median`: share of `against`'s error that is gone, over the sums and as the pairs' median. Set against
    No-Absorb on the same layers it is the recovered part of the gap, for Full's own error is zero. Pairs without any
    error (no layer was local) say nothing and are left out; `pairs` counts the others.
    """
    found = {}
    for name in ERRORS:
        both = [(a[name], b[name]) for a, b in zip(metrics, against, strict=True) if name in a]
        sample = np.array([row for row in both if min(row) > 0])
        if not len(sample):
            continue
        found[name] = {
            "pairs": len(sample),
            "wins": int((sample[:, 0] < sample[:, 1]).sum()),
            "ratio": bootstrap(sample, geometric_ratio, seed=seed)._asdict(),
            "recovery": bootstrap(sample, pooled_recovery, seed=seed)._asdict(),
            "recovery_median": bootstrap(sample, median_recovery, seed=seed)._asdict(),
        }
    return found


def _means(metrics: Sequence[dict[str, float]], seed: int) -> dict[str, dict[str, float]]:
    return {name: bootstrap([row[name] for row in metrics], mean, seed=seed)._asdict() for name in metrics[0]}


def _difference(metrics: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {name: value - base[name] for name, value in metrics.items()}
