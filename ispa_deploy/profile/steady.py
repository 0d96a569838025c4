"""A stream in its steady state, made at once: full windows of random keys and values, a transition with random deltas.

Latency depends on shapes, not on values, so there is no need to generate a warm-up in order to time what follows it.
Everything timed is the real thing: the stream's own loop, cache, sampler and clean pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.avatar.cache import AvatarLayer
from ispa_deploy.avatar.stream import AvatarStream, stand_in_scene
from ispa_deploy.delta import Delta
from ispa_deploy.layercache import WindowCache
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.precision import last_pass_layers
from ispa_deploy.sampler import Sampler, Schedule
from ispa_deploy.stream import Chunk, Stream

_DELTA_SCALE = 1e-3  # of the order of real ones: quantising (W + dW) must not meet outliers


@dataclass
class SteadyStream:
    """A stream past its transition. `turn()` lends the model its deltas, `step()` generates the next chunk."""

    stream: Stream
    _chunks: Iterator[Chunk]

    @staticmethod
    def open(model: CausalWanDiT, options: StreamOptions, chunks: int, *, seed: int = 0) -> SteadyStream:
        """A stream that can still generate `chunks` chunks, the first of them short: it warms up what is done once.

        No deltas are on the model until `turn`.
        """
        spec = model.spec
        generator = torch.Generator(model.device).manual_seed(seed)
        text = torch.randn(1, spec.text_len, spec.text_dim, generator=generator, device=model.device)
        frames = spec.first_chunk_frames or spec.chunk_frames
        scene = stand_in_scene(spec, frames) if spec.audio_blocks else None
        stream = open_stream(model, text, replace(options, frames=frames), scene=scene)
        start = _fill(stream, generator)
        stream.absorber.adopt(_deltas(stream, generator) if stream.absorber.policy.localises else {})
        _take_back(stream)
        # Chunks as in mid-stream, all committed; but the first, which only warms up, takes one denoising pass. Where
        # each step has keys of its own, it takes all.
        if scene is None:
            stream.sampler = Sampler(stream.sampler.schedule, first=Schedule.few_step(spec.steps[:1], spec.shift))
        stream.chunks = [(start + n * spec.chunk_frames, spec.chunk_frames) for n in range(chunks)]
        stream.commit_last = True
        return SteadyStream(stream, iter(stream))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let this stream run: configurations share models, and corrections belong to one stream each."""
        absorber = self.stream.absorber
        for layer, delta in absorber.deltas.items():
            absorber.targets[layer].set_delta(delta, absorber.mode)
        try:
            yield
        finally:
            _take_back(self.stream)

    def step(self) -> Chunk:
        """The next chunk: denoising passes and the clean pass."""
        return next(self._chunks)

    def facts(self) -> dict[str, Any]:
        """What can only be read while it is this stream's turn; memory in bytes, of the stream alone."""
        cache, absorber = self.stream.cache, self.stream.absorber
        beside = cache.condition_tokens / cache.frame_tokens
        sink = (beside or 1) if absorber.policy.sink else 0
        return {
            "localises": absorber.policy.localises,
            "local": absorber.local_layers(),
            "near": sink + cache.recent + cache.spec.chunk_frames,
            "window": cache.spec.window_frames + beside if beside else cache.spec.window_frames,
            "wide_layers": len(last_pass_layers(cache.spec.layers)) if self.stream.fine else 0,
            "stores": None if self.stream.full_commit else cache.storing_layers(),
            "delta": self.delta_mode(),
            "coded_attention": cache.coded_attention.report() if cache.coded_attention else None,
            "complaints": cache.coded_attention.complaints() if cache.coded_attention else [],
            "kv_percent": 100 * cache.persistent_bytes() / cache.full_bytes(),
            "memory": {
                "kv_persistent": cache.persistent_bytes(),
                "kv_scratch": cache.scratch_bytes(),
                "deltas": absorber.delta_bytes(),
                "statistics": self.statistics_bytes(),
            },
        }

    def layers(self) -> list[dict[str, Any]]:
        """What each layer is and holds: `local`, how its delta runs, bytes of its keys and values and of its delta."""
        cache, targets = self.stream.cache, self.stream.absorber.targets
        return [
            {
                "local": cache.is_local(layer),
                "delta": target.delta_mode,
                "kv_persistent": cache.layer_bytes(layer),
                "deltas": target.delta_nbytes(),
            }
            for layer, target in enumerate(targets)
        ]

    def delta_mode(self) -> str | None:
        """The mode that really runs, while it is this stream's turn."""
        layers = self.stream.absorber.local_layers()
        return self.stream.absorber.targets[layers[0]].delta_mode if layers else None

    def statistics_bytes(self) -> int:
        """Bytes that the warm-up's statistics hold until the transition frees them."""
        absorber, spec = self.stream.absorber, self.stream.model.spec
        if not absorber.policy.localises or not absorber.needs_statistics():
            return 0
        kind = torch.float64 if absorber.settings.double else torch.float32
        one = Statistics(torch.empty(spec.dim, spec.dim, device="meta"), dtype=kind).nbytes()
        return (2 if absorber.settings.ranking == "heldout" else 1) * spec.layers * one


def _fill(stream: Stream, generator: torch.Generator) -> int:
    """Fill every window with random keys and values; the first frame of the next chunk."""
    cache, spec = stream.cache, stream.cache.spec
    start, count = 0, spec.first_chunk_frames or spec.chunk_frames
    while start < spec.window_frames:
        cache.begin(start, count)
        start, count = start + count, spec.chunk_frames
    rings = [layer.ring for layer in cache._layers if isinstance(layer, AvatarLayer)]
    for part in (part for ring in rings for part in (ring.k, ring.v)):
        part.normal_(generator=generator)
    if isinstance(stream, AvatarStream):
        stream.prefill()
    windows = [layer for layer in cache._layers if isinstance(layer, WindowCache)]
    for store in (store for layer in windows for store in (layer.k, layer.v)):
        for slot in range(spec.window_frames):
            shape = store.frame(slot).shape
            store.put(slot, torch.randn(shape, generator=generator, device=cache.device))
    if stream.context is not None:
        past = (cache.batch, spec.context_frames, *spec.latent_shape)
        stream.context.remember(torch.randn(past, generator=generator, device=cache.device), None)
    return start


def _deltas(stream: Stream, generator: torch.Generator) -> dict[int, Delta | None]:
    """Random corrections for as many layers as the options ask for; None for each under a policy that makes none."""
    absorber, spec = stream.absorber, stream.model.spec
    layers = absorber.choice.layers or range(absorber.choice.count(spec.layers))
    device = stream.model.device
    if not absorber.policy.absorbs:
        return dict.fromkeys(layers)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(_DELTA_SCALE)

    return {
        layer: Delta(
            random(spec.dim, spec.dim).to(absorber.dtype), random(spec.dim) if absorber.settings.intercept else None
        )
        for layer in layers
    }


def _take_back(stream: Stream) -> None:
    for target in stream.absorber.targets:
        target.set_delta(None)
