"""Which frame lies in which slot of a window buffer: integers only, no tensors.

A window buffer holds W frames in slots; attention does not care about their order, so nothing is ever shifted:

    slot   0        1 .. r+c                      r+c+1 .. W-1
          [frame 0 | r recent + c current frames | everything else, oldest replaced first]

Keeping frame 0, the recent frames and the current chunk side by side makes the local keys one contiguous range, the
history another, and the filled window a third, so each is one attention call on a view. The current chunk alternates
between r/c + 1 bays, so in a full window a chunk is copied once in its life: when its bay is needed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ispa_deploy.errors import InputError

Range = tuple[int, int]


def coalesce(slots: Iterable[int]) -> tuple[Range, ...]:
    """Half-open runs of consecutive slots, ascending."""
    runs: list[list[int]] = []
    for slot in sorted(slots):
        if runs and runs[-1][1] == slot:
            runs[-1][1] += 1
        else:
            runs.append([slot, slot + 1])
    return tuple((start, stop) for start, stop in runs)


def split_past(
    ranges: Iterable[Range], frames: Sequence[int], start: int
) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Slots of `ranges` as those of frame 0 and of frames from `start` on, and those of the past between them."""
    slots = [slot for first, last in ranges for slot in range(first, last)]
    past = {slot for slot in slots if 0 < frames[slot] < start}
    return coalesce(slot for slot in slots if slot not in past), coalesce(past)


@dataclass(frozen=True)
class Room:
    """What a buffer must do before a chunk is written: `evicted` slots oldest first, then `moves` (from, to)."""

    evicted: tuple[int, ...] = ()
    moves: tuple[Range, ...] = ()


@dataclass
class WindowSlots:
    """Slot table of one layer's window. `frames[slot]` is the frame held there, -1 for none.

    `origin`: the first frame of the sink; none older is held.
    """

    capacity: int
    sink: int
    chunk: int
    recent: int = 0
    rolls: bool = True
    origin: int = 0
    frames: list[int] = field(default_factory=list)
    current: Range = (0, 0)
    _chunks: int = 0

    def __post_init__(self) -> None:
        if self.recent % self.chunk or self.recent < 0:
            raise InputError(f"recent frames {self.recent}: expected a multiple of the chunk ({self.chunk} frames)")
        first = max(1, self.sink) if self.recent else self.sink  # recent frames lie behind frame 0
        if self.capacity < first + self.recent + self.chunk:
            raise InputError(
                f"window of {self.capacity} frames cannot hold sink, {self.recent} recent and {self.chunk} current"
            )
        self.frames = self.frames or [-1] * self.capacity

    @property
    def filled(self) -> int:
        """Slots in use; always the first ones."""
        return sum(frame >= 0 for frame in self.frames)

    def begin(self, start: int, count: int) -> Room:
        """Make room for frames [start, start + count) and say how."""
        if self.filled == 0:
            self._enter(0, start, count)
            return Room()
        bay = 1 + (self._chunks % (self.recent // self.chunk + 1)) * self.chunk
        self._chunks += 1
        overflow = self.filled + count - self.capacity
        if overflow > 0 and not self.rolls:
            raise InputError(
                f"frame {start + count - 1} does not fit this model's cache of {self.capacity} frames: ask for at most "
                f"{self.capacity} frames, or let the window roll (--roll --sink 1)"
            )
        evicted = tuple(self._oldest(overflow)) if overflow > 0 else ()
        for slot in evicted:
            self.frames[slot] = -1
        bay = min(bay, self.filled)  # a table that took over few frames has no such bay yet: never leave a hole
        moves = tuple(self._vacate(range(bay, bay + count)))
        self._enter(bay, start, count)
        return Room(tuple(evicted), moves)

    def readmit(self, start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Where frames [start, start + count) go when they are computed again: (offset from `start`, slot) each.

        Frames held keep their slots, and a sink is not touched unless the stream's first frame is among them, as
        upstream. Frames not held enter free slots, the newest as long as there are any.
        """
        missing = [frame for frame in range(start, start + count) if frame not in self.frames]
        free = [slot for slot, frame in enumerate(self.frames) if frame < 0]
        for slot, frame in zip(free, missing[max(0, len(missing) - len(free)) :], strict=False):
            self.frames[slot] = frame
        first = start if start == 0 else self.origin + self.sink
        again = [slot for slot in self.temporal() if self.frames[slot] >= first]
        return tuple((self.frames[s] - start, s) for s in again if start <= self.frames[s] < start + count)

    def renew(self, start: int, count: int) -> tuple[tuple[int, int], ...]:
        """As `readmit`, with nothing left of what was held: the first of these frames are the sink from now on."""
        fresh = WindowSlots(self.capacity, self.sink, self.chunk, self.recent)
        first = count % self.chunk or self.chunk
        for begin in range(first - self.chunk, count, self.chunk):
            fresh.begin(max(0, begin), self.chunk if begin >= 0 else first)
        self.frames = [start + frame if frame >= 0 else -1 for frame in fresh.frames]
        self.origin, self._chunks = start, fresh._chunks
        return tuple((frame - start, slot) for slot, frame in enumerate(self.frames) if frame >= 0)

    def admit(self, frames: Iterable[int]) -> tuple[int, ...]:
        """Slots of `frames`, one each; frames not held enter free slots, of which there must be enough."""
        free = iter([slot for slot, frame in enumerate(self.frames) if frame < 0])
        found = []
        for frame in frames:
            slot = self.frames.index(frame) if frame in self.frames else next(free)
            self.frames[slot] = frame
            found.append(slot)
        return tuple(found)

    def resume(self, frames: list[int]) -> None:
        """Take over an L-layer's frames (ascending), which lie in the first slots; the next chunk goes behind them."""
        self.frames[: len(frames)] = frames
        self._chunks = self.recent // self.chunk

    def local(self, start: int, sink: int) -> tuple[Range, ...]:
        """Slots of an L-layer's keys while frames from `start` on are current: `sink` first ones, recent, current."""
        near = [s for s, f in enumerate(self.frames) if f >= 0 and (f >= start - self.recent or f < self.origin + sink)]
        return coalesce(near)

    def rest(self, ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        """Filled slots outside `ranges`."""
        taken = {slot for first, last in ranges for slot in range(first, last)}
        return coalesce(slot for slot in range(self.filled) if slot not in taken)

    def temporal(self) -> list[int]:
        """Filled slots, oldest frame first."""
        return sorted((s for s, f in enumerate(self.frames) if f >= 0), key=self.frames.__getitem__)

    def _oldest(self, count: int) -> list[int]:
        rolling = [slot for slot in self.temporal() if self.frames[slot] >= self.origin + self.sink]
        return rolling[:count]

    def _vacate(self, bay: range) -> Iterable[Range]:
        free = iter([s for s, f in enumerate(self.frames) if f < 0 and s not in bay])
        for slot in bay:
            if self.frames[slot] >= 0:
                target = next(free)
                self.frames[target], self.frames[slot] = self.frames[slot], -1
                yield slot, target

    def _enter(self, slot: int, start: int, count: int) -> None:
        self.frames[slot : slot + count] = range(start, start + count)
        self.current = (slot, slot + count)
