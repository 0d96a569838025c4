"""The time of one chunk by rows, and the rules that show whether the account closes.

Every moment of a recorded chunk belongs to exactly one row of `ispa_deploy.regions.ROWS` or to `unattributed`. The wall
time is read on a clock of its own, outside the recorder, so a row that was lost or counted twice shows in `sum_error`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ispa_deploy.regions import FAMILIES, ROWS

SELF_ATTENTION = ("attention.kernel", "attention.merge", "attention.cache")
"""The rows that ISPA acts on; cross-attention is the same in every configuration."""

LIMITS = {"sum_error": 0.01, "unattributed_share": 0.03, "instrumented_over_plain": 0.03}
"""The three closing rules: shares of the wall time; the last one is the distance of the ratio from 1."""

RULES = {
    "sum_error": "rows and wall time differ by",
    "unattributed_share": "time in no row:",
    "instrumented_over_plain": "recording changed the time by",
}
"""The same rules in words, to be followed by a share."""


@dataclass(frozen=True)
class Breakdown:
    """One chunk in milliseconds: `components` holds every row of `ROWS`, `wall` is measured apart from them."""

    components: Mapping[str, float]
    unattributed: float
    wall: float

    @property
    def families(self) -> dict[str, float]:
        """Sums of the rows of each family."""
        return {
            family: sum(ms for row, ms in self.components.items() if row.startswith(f"{family}."))
            for family in FAMILIES
        }

    @property
    def self_attention(self) -> float:
        """Self-attention kernel, merge and cache management."""
        return sum(self.components[row] for row in SELF_ATTENTION)

    @property
    def sum_error(self) -> float:
        """How far rows and `unattributed` together are from the wall time, as a share of it."""
        return abs(sum(self.components.values()) + self.unattributed - self.wall) / self.wall

    @property
    def unattributed_share(self) -> float:
        return self.unattributed / self.wall


def typical(chunks: Sequence[Breakdown]) -> Breakdown:
    """The median chunk: the mean of the middle half by wall time (up to three chunks: the middle one).

    Medians row by row would not add up to the median wall time; means over the same chunks do.
    """
    assert chunks, "no chunk was recorded"
    ordered = sorted(chunks, key=lambda chunk: chunk.wall)
    drop = len(ordered) // 4 if len(ordered) > 3 else (len(ordered) - 1) // 2
    middle = ordered[drop : len(ordered) - drop]
    return Breakdown(
        {row: fmean(chunk.components[row] for chunk in middle) for row in ROWS},
        fmean(chunk.unattributed for chunk in middle),
        fmean(chunk.wall for chunk in middle),
    )


Holds = Literal["yes", "no", "open"]
"""Whether a rule holds; `open`: the machine is too noisy to tell."""


def closing(chunk: Breakdown, instrumented_over_plain: float, recording: Holds) -> dict[str, Any]:
    """The three rules as values: what was found, what is allowed, and whether all hold.

    The first two are sums of one chunk and exact. The last compares times, so `recording` says whether it holds; what
    is open counts as not closed.
    """
    found = {
        "sum_error": chunk.sum_error,
        "unattributed_share": chunk.unattributed_share,
        "instrumented_over_plain": abs(instrumented_over_plain - 1),
    }
    broken = [rule for rule in ("sum_error", "unattributed_share") if found[rule] > LIMITS[rule]]
    broken += ["instrumented_over_plain"] if recording == "no" else []
    unknown = ["instrumented_over_plain"] if recording == "open" else []
    return {
        **found, "limits": dict(LIMITS), "broken": broken, "undecided": unknown, "closed": not broken + unknown,
    }  # fmt: skip
