"""Time of every block of the model over one chunk, by a clock around it: which layers cost what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.profile.recorder import Clock

_NS_PER_MS = 1e6


class _BlockClock:
    """Moments at which one block began and ended."""

    def __init__(self, block: nn.Module, now: Callable[[], Any]):
        self.moments: list[Any] = []
        self._handles = [
            block.register_forward_pre_hook(lambda *_: self.moments.append(now())),
            block.register_forward_hook(lambda *_: self.moments.append(now())),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def total(self, span: Callable[[Any, Any], float]) -> float:
        return sum(span(a, b) for a, b in zip(self.moments[::2], self.moments[1::2], strict=True))


def block_times(work: Callable[[], object], model: CausalWanDiT, clock: Clock) -> list[float]:
    """Milliseconds that each block took while `work` ran, all its passes together; zeros where none was called."""
    device, cuda = model.device, model.device.type == "cuda"

    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record(torch.cuda.current_stream(device))
        return made

    clocks = [_BlockClock(block, event if cuda else clock) for block in model.layers()]
    with ExitStack() as hooks:
        for each in clocks:
            hooks.callback(each.remove)
        work()
    if cuda:
        torch.cuda.synchronize(device)
        return [each.total(lambda a, b: float(a.elapsed_time(b))) for each in clocks]
    return [each.total(lambda a, b: (b - a) / _NS_PER_MS) for each in clocks]
