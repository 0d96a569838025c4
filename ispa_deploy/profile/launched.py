"""Steady streams whose work reaches the device otherwise than one kernel at a time: compiled, or as CUDA graphs.

Marks are lost inside of both (under a recorder they step aside and everything runs eagerly), so such a run is recorded
by a trace of its kernels: `Configuration.traced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ispa_deploy.compiled import compile_, eager_
from ispa_deploy.graphs import PassGraphs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.steady import SteadyStream
from ispa_deploy.stream import Chunk

_WARM = 3
"""Chunks before anything is timed: a pass is compiled in its first, a graph is recorded when a form comes again."""


@dataclass(frozen=True)
class Launched:
    """A steady stream with something switched on in its turn and off after it: models are shared with other runs."""

    steady: SteadyStream
    switch: Callable[[CausalWanDiT], None]
    how: Callable[[], tuple[str, str]]

    @contextmanager
    def turn(self) -> Iterator[None]:
        model = self.steady.stream.model
        with self.steady.turn():
            self.switch(model)
            try:
                yield
            finally:
                eager_(model)

    def step(self) -> Chunk:
        return self.steady.step()

    def facts(self) -> dict[str, Any]:
        """As `SteadyStream.facts`; `launch` says what ran, `failure` why it did not."""
        launch, failure = self.how()
        return {**self.steady.facts(), "launch": launch, "failure": failure}

    def layers(self) -> list[dict[str, Any]]:
        return self.steady.layers()


def compiled(model: CausalWanDiT, options: StreamOptions, chunks: int) -> Launched:
    """An opener: the layers' work between attentions under `torch.compile`."""
    from torch._inductor import config  # it loads the compiler: a second that other runs need not wait for

    steady = SteadyStream.open(model, options, chunks + _WARM)
    stages = compile_(model)
    eager_(model)

    def switch(model: CausalWanDiT) -> None:
        for block in model.layers():
            block.compiled = stages

    with config.patch({"cpp.enable_kernel_profile": True}):  # else the profiler sees no kernel of a CPU's graphs
        return _warmed(Launched(steady, switch, lambda: (stages.describe(), stages.failure)))


def graphed(model: CausalWanDiT, options: StreamOptions, chunks: int) -> Launched:
    """An opener: every pass replayed as one CUDA graph. InputError where passes cannot be recorded."""
    steady = SteadyStream.open(model, options, chunks + _WARM)
    graphs = steady.stream.graphs = PassGraphs.on(steady.stream.cache)
    return _warmed(Launched(steady, lambda _: None, lambda: (graphs.describe(), graphs.failure)))


def _warmed(launched: Launched) -> Launched:
    with launched.turn():
        for _ in range(_WARM):
            launched.step()
    return launched
