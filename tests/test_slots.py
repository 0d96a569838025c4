"""Slot tables against the naive rule: which frames a window holds, and where the local ones lie."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from ispa_deploy.errors import InputError
from ispa_deploy.slots import WindowSlots, coalesce
from tests.reference import kept_frames

# capacity, sink, chunk, recent, first chunk
CASES = [
    case
    for case in product((4, 6, 9, 10, 12, 21), (0, 1, 3), (1, 3), (0, 1, 3, 6), (0, 1))
    if case[3] % case[2] == 0 and case[0] >= max(1, case[1]) + case[3] + case[2]
]


def _chunks(chunk: int, first: int, number: int) -> list[tuple[int, int]]:
    start = first or chunk
    return [(0, start), *((start + n * chunk, chunk) for n in range(number - 1))]


class _Buffer:
    """What a cache does with a table's instructions, with frame numbers in place of keys."""

    def __init__(self, slots: WindowSlots):
        self.slots, self.held = slots, [-1] * slots.capacity

    def begin(self, start: int, count: int) -> None:
        room = self.slots.begin(start, count)
        for source, target in room.moves:
            self.held[target] = self.held[source]
        first, last = self.slots.current
        self.held[first:last] = range(start, start + count)


def _check(buffer: _Buffer, expected: list[int], start: int, recent: int) -> None:
    slots = buffer.slots
    assert [frame >= 0 for frame in slots.frames] == [n < slots.filled for n in range(slots.capacity)]
    assert sorted(slots.frames[: slots.filled]) == expected
    assert buffer.held[: slots.filled] == slots.frames[: slots.filled]
    near = slots.local(start, 1)
    inside = {slots.frames[slot] for a, b in near for slot in range(a, b)}
    assert inside == {frame for frame in expected if frame == 0 or frame >= start - recent}
    outside = {slots.frames[slot] for a, b in slots.rest(near) for slot in range(a, b)}
    assert outside == set(expected) - inside


@pytest.mark.parametrize(("capacity", "sink", "chunk", "recent", "first"), CASES)
def test_window_holds_what_the_rule_says(capacity: int, sink: int, chunk: int, recent: int, first: int) -> None:
    chunks = _chunks(chunk, first, 14)
    buffer = _Buffer(WindowSlots(capacity, sink, chunk, recent))
    for number, (start, count) in enumerate(chunks):
        buffer.begin(start, count)
        expected = kept_frames(capacity, sink, chunks[: number + 1])
        if start < recent:
            continue  # empty slots count as local then: test_empty_slots_are_never_local
        _check(buffer, expected, start, recent)
        if sink and start >= recent + chunk:
            assert len(buffer.slots.local(start, 1)) == 1


@pytest.mark.parametrize("recent", [3, 6])
def test_empty_slots_are_never_local(recent: int) -> None:
    slots = WindowSlots(12, 1, 3, recent)
    slots.begin(0, 3)
    assert slots.local(0, 1) == ((0, 3),)


@pytest.mark.parametrize(("capacity", "sink", "recent"), [(12, 1, 0), (12, 3, 3), (12, 1, 6)])
def test_once_the_window_is_full_a_frame_is_copied_at_most_once(capacity: int, sink: int, recent: int) -> None:
    slots, copied = WindowSlots(capacity, sink, 3, recent), Counter[int]()
    for start in range(0, 60, 3):
        before = list(slots.frames)
        copied.update(before[source] for source, _ in slots.begin(start, 3).moves)
    assert max(times for frame, times in copied.items() if frame >= capacity) == 1


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(("kept", "recent"), [([], 0), ([0], 0), ([0, 1, 2], 0), ([9, 10, 11], 0), ([0, 9, 10, 11], 3)])
def test_a_table_that_takes_over_local_frames_goes_on_by_the_rule(kept: list[int], recent: int, sink: int) -> None:
    _go_on(kept, recent, sink)


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [9, 10, 11]])
def test_a_table_that_takes_over_few_local_frames_leaves_no_hole(kept: list[int], sink: int) -> None:
    _go_on(kept, 3, sink)


