"""Time of every block of the model over one chunk, by a clock around it: which layers cost what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.profile.recorder import ChunkRecorder, Clock
from ispa_deploy.regions import install

_NS_PER_MS = 1e6

BlockCall = tuple[int, float]
"""A block's number and the milliseconds of one call of it."""


def block_calls(
    work: Callable[[], object],
    model: CausalWanDiT,
    clock: Clock,
    recorder: ChunkRecorder | None = None,
    first: int = 0,
) -> list[BlockCall]:
    """Every call of a block of `model` while `work` runs, in order.

    With a `recorder`, every second call from the one numbered `first` on is recorded, and nothing else.
    """
    device = model.device
    now: Callable[[], Any] = _event(device) if device.type == "cuda" else clock
    numbers: list[int] = []
    moments: list[Any] = []

    def before(number: int) -> None:
        if recorder is not None and len(numbers) % 2 == first:
            install(recorder)
        numbers.append(number)
        moments.append(now())

    def after() -> None:
        moments.append(now())
        install(None)

    if recorder is not None:
        recorder.begin()
    with ExitStack() as hooks:
        hooks.callback(install, None)
        for number, block in enumerate(model.layers()):
            hooks.callback(block.register_forward_pre_hook(lambda *_, n=number: before(n)).remove)
            hooks.callback(block.register_forward_hook(lambda *_: after()).remove)
        work()
    span = _span(device)
    pairs = zip(moments[::2], moments[1::2], strict=True)
    return [(number, span(begun, ended)) for number, (begun, ended) in zip(numbers, pairs, strict=True)]


def layer_times(calls: Sequence[BlockCall], layers: int) -> list[float]:
    """Milliseconds of each of `layers` blocks, all its calls together; zeros where none was called."""
    sums = [0.0] * layers
    for number, ms in calls:
        sums[number] += ms
    return sums


def _event(device: torch.device) -> Callable[[], torch.cuda.Event]:
    def made() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return made


def _span(device: torch.device) -> Callable[[Any, Any], float]:
    if device.type != "cuda":
        return lambda begun, ended: (ended - begun) / _NS_PER_MS
    torch.cuda.synchronize(device)
    return lambda begun, ended: float(begun.elapsed_time(ended))
