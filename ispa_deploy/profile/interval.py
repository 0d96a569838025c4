"""Intervals of medians without an assumption about how times are distributed: order statistics."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

COVERAGE = 0.95
ENOUGH = 6
"""Fewest values whose extremes enclose the true median with 95 % probability: 1 - 2 / 2**6 = 0.97."""


def median_interval(values: Sequence[float]) -> list[float] | None:
    """[low, high] that holds the true median with at least 95 % probability; None for fewer values than that takes.

    The number of values below the median is binomial (n, 1/2), so the interval from the k-th smallest to the k-th
    largest misses it with probability 2 P(B < k); the largest k that misses in 5 % of all cases or fewer is taken.
    """
    count, ordered = len(values), sorted(values)
    if count < ENOUGH:
        return None
    outside, rank = 0.0, 0
    while 2 * (outside + comb(count, rank) / 2**count) <= 1 - COVERAGE:
        outside += comb(count, rank) / 2**count
        rank += 1
    return [ordered[rank - 1], ordered[count - rank]]


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> list[float] | None:
    """The same for the quotient of neighbours in time: what slows a machine for a while slows both of a pair."""
    return median_interval([a / b for a, b in zip(above, below, strict=True)])
