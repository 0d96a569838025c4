"""The streaming loop: denoise a chunk, commit it, hand it out.

`for chunk in stream:` yields latents, and pixels when a decoder is given. Timing, statistics and cache arithmetic are
not here: regions mark time, the absorber watches, the cache keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.cache import KVCache
from ispa_deploy.context import Context, Encoder
from ispa_deploy.errors import InputError
from ispa_deploy.graphs import PassGraphs
from ispa_deploy.model import CausalWanDiT, Conditioning, TextKV
from ispa_deploy.precision import Widening, widened
from ispa_deploy.regions import region
from ispa_deploy.sampler import ChunkNoise, Sampler, Velocity
from ispa_deploy.specs import ModelSpec

Decoder = Callable[[Tensor], Tensor]
"""Latents of a chunk (B, F, C, H, W) -> pixels (B, F', 3, h, w) in [0, 1]; may keep state between chunks."""
NoiseSource = Callable[[int, int, int], Tensor]
"""Chunk number, frames, pass -> noise (B, F, C, H, W) float32."""


@dataclass(frozen=True)
class Chunk:
    """One AR step: its number, first frame, latents (B, F, C, H, W) float32, and pixels (B, F', 3, h, w) or None."""

    index: int
    start: int
    latents: Tensor
    pixels: Tensor | None

    @property
    def frames(self) -> int:
        return self.latents.shape[1]


def plan_chunks(spec: ModelSpec, frames: int) -> list[tuple[int, int]]:
    """(start, count) of every chunk of a stream of `frames` latent frames."""
    first = spec.first_chunk_frames or spec.chunk_frames
    if frames < first or (frames - first) % spec.chunk_frames:
        raise InputError(
            f"{frames} frames: expected {first} plus a multiple of {spec.chunk_frames} (the chunk of '{spec.name}'); "
            f"nearest is {first + max(0, round((frames - first) / spec.chunk_frames)) * spec.chunk_frames}"
        )
    return [(0, first), *((start, spec.chunk_frames) for start in range(first, frames, spec.chunk_frames))]


@dataclass
class Stream:
    """One video being generated. Iterate once; the absorber's session spans the iteration.

    `rows` (B, L, text_dim) are the first prompt's; `switches` pairs a frame with the rows that hold from the next chunk
    border on; a model that interpolates goes there chunk by chunk. `initial` (B, F, C, H, W) latents are committed
    before generation starts. `commit_last` also runs the clean pass of the last chunk, which only statistics read
    unless the stream is continued. `full_commit` runs clean passes to their end, as upstream; else they stop at the
    last layer that keeps keys of them. `encoder` is the decoder's inverse: a model that re-encodes its past makes the
    first frame of its context with it. `graphs`: passes that come again are replayed. `fine`: linears whose activations
    have 16 bits in the last denoising pass of every chunk.
    """

    model: CausalWanDiT
    cache: KVCache
    absorber: Absorber
    rows: Tensor
    frames: int
    noise: NoiseSource
    sampler: Sampler
    decoder: Decoder | None = None
    switches: Sequence[tuple[int, Tensor]] = ()
    initial: Tensor | None = None
    commit_last: bool = False
    full_commit: bool = False
    encoder: Encoder | None = None
    graphs: PassGraphs | None = None
    fine: Sequence[Widening] = ()

    def __post_init__(self) -> None:
        self.chunks = plan_chunks(self.spec, self.frames)
        self.context = Context(self.spec, self.encoder) if self.spec.reencodes else None
        self._conditions: dict[float, Conditioning] = {}
        self._recalibrate = False
        self._begun = self._finely = False
        self._past = torch.empty(0)
        self._coming: list[Tensor] = []
        self.text = self._encoded(self.rows)
        self.switches = sorted(self.switches, key=lambda switch: switch[0])
        given = 0 if self.initial is None else self.initial.shape[1]
        if given not in {0, *(start + count for start, count in self.chunks)}:
            raise InputError(f"{given} initial frames: expected whole chunks within the stream of {self.frames} frames")

    @property
    def spec(self) -> ModelSpec:
        """The model's, with what this stream changes of it."""
        return self.cache.spec

    def __iter__(self) -> Iterator[Chunk]:
        assert not self._begun, "a stream is iterated once: open another one"
        self._begun = True
        with self.absorber.session():
            for index, (start, count) in enumerate(self.chunks):
                text_before = self.text
                self._follow_prompt(start)
                self.cache.begin(start, count)
                self._encode_context(start, text_before)
                self.absorber.before_chunk(start, count)
                latents = self._latents(index, start, count)
                self._remember(latents)
                last = index + 1 == len(self.chunks)
                if self.context is None and (self.commit_last or not last or self.cache.observer is not None):
                    self._commit(latents, start)
                self.absorber.after_chunk(start + count)
                pixels = self._decode(latents)
                if self.context is not None:
                    self.context.remember(latents, pixels)
                yield Chunk(index, start, latents, pixels)

    def request_recalibration(self) -> None:
        """From the next chunk on: full attention, corrections off, a new warm-up."""
        self._recalibrate = True

    def switch_prompt(self, rows: Tensor) -> None:
        """From the next chunk on: another prompt (B, L, text_dim), and a new warm-up, since the old correction would
        mislead. A model that interpolates gets there in `spec.interpolate` chunks, the first still under the old
        prompt, as upstream; every change begins the warm-up anew."""
        steps, rows = self.spec.interpolate, rows.to(self.rows)
        self._coming = [torch.lerp(self.rows, rows, step / (steps - 1)) for step in range(1, steps)] or [rows]
        if steps > 1:
            self._coming.insert(0, self.rows)

    @torch.inference_mode()
    def _latents(self, index: int, start: int, count: int) -> Tensor:
        """The chunk's clean latents: given ones while `initial` lasts, generated ones after."""
        if self.initial is not None and start < self.initial.shape[1]:
            return self.initial[:, start : start + count].float()
        return self.sampler.denoise(index, self._by_pass(index), lambda step: self.noise(index, count, step))

    def _by_pass(self, index: int) -> Velocity:
        """The chunk's velocities, one denoising pass after another; the last one is the fine one."""
        left = self.sampler.passes(index)

        def velocity(x: Tensor, timestep: float) -> Tensor:
            nonlocal left
            left -= 1
            self._finely = left == 0 and bool(self.fine)
            try:
                with widened(self.fine if self._finely else ()):
                    return self._velocity(x, timestep)
            finally:
                self._finely = False

        return velocity

    def _velocity(self, x: Tensor, timestep: float) -> Tensor:
        velocity = self._pass(x, timestep, self.text)
        self.absorber.after_pass()
        return velocity

    def _pass(self, x: Tensor, timestep: float, text: TextKV, stores: int | None = None) -> Tensor:
        """The model's velocity; of a replayed pass it lies in a buffer, which the next one overwrites."""
        condition = self._condition(timestep)
        if self.graphs is None:
            return self.model(x, condition, text, self.cache, stores)
        return self.graphs.run(self.model, x, timestep, condition, text, self.cache, stores, self._finely)

    @torch.inference_mode()
    def _commit(self, latents: Tensor, start: int) -> None:
        """The clean pass: the chunk's keys and values as later chunks will see them; given latents are clean."""
        given = self.initial is not None and start < self.initial.shape[1]
        self.cache.committing = True
        try:
            self._store(latents, 0.0 if given else self.spec.context_timestep, self.text)
        finally:
            self.cache.committing = False

    def _store(self, latents: Tensor, timestep: float, text: TextKV) -> None:
        """A pass whose velocity nobody reads: as far as layers keep something of it."""
        stores = None if self.full_commit else self.cache.storing_layers()
        if stores != 0:
            self._pass(latents, timestep, text, stores)
            self.absorber.after_pass()

    @torch.inference_mode()
    def _encoded(self, rows: Tensor) -> TextKV:
        return self.model.encode_text(rows)

    def _condition(self, timestep: float) -> Conditioning:
        """Time embedding and modulation, computed once for each of the fixed timesteps."""
        if timestep not in self._conditions:
            with region("overhead.norm"):
                t = torch.full((1, 1), timestep, dtype=torch.float32, device=self.model.device)
                self._conditions[timestep] = self.model.condition(t)
        return self._conditions[timestep]

    def _follow_prompt(self, start: int) -> None:
        due = [rows for frame, rows in self.switches if frame <= start]
        if due:
            self.switches = [(frame, rows) for frame, rows in self.switches if frame > start]
            self.switch_prompt(due[-1])
        if self._coming and (rows := self._coming.pop(0)) is not self.rows:
            self.rows, self.text = rows, self._encoded(rows)
            self._recalibrate = True
        if self._recalibrate:
            self._recalibrate = False
            self.absorber.recalibrate(start)
            self._recache(start)

    @torch.inference_mode()
    def _encode_context(self, start: int, text: TextKV) -> None:
        """The context pass: the past's keys and values made anew, under the text that was shown when it was made."""
        frames = self.context.frames(start) if self.context is not None else ()
        if self.context is None or not frames:
            return
        with self.cache.encoding(frames), self.absorber.resting():
            self._store(self.context.latents(start), self.spec.context_timestep, text)

    def _remember(self, latents: Tensor) -> None:
        """Keep the window's clean latents, for a model whose past is computed anew when the prompt changes."""
        if self.spec.recaches:
            past = torch.cat([self._past, latents], 1) if self._past.numel() else latents
            self._past = past[:, -self.cache.spec.window_frames :]

    @torch.inference_mode()
    def _recache(self, start: int) -> None:
        """One pass over the window's clean latents under the new prompt, so that the past agrees with it."""
        if not self._past.numel():
            return
        with self.cache.again(start - self._past.shape[1], self._past.shape[1]):
            self._store(self._past, self.spec.context_timestep, self.text)

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Tensor | None:
        if self.decoder is None:
            return None
        with region("overhead.decode"):
            return self.decoder(latents)


def default_noise(spec: ModelSpec, seed: int, *, batch: int = 1, device: str | torch.device = "cpu") -> ChunkNoise:
    """Noise of a stream in the spec's own latent shape."""
    return ChunkNoise(seed, (batch, *spec.latent_shape), torch.device(device))
