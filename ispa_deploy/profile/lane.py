"""One configuration of a comparison: its stream, its turns, and what was measured in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.breakdown import Breakdown, typical
from ispa_deploy.profile.environment import peak_rss
from ispa_deploy.profile.recorder import ChunkRecorder, Clock, measure, recorder_for, stopwatch
from ispa_deploy.profile.steady import SteadyStream

Audit = Callable[[nn.Module], list[dict[str, Any]]]
"""What every linear layer of a model really ran, one row each."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run of the report. Configurations may share a model: only one streams at a time.

    `scheme` is the name of what was done to the model's linears, `audit` reports what ran.
    """

    name: str
    model: CausalWanDiT
    options: StreamOptions
    scheme: str = "none"
    audit: Audit | None = None


@dataclass
class Lane:
    """A configuration with its stream and what was measured so far; times in ms."""

    configuration: Configuration
    steady: SteadyStream
    recorder: ChunkRecorder
    plain: list[float] = field(default_factory=list)
    recorded: list[Breakdown] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak: int = 0

    @property
    def run(self) -> Breakdown:
        return typical(self.recorded)


def open_lane(configuration: Configuration, chunks: int, clock: Clock) -> Lane:
    """A lane whose first chunk, with everything that is done once, is behind it."""
    steady = SteadyStream.open(configuration.model, configuration.options, chunks)
    lane = Lane(configuration, steady, recorder_for(configuration.model.device, clock))
    with steady.turn():
        steady.step()
    return lane


def take_turn(
    lane: Lane, chunks: int, *, recorded_first: bool, decoder: Callable[[Tensor], Tensor] | None, clock: Clock
) -> None:
    """`chunks` pairs of a plain and a recorded chunk; who goes first alternates: neither always has the warm caches."""
    steady, model = lane.steady, lane.configuration.model
    with steady.turn():
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
        for number in range(chunks):
            if recorded_first == (number % 2 == 0):
                lane.recorded.append(measure(steady.step, model, model.device, clock, lane.recorder))
                lane.plain.append(stopwatch(steady.step, model.device, clock))
            else:
                lane.plain.append(stopwatch(steady.step, model.device, clock))
                lane.recorded.append(measure(steady.step, model, model.device, clock, lane.recorder))
        lane.peak = max(lane.peak, _transient(model.device, before))
        lane.facts = _facts(lane)
    if decoder is not None:
        latents = torch.randn(1, model.spec.chunk_frames, *model.spec.latent_shape, device=model.device)
        lane.decoding.append(stopwatch(lambda: decoder(latents), model.device, clock))


def keep_log(lane: Lane, clock: Clock) -> None:
    """From now on the lane's recorder also keeps when each mark began and ended."""
    device = lane.configuration.model.device
    if device.type == "cpu":
        lane.recorder = recorder_for(device, clock, log=True)


def _transient(device: torch.device, before: int) -> int:
    """Bytes that the work of a turn took on top of what lay there before it; 0 on a CPU, which keeps no count."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def _facts(lane: Lane) -> dict[str, Any]:
    """What can only be read while the deltas are on the model."""
    configuration, stream = lane.configuration, lane.steady.stream
    cache, absorber = stream.cache, stream.absorber
    memory = {
        "weights": weight_bytes(configuration.model),
        "kv_persistent": cache.persistent_bytes(),
        "kv_scratch": cache.scratch_bytes(),
        "deltas": absorber.delta_bytes(),
        "statistics": lane.steady.statistics_bytes(),
    }
    held = sum(memory[name] for name in ("weights", "kv_persistent", "kv_scratch", "deltas"))
    cuda = configuration.model.device.type == "cuda"
    return {
        "local": len(absorber.local_layers()),
        "delta": lane.steady.delta_mode(),
        # On a CPU: of the whole process with all configurations in it.
        "memory": {**memory, "peak": held + lane.peak if cuda else peak_rss()},
        "kv_percent": 100 * cache.persistent_bytes() / cache.full_bytes(),
        "audit": configuration.audit(configuration.model) if configuration.audit else [],
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; a layer that keeps them packed outside of its state says so by `nbytes`."""
    total = 0
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        packed = getattr(module, "nbytes", None)
        total += packed if isinstance(packed, int) else sum(tensor.nbytes for tensor in own)
    return total
