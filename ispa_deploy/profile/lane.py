"""One configuration of a comparison: its stream, its turns, and what was measured in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ispa_deploy.memory import weight_bytes
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.breakdown import Breakdown, typical
from ispa_deploy.profile.environment import peak_rss, resident, restart_peak
from ispa_deploy.profile.interval import ENOUGH
from ispa_deploy.profile.kernels import measure_kernels
from ispa_deploy.profile.layers import block_calls, layer_times
from ispa_deploy.profile.price import Price, block_ratios, mark_price, price_of
from ispa_deploy.profile.recorder import ChunkRecorder, Clock, measure, recorder_for, stopwatch
from ispa_deploy.profile.start import Start, measure_start
from ispa_deploy.profile.steady import SteadyStream

Audit = Callable[[nn.Module], list[dict[str, Any]]]
"""What every linear layer of a model really ran, one row each."""


class Steady(Protocol):
    """A stream past its transition: `SteadyStream`, or another loop that a bench sets beside ours."""

    def turn(self) -> AbstractContextManager[None]:
        """Let this stream run: models are shared."""
        ...

    def step(self) -> object:
        """Generate the next chunk."""
        ...

    def facts(self) -> dict[str, Any]:
        """As `SteadyStream.facts`."""
        ...

    def layers(self) -> list[dict[str, Any]]:
        """As `SteadyStream.layers`."""
        ...


Opener = Callable[[CausalWanDiT, StreamOptions, int], Steady]
"""A model, options and how many chunks will be asked for -> a stream that stands ready."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run of the report. Configurations may share a model: only one streams at a time.

    `scheme` is the name of what was done to the model's linears, `audit` reports what ran and `complaints` what did
    not run as it was asked for. `starts`: whether cold start, warm-up and transition are measured as well.
    `traced`: rows come from kernels by name, for a compiled model, in which marks are lost.
    """

    name: str
    model: CausalWanDiT
    options: StreamOptions
    scheme: str = "none"
    audit: Audit | None = None
    complaints: Callable[[nn.Module], list[str]] | None = None
    opener: Opener = SteadyStream.open
    starts: bool = True
    traced: bool = False


@dataclass
class Lane:
    """A configuration with its stream and what was measured so far; times in ms."""

    configuration: Configuration
    steady: Steady
    recorder: ChunkRecorder
    plain: list[float] = field(default_factory=list)
    recorded: list[Breakdown] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    start: Start | None = None
    layer_ms: list[float] = field(default_factory=list)
    block_ratios: list[float] = field(default_factory=list)
    mark_ns: float | None = None
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    transient: int | None = None
    peak: int = 0

    @property
    def run(self) -> Breakdown:
        return typical(self.recorded)

    @property
    def price(self) -> Price:
        """Of recording: by blocks where enough of them were compared, else by whole chunks."""
        marks, chunk = self.recorder.marks(), min(self.plain)  # a mark's price is the least seen, too
        if len(self.block_ratios) >= ENOUGH:
            return price_of(self.block_ratios, "blocks", marks, self.mark_ns, chunk)
        pairs = zip(self.recorded, self.plain, strict=False)
        return price_of([a.wall / b for a, b in pairs], "chunks", marks, self.mark_ns, chunk)


def open_lane(
    configuration: Configuration, chunks: int, clock: Clock, decoder: Callable[[Tensor], Tensor] | None = None
) -> Lane:
    """A lane whose first chunk, with everything that is done once, is behind it."""
    model, options = configuration.model, configuration.options
    start = measure_start(model, options, clock, decoder) if configuration.starts else None
    steady = configuration.opener(model, options, chunks)
    lane = Lane(configuration, steady, recorder_for(model.device, clock), start=start)
    with steady.turn():
        steady.step()
    return lane


def take_turn(
    lane: Lane, chunks: int, *, recorded_first: bool, decoder: Callable[[Tensor], Tensor] | None, clock: Clock
) -> None:
    """`chunks` pairs of a plain and a recorded chunk; who goes first alternates: neither always has the warm caches."""
    steady, model = lane.steady, lane.configuration.model
    with steady.turn(), _counting(lane):
        before = held_before(model.device)
        for number in range(chunks):
            if recorded_first == (number % 2 == 0):
                lane.recorded.append(_record(lane, clock))
                lane.plain.append(stopwatch(steady.step, model.device, clock))
            else:
                lane.plain.append(stopwatch(steady.step, model.device, clock))
                lane.recorded.append(_record(lane, clock))
        _note_peak(lane, model.device, before)
    if decoder is not None:
        latents = torch.randn(1, model.spec.chunk_frames, *model.spec.latent_shape, device=model.device)
        lane.decoding.append(stopwatch(lambda: decoder(latents), model.device, clock))


def _record(lane: Lane, clock: Clock) -> Breakdown:
    """The next chunk, by marks or by kernels."""
    model, step = lane.configuration.model, lane.steady.step
    if lane.configuration.traced:
        return measure_kernels(step, model.device, clock)
    return measure(step, model, model.device, clock, lane.recorder)


def take_plain_turn(lane: Lane, chunks: int, *, clock: Clock) -> None:
    """`chunks` chunks with nothing installed."""
    device = lane.configuration.model.device
    with lane.steady.turn():
        lane.plain += [stopwatch(lane.steady.step, device, clock) for _ in range(chunks)]


def record_blocks(lane: Lane, clock: Clock, most: int) -> None:
    """Chunks with a clock around every block, for the table by layers and the price of recording, and for nothing else.

    One chunk tells what each layer takes. Pairs of chunks follow, one to `most` of them, until the price is known.
    """
    configuration, device = lane.configuration, lane.configuration.model.device
    model, recorder = configuration.model, recorder_for(device, clock)
    if device.type == "cpu" and not configuration.traced:
        lane.mark_ns = mark_price(recorder, clock)
    with lane.steady.turn():
        lane.layer_ms = layer_times(block_calls(lane.steady.step, model, clock), model.spec.layers)
        if configuration.traced or not any(lane.layer_ms):
            return
        for _ in range(most):
            even, odd = (block_calls(lane.steady.step, model, clock, recorder, first) for first in (0, 1))
            lane.block_ratios += block_ratios(even, odd)
            if lane.price.holds() != "open":
                break


def held_before(device: torch.device) -> int | None:
    """Bytes held now, and the device's memory of its highest forgotten; None where the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident() if restart_peak() else None


