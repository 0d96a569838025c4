"""What recording costs: recorded blocks over plain ones, and the marks by themselves.

A chunk takes seconds and the speed of a machine wanders by more than recording costs within them, so whole chunks tell
little. A block and its neighbour are milliseconds apart: two chunks are generated in which every second call of a block
is recorded, in the first one the even calls, in the second one the odd calls.

Where a machine is too noisy even for that, the marks of a chunk are counted and the price of one is measured by itself.
That bounds what recording costs, for it does nothing but pass marks; it does not overrule a comparison that denies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import median
from typing import Any

from ispa_deploy.profile.breakdown import LIMITS, Holds
from ispa_deploy.profile.interval import median_interval
from ispa_deploy.profile.layers import BlockCall
from ispa_deploy.profile.recorder import ChunkRecorder, Clock
from ispa_deploy.regions import recording, region

MARGIN = 10
"""How many times over the price of the marks must fit into the limit to decide alone: a mark is dearer in the midst of
work, where its code is in no cache, than in the loop that its price is measured in. Measured: the demo's blocks take
1.1 to 1.6 % longer recorded, its marks by their price 0.37 to 0.46 %, so up to four times as long
(`python -m tests.bench.chunk demo`)."""

_LIMIT = LIMITS["instrumented_over_plain"]
_MARKS, _TRIES = 1000, 7


@dataclass(frozen=True)
class Price:
    """`ratio` recorded over plain time, the median over `pairs` of neighbouring `unit` (`blocks` or `chunks`), with
    its 95 % `interval`; a chunk passes `marks` marks of `mark_ns` each, together `marks_share` of its time. The price
    of marks is None where a processor makes them and another one does the work."""

    ratio: float
    interval: list[float] | None
    pairs: int
    unit: str
    marks: int
    mark_ns: float | None
    marks_share: float | None

    def judged(self) -> tuple[Holds, str | None]:
        """Whether the recorded work takes as long as the plain one within the limit, and by what that is known:
        `comparison`, `marks`, or None while it is open.

        The interval decides where it lies on one side of the limit. Where it does not, the marks do if ten times their
        price is within the limit and the interval holds a cost between nothing and that.
        """
        low, high = self.interval or (0.0, float("inf"))
        if low >= 1 - _LIMIT and high <= 1 + _LIMIT:
            return "yes", "comparison"
        if high < 1 - _LIMIT or low > 1 + _LIMIT:
            return "no", "comparison"
        most = None if self.marks_share is None else MARGIN * self.marks_share
        if most is not None and most <= _LIMIT and low <= 1 + most and high >= 1:
            return "yes", "marks"
        return "open", None

    def holds(self) -> Holds:
        return self.judged()[0]

    def to_dict(self) -> dict[str, Any]:
        rows = {name: value for name, value in asdict(self).items() if name != "ratio"}
        return {**rows, "judged_by": self.judged()[1]}


def price_of(ratios: Sequence[float], unit: str, marks: int, mark_ns: float | None, chunk_ms: float) -> Price:
    """`ratios` recorded over plain of neighbours, at least one; a plain chunk takes `chunk_ms` and passes `marks`."""
    share = None if mark_ns is None else marks * mark_ns / (1e6 * chunk_ms)
    return Price(median(ratios), median_interval(ratios), len(ratios), unit, marks, mark_ns, share)


def block_ratios(even: Sequence[BlockCall], odd: Sequence[BlockCall]) -> list[float]:
    """Recorded over plain time of neighbouring calls, from chunks with their even and their odd calls recorded.

    Of the calls a and b, `even` has recorded a and `odd` has recorded b. In sqrt(a b' / (b a')), where the dash stands
    for `odd`, all cancels out that makes one call or one chunk slower than the other.
    """
    pairs = zip(even[::2], even[1::2], odd[::2], odd[1::2], strict=False)
    return [sqrt(a * other_b / (b * other_a)) for (_, a), (_, b), (_, other_a), (_, other_b) in pairs]


def mark_price(recorder: ChunkRecorder, clock: Clock) -> float:
    """Nanoseconds that `recorder` adds to a mark; the least of a few tries, for nothing makes a mark cheaper."""
    plain, recorded = [], []
    for _ in range(_TRIES):
        plain.append(_time_marks(clock))
        recorder.begin()
        with recording(recorder):
            recorded.append(_time_marks(clock))
    return max(0.0, min(recorded) - min(plain)) / _MARKS


def _time_marks(clock: Clock) -> int:
    start = clock()
    for _ in range(_MARKS):
        with region("overhead.python"):
            pass
    return clock() - start