def _go_on(kept: list[int], recent: int, sink: int) -> None:
    buffer = _Buffer(WindowSlots(9, sink, 3, recent))
    buffer.slots.resume(kept)
    buffer.held[: len(kept)] = kept
    held = list(kept)
    for start in range(12, 42, 3):
        buffer.begin(start, 3)
        held += range(start, start + 3)
        drop = [frame for frame in held if frame >= sink][: max(0, len(held) - 9)]
        held = [frame for frame in held if frame not in drop]
        _check(buffer, held, start, recent)


def test_a_window_that_does_not_roll_ends_in_one_line() -> None:
    slots = WindowSlots(6, 0, 3, rolls=False)
    slots.begin(0, 3)
    slots.begin(3, 3)
    with pytest.raises(InputError, match="at most 6 frames"):
        slots.begin(6, 3)


@pytest.mark.parametrize(("capacity", "recent"), [(12, 2), (12, -3), (6, 3)])
def test_impossible_tables_are_refused(capacity: int, recent: int) -> None:
    with pytest.raises(InputError):
        WindowSlots(capacity, 1, 3, recent)


def test_coalesce_joins_neighbours() -> None:
    assert coalesce([5, 1, 2, 7, 6]) == ((1, 3), (5, 8))
    assert coalesce([]) == ()


def test_computing_the_past_anew_keeps_slots_and_spares_the_sink() -> None:
    slots = WindowSlots(capacity=12, sink=3, chunk=3)
    for start in range(0, 18, 3):
        slots.begin(start, 3)
    before = list(slots.frames)
    pairs = slots.readmit(6, 12)  # frames 6 to 17; of them the window still holds 9 to 17
    assert slots.frames == before
    assert sorted(offset for offset, _ in pairs) == list(range(3, 12))
    assert all(before[slot] == 6 + offset for offset, slot in pairs)


def test_computing_a_short_past_anew_includes_the_sink() -> None:
    slots = WindowSlots(capacity=12, sink=3, chunk=3)
    for start in (0, 3):
        slots.begin(start, 3)
    assert sorted(offset for offset, _ in slots.readmit(0, 6)) == list(range(6))


def test_a_layer_that_was_local_gets_its_window_back_when_the_past_is_computed_anew() -> None:
    slots = WindowSlots(capacity=12, sink=3, chunk=3)
    slots.resume([0])
    pairs = slots.readmit(18, 12)
    assert slots.filled == 12
    assert sorted(slots.frames) == [0, *range(19, 30)]  # one slot is taken by frame 0: the newest eleven
    assert sorted(offset for offset, _ in pairs) == list(range(1, 12))
    slots.begin(30, 3)
    assert slots.filled == 12


@pytest.mark.parametrize(("count", "recent"), [(12, 0), (12, 3), (10, 0), (6, 3)])
def test_renewing_the_sink_is_a_table_that_begins_there(count: int, recent: int) -> None:
    renewed, fresh = (WindowSlots(capacity=12, sink=3, chunk=3, recent=recent) for _ in range(2))
    for start in range(0, 30, 3):
        renewed.begin(start, 3)
    pairs = renewed.renew(30 - count, count)
    assert sorted(offset for offset, _ in pairs) == list(range(count))
    first = count % 3 or 3
    for start, frames in ((0, first), *((start, 3) for start in range(first, count, 3))):
        fresh.begin(start, frames)
    for start in range(30, 60, 3):
        renewed.begin(start, 3)
        fresh.begin(start - 30 + count, 3)
        assert renewed.frames == [frame + 30 - count if frame >= 0 else -1 for frame in fresh.frames]
        assert renewed.local(start, 1) == fresh.local(start - 30 + count, 1)
