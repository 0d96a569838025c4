"""Recorders that turn the marks of `ispa_deploy.regions` into the breakdown of a chunk; the innermost mark owns time.

A mark closes the running stretch of time and opens the next, so stretches can neither overlap nor leave a hole. What
lies in no mark is `overhead.python` inside a pass of the model and `unattributed` outside of one. Marks are made once
per row and recorder and used again: entering one allocates nothing but the number on the stack (0.3 us).
"""

from __future__ import annotations

from collections.abc import Callable
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
_GAP = "overhead.python"
_NS_PER_MS = 1e6

Clock = Callable[[], int]
"""Nanoseconds since some fixed moment."""

Stretch = tuple[int, float]
"""Index into `ROWS` (one past the end: unattributed) and the ms for which it owned the time without a break."""

CLOCKS: dict[str, Clock] = {"wall": perf_counter_ns, "cpu": process_time_ns}
"""`cpu` is the CPU time of the process: with one thread, what the wall time would be were the machine not shared."""


class ChunkRecorder(Recorder, Protocol):
    """A recorder that is told where a chunk begins and ends."""

    def begin(self) -> None: ...

    def end(self) -> list[float]:
        """Milliseconds of every row of `ROWS`, in order, and at last of `unattributed`."""
        ...

    def stretches(self) -> list[Stretch]:
        """The chunk that ended last, moment by moment; empty where no log is kept."""
        ...


class CpuRecorder:
    """Reads a clock; exact for work that has ended when its mark ends, as on a CPU.

    With `log` it also keeps when each mark began and ended; without, marks do not even ask whether to.
    """

    __slots__ = ("_clock", "_log", "_marks", "_row", "_since", "_spent", "_stack", "region")

    def __init__(self, clock: Clock = perf_counter_ns, *, log: bool = False) -> None:
        self._clock = clock
        self._log: list[tuple[int, int]] = []
        mark = _LoggedCpuMark if log else _CpuMark
        self._marks = {name: mark(self, row) for row, name in enumerate(_ROWS)}
        # The look-up itself is the method: no Python frame of ours lies between a mark and its clock.
        self.region: Callable[[str], AbstractContextManager[None]] = self._marks.__getitem__
        self.begin()

    def begin(self) -> None:
        self._spent = [0] * (_UNATTRIBUTED + 1)
        self._stack: list[int] = []
        self._row = _UNATTRIBUTED
        self._log.clear()
        self._since = self._clock()
        self._note()

    def end(self) -> list[float]:
        now = self._clock()
        self._spent[self._row] += now - self._since
        self._since = now
        self._note()
        assert not self._stack, f"the chunk ended inside '{_ROWS[self._row]}'"
        return [ns / _NS_PER_MS for ns in self._spent]

    def stretches(self) -> list[Stretch]:
        if len(self._log) <= 2:  # only begin and end: the marks keep no log
            return []
        return [(row, (after - since) / _NS_PER_MS) for (row, since), (_, after) in pairwise(self._log)]

    def _note(self) -> None:
        self._log.append((self._row, self._since))


class _CpuMark:
    __slots__ = ("_clock", "_mine", "_recorder")

    def __init__(self, recorder: CpuRecorder, row: int) -> None:
        self._recorder, self._mine, self._clock = recorder, row, recorder._clock

    def __enter__(self) -> None:
        now = self._clock()
        recorder = self._recorder
        recorder._spent[recorder._row] += now - recorder._since
        recorder._stack.append(recorder._row)
        recorder._row, recorder._since = self._mine, now

    def __exit__(self, *_: object) -> None:
        now = self._clock()
        recorder = self._recorder
        recorder._spent[recorder._row] += now - recorder._since
        recorder._row, recorder._since = recorder._stack.pop(), now


class _LoggedCpuMark(_CpuMark):
    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._recorder._note()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._recorder._note()


class CudaRecorder:
    """One event on the stream wherever a mark begins or ends, read after one synchronisation at the end of the chunk.

    The time between two neighbouring events is the device's, waiting for the next launch included: where Python is too
    slow to keep the device busy, the row that waits shows it. Events are kept and recorded again in the next chunk.
    """

    __slots__ = ("_events", "_marks", "_owners", "_row", "_stack", "_stream", "_stretches", "region")

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events: list[torch.cuda.Event] = []
        self._marks = {name: _CudaMark(self, row) for row, name in enumerate(_ROWS)}
        self.region: Callable[[str], AbstractContextManager[None]] = self._marks.__getitem__
        self._owners: list[int] = []
        self._stretches: list[Stretch] = []
        self._stack: list[int] = []
        self._row = _UNATTRIBUTED

    def begin(self) -> None:
        self._owners, self._stack, self._row = [], [], _UNATTRIBUTED
        self._note()

    def end(self) -> list[float]:
        assert not self._stack, f"the chunk ended inside '{_ROWS[self._row]}'"
        self._note()
        self._stream.synchronize()
        self._stretches = [
            (row, self._events[index].elapsed_time(self._events[index + 1]))
            for index, row in enumerate(self._owners[:-1])
        ]
        spent = [0.0] * (_UNATTRIBUTED + 1)
        for row, ms in self._stretches:
            spent[row] += ms
        return spent

    def stretches(self) -> list[Stretch]:
        return list(self._stretches)

    def _note(self) -> None:
        """An event now; the row in force owns the time from here to the next one."""
        index = len(self._owners)
        if index == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[index].record(self._stream)
        self._owners.append(self._row)

    def _enter(self, row: int) -> None:
        self._stack.append(self._row)
        self._row = row
        self._note()

    def _leave(self) -> None:
        self._row = self._stack.pop()
        self._note()


class _CudaMark:
    __slots__ = ("_mine", "_recorder")

    def __init__(self, recorder: CudaRecorder, row: int) -> None:
        self._recorder, self._mine = recorder, row

    def __enter__(self) -> None:
        self._recorder._enter(self._mine)

    def __exit__(self, *_: object) -> None:
        self._recorder._leave()


def recorder_for(device: torch.device, clock: Clock = perf_counter_ns, *, log: bool = False) -> ChunkRecorder:
    """The recorder for work on `device`; a GPU's events are its clock and, at no further cost, its log."""
    return CudaRecorder(device) if device.type == "cuda" else CpuRecorder(clock, log=log)


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
    recorder, spent = recorder or recorder_for(device, clock), [0.0]

    def recorded() -> None:
        nonlocal spent
        recorder.begin()
        work()
        spent = recorder.end()

    with recording(recorder), ExitStack() as hooks:
        gap = recorder.region(_GAP)
        for handle in _around(model, gap.__enter__, lambda: gap.__exit__(None, None, None)):
            hooks.callback(handle.remove)
        wall = stopwatch(recorded, device, clock)
    *components, unattributed = spent
    return Breakdown(dict(zip(_ROWS, components, strict=True)), unattributed, wall)


def _around(model: nn.Module, before: Callable[[], Any], after: Callable[[], Any]) -> list[Any]:
    """Handles of hooks that run when a pass begins and when it ends, also by an exception."""

    def begin(*_: object) -> None:
        before()

    def end(*_: object) -> None:
        after()

    return [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