def _note_peak(lane: Lane, device: torch.device, before: int | None) -> None:
    """What the chunks of a turn took on top of `before`, and the highest that was held."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    lane.peak = max(lane.peak, peak)
    if before is not None:
        lane.transient = max(lane.transient or 0, peak - before)


def _facts(lane: Lane) -> dict[str, Any]:
    """What can only be read while the deltas are on the model."""
    configuration, facts = lane.configuration, lane.steady.facts()
    memory = {"weights": weight_bytes(configuration.model), **facts["memory"], "transient": lane.transient}
    held = sum(memory[name] for name in ("weights", "kv_persistent", "kv_scratch", "deltas"))
    cuda = configuration.model.device.type == "cuda"
    return {
        **facts,
        # A GPU's counter covers all configurations, so what this one holds is summed up; a CPU's is the process's.
        "memory": {**memory, "peak": held + (lane.transient or 0) if cuda else lane.peak},
        "layers": lane.steady.layers(),
        "audit": [_counted(row, lane.calls) for row in _audit(configuration)],
    }


_COUNTS = ("calls", "wide_calls", "float_calls")


def _audit(configuration: Configuration) -> list[dict[str, Any]]:
    return configuration.audit(configuration.model) if configuration.audit else []


@contextmanager
def _counting(lane: Lane) -> Iterator[None]:
    """Add to the lane's counts how often each layer's kernel runs in the body: models, and their counts, are shared."""
    before = _audit(lane.configuration)
    yield
    for old, new in zip(before, _audit(lane.configuration), strict=True):
        lane.calls.update({(new["name"], kind): (new[kind] or 0) - (old[kind] or 0) for kind in _COUNTS})
    lane.facts = _facts(lane)


def _counted(row: dict[str, Any], calls: Counter[tuple[str, str]]) -> dict[str, Any]:
    return {**row, **{kind: None if row[kind] is None else calls[row["name"], kind] for kind in _COUNTS}}
