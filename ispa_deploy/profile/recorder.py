"""Recorders that turn the marks of `ispa_deploy.regions` into the breakdown of a chunk; the innermost mark owns time.

A mark closes the running stretch of time and opens the next, so stretches can neither overlap nor leave a hole. What
lies in no mark is `overhead.python` inside a pass of the model and `unattributed` outside of one. Marks are made once
per row and recorder and used again. While a chunk runs, a mark writes down who it is and when, nothing else; whose time
that was is worked out after the chunk's clock has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from time import perf_counter_ns, process_time_ns
from typing import Any, Protocol

import torch
from torch import nn

from ispa_deploy.profile.breakdown import Breakdown
from ispa_deploy.regions import ROWS, Recorder, recording

_ROWS = tuple(ROWS)
_UNATTRIBUTED = len(_ROWS)
_LEFT = -1
_GAP = "overhead.python"
_NS_PER_MS = 1e6

Clock = Callable[[], int]
"""Nanoseconds since some fixed moment."""

Stretch = tuple[int, float]
"""Index into `ROWS` (one past the end: unattributed) and the ms for which it owned the time without a break."""

CLOCKS: dict[str, Clock] = {"wall": perf_counter_ns, "cpu": process_time_ns}
"""`cpu` is the CPU time of the process: with one thread, what the wall time would be were the machine not shared."""


class ChunkRecorder(Recorder, Protocol):
    """A recorder that is told where a chunk begins and ends, and asked afterwards."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def marks(self) -> int:
        """How many marks the chunk that ended last has passed through."""
        ...

    def stretches(self) -> list[Stretch]:
        """That chunk, moment by moment; empty before the first."""
        ...


def spent(stretches: Iterable[Stretch]) -> list[float]:
    """Milliseconds of every row of `ROWS`, in order, and at last of `unattributed`."""
    sums = [0.0] * (_UNATTRIBUTED + 1)
    for row, ms in stretches:
        sums[row] += ms
    return sums


def _owners(steps: Iterable[int]) -> Iterator[int]:
    """Who owns the time after each step: a row is entered, or the innermost one is left."""
    stack: list[int] = []
    row = _UNATTRIBUTED
    for step in steps:
        if step == _LEFT:
            row = stack.pop()
        else:
            stack.append(row)
            row = step
        yield row
    assert not stack, f"the chunk ended inside '{_ROWS[row]}'"


class CpuRecorder:
    """Reads a clock; exact for work that has ended when its mark ends, as on a CPU."""

    __slots__ = ("_clock", "_log", "_marks", "region")

    def __init__(self, clock: Clock = perf_counter_ns) -> None:
        self._clock = clock
        # Step and moment in turn, between the moments of begin and end: no object is made for a mark but its moment.
        self._log: list[int] = []
        self._marks = _cpu_marks(self._log.append, clock)
        # The look-up itself is the method: no Python frame of ours lies between a mark and its clock.
        self.region: Callable[[str], AbstractContextManager[None]] = self._marks.__getitem__
        self.begin()

    def begin(self) -> None:
        self._log.clear()
        self._log.append(self._clock())

    def end(self) -> None:
        self._log.append(self._clock())

    def marks(self) -> int:
        return self._log.count(_LEFT)

    def stretches(self) -> list[Stretch]:
        if len(self._log) < 2:
            return []
        moments = [*self._log[:-1:2], self._log[-1]]
        rows = [_UNATTRIBUTED, *_owners(self._log[1:-1:2])]
        return [(row, (b - a) / _NS_PER_MS) for row, (a, b) in zip(rows, pairwise(moments), strict=True)]


def _cpu_marks(note: Callable[[int], None], clock: Clock) -> dict[str, AbstractContextManager[None]]:
    """A mark per row. Names of an enclosing function are the cheapest to look up, so marks are made inside of one."""

    class Mark:
        __slots__ = ("_row",)

        def __init__(self, row: int) -> None:
            self._row = row

        def __enter__(self) -> None:
            note(self._row)
            note(clock())

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            note(_LEFT)
            note(clock())

    return {name: Mark(row) for row, name in enumerate(_ROWS)}


class CudaRecorder:
    """One event on the stream wherever a mark begins or ends, read after the end of the chunk.

    The time between two neighbouring events is the device's, waiting for the next launch included: where Python is too
    slow to keep the device busy, the row that waits shows it. Events are kept and recorded again in the next chunk.
    """

    __slots__ = ("_events", "_marks", "_steps", "_stream", "region")

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events: list[torch.cuda.Event] = []
        self._marks = {name: _CudaMark(self, row) for row, name in enumerate(_ROWS)}
        self.region: Callable[[str], AbstractContextManager[None]] = self._marks.__getitem__
        self._steps: list[int] = []

    def begin(self) -> None:
        self._steps = []
        self._event(0)

    def end(self) -> None:
        self._event(len(self._steps) + 1)
        self._stream.synchronize()

    def marks(self) -> int:
        return self._steps.count(_LEFT)

    def stretches(self) -> list[Stretch]:
        if not self._events:
            return []
        rows = [_UNATTRIBUTED, *_owners(self._steps)]
        return [(row, self._events[n].elapsed_time(self._events[n + 1])) for n, row in enumerate(rows)]

    def note(self, step: int) -> None:
        """A row is entered or, `_LEFT`, left: an event now."""
        self._steps.append(step)
        self._event(len(self._steps))

    def _event(self, index: int) -> None:
        if index == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[index].record(self._stream)


class _CudaMark:
    __slots__ = ("_recorder", "_row")

    def __init__(self, recorder: CudaRecorder, row: int) -> None:
        self._recorder, self._row = recorder, row

    def __enter__(self) -> None:
        self._recorder.note(self._row)

    def __exit__(self, *_: object) -> None:
        self._recorder.note(_LEFT)


def recorder_for(device: torch.device, clock: Clock = perf_counter_ns) -> ChunkRecorder:
    """The recorder for work on `device`; a GPU's events are its clock."""
    return CudaRecorder(device) if device.type == "cuda" else CpuRecorder(clock)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(work: Callable[[], object], device: torch.device, clock: Clock = perf_counter_ns) -> float:
    """Milliseconds that `work` took, nothing installed."""
    synchronise(device)
    start = clock()
    work()
    synchronise(device)
    return (clock() - start) / _NS_PER_MS


def measure(
    work: Callable[[], object],
    model: nn.Module,
    device: torch.device,
    clock: Clock = perf_counter_ns,
    recorder: ChunkRecorder | None = None,
) -> Breakdown:
    """Run `work`, one chunk, and say where its time went; calls of `model` in it are passes.

    `recorder`: one of the same device and clock to use again, for its events are made once.
    """
    recorder = recorder or recorder_for(device, clock)

    def recorded() -> None:
        recorder.begin()
        work()
        recorder.end()

    with recording(recorder), ExitStack() as hooks:
        gap = recorder.region(_GAP)
        for handle in _around(model, gap.__enter__, lambda: gap.__exit__(None, None, None)):
            hooks.callback(handle.remove)
        wall = stopwatch(recorded, device, clock)
    *components, unattributed = spent(recorder.stretches())
    return Breakdown(dict(zip(_ROWS, components, strict=True)), unattributed, wall)


def _around(model: nn.Module, before: Callable[[], Any], after: Callable[[], Any]) -> list[Any]:
    """Handles of hooks that run when a pass begins and when it ends, also by an exception."""

    def begin(*_: object) -> None:
        before()

    def end(*_: object) -> None:
        after()

    return [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
