"""What comes before the steady state: the very first chunk, the time to the first frame, warm-up and transition.

A real stream is opened twice. The first one is cold: it meets whatever this configuration does once in a process
(packing weights, choosing kernels, compiling), and it runs on through warm-up and transition, every chunk recorded, so
that the statistics and the solve have rows of their own. The second one is what a user waits for in a process that is
already serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.avatar.stream import stand_in_scene
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.breakdown import Breakdown
from ispa_deploy.profile.recorder import Clock, measure, stopwatch
from ispa_deploy.regions import ROWS
from ispa_deploy.stream import Chunk, Stream

AFTER = 2
"""Chunks past the transition that are still recorded: memory must be seen to stay down."""


@dataclass
class Start:
    """Times in ms. `chunks`: one row per chunk of the cold stream; `rows`: its breakdown, opening included."""

    open_ms: float
    first_chunk_ms: float
    first_frame_ms: float
    chunks: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, float] = field(default_factory=dict)
    unattributed_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; rows in which no time was spent are left out."""
        spent = [{"row": row, "ms": ms} for row, ms in self.rows.items() if ms]
        times = {name: getattr(self, name) for name in ("open_ms", "first_chunk_ms", "first_frame_ms")}
        transition = next((chunk["ms"] for chunk in self.chunks if chunk["state"] == "transition"), None)
        return {
            **times,
            "transition_ms": transition,
            "rows": spent,
            "unattributed_ms": self.unattributed_ms,
            "chunks": self.chunks,
        }


def measure_start(
    model: CausalWanDiT, options: StreamOptions, clock: Clock, decoder: Callable[[Tensor], Tensor] | None = None
) -> Start:
    """A cold stream through its transition (one chunk only where there is none), then the first frame of a warm one."""
    spec, device = model.spec, model.device
    text = torch.randn(1, spec.text_len, spec.text_dim, device=device)
    first = spec.first_chunk_frames or spec.chunk_frames
    opened: list[Stream] = []

    def open_one(frames: int) -> None:
        scene = stand_in_scene(spec, frames) if spec.audio_blocks else None
        opened.append(open_stream(model, text, replace(options, frames=frames), decoder=decoder, scene=scene))

    frames = _frames(model, options, first)
    opening = measure(lambda: open_one(frames), model, device, clock)
    found = Start(opening.wall, 0.0, 0.0)
    _add(found, opening)
    stream = opened[-1]
    for chunk, record in _recorded(stream, clock):
        _add(found, record)
        found.chunks.append(_row(stream, chunk, record, found.chunks))
    found.first_chunk_ms = found.chunks[0]["ms"]
    found.first_frame_ms = stopwatch(lambda: open_one(first), device, clock)
    found.first_frame_ms += stopwatch(lambda: list(opened[-1]), device, clock)
    return found


def _frames(model: CausalWanDiT, options: StreamOptions, first: int) -> int:
    """Long enough for the transition and what follows it; a model without a rolling window ends before."""
    if not options.policy_value().localises:
        return first
    wanted = options.settings().begun(model.spec) + AFTER * model.spec.chunk_frames
    return wanted if model.spec.rolls else min(wanted, model.spec.window_frames)


def _recorded(stream: Stream, clock: Clock) -> Iterator[tuple[Chunk, Breakdown]]:
    """Every chunk of the stream with its breakdown."""
    chunks, model, made = iter(stream), stream.model, list[Chunk]()
    for _ in stream.chunks:
        record = measure(lambda: made.append(next(chunks)), model, model.device, clock)
        yield made[-1], record
    assert next(chunks, None) is None  # the session ends with the iteration: layers carry their own weights again


def _add(found: Start, record: Breakdown) -> None:
    for row in ROWS:
        found.rows[row] = found.rows.get(row, 0.0) + record.components[row]
    found.unattributed_ms += record.unattributed


def _row(stream: Stream, chunk: Chunk, record: Breakdown, before: list[dict[str, Any]]) -> dict[str, Any]:
    """What a chunk took and what was held after it. `state`: `warm-up`, `transition`, `steady` or `full`."""
    absorber = stream.absorber
    after = absorber.state == "absorbed"
    changed = after and (not before or before[-1]["state"] == "warm-up")
    state = "transition" if changed else "steady" if after else absorber.state
    return {
        "state": state,
        "frames": chunk.frames,
        "ms": record.wall,
        "statistics_ms": record.components["overhead.statistics"],
        "solve_ms": record.components["overhead.solve"],
        "kv_persistent": stream.cache.persistent_bytes(),
        "kv_scratch": stream.cache.scratch_bytes(),
        "deltas": absorber.delta_bytes(),
        "statistics": absorber.statistics_bytes(),
    }
