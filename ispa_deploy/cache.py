"""All keys and values of one stream: which layer holds what, where the current chunk is written, what a query sees.

Legend: B batch, T tokens of a frame, S = F * T tokens of the current chunk, H heads, D head width.
Everything is allocated up front; no pass concatenates. What one layer holds, a window or frame 0, is in `layercache`.

The model hands over queries and keys before rotation. With `rope = absolute` keys are stored rotated; with `window`
they are stored as they come and rotated on every read at their slot in the window, into the same shared scratch. A
model that encodes its past anew before every chunk (`reencodes`) stores them rotated at that slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ispa_deploy.attention import attend
from ispa_deploy.attention_int8 import CodedAttention
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.kvstore import CodedStore, Layout, Store, coders
from ispa_deploy.layercache import LayerCache, LocalCache, Observer, WindowCache
from ispa_deploy.regions import region
from ispa_deploy.rope import Rope, rotate
from ispa_deploy.slots import WindowSlots, split_past
from ispa_deploy.specs import ModelSpec

ATTENTION_DTYPES = ("auto", "int8")


class KVCache:
    """All layers' caches of one stream. The model asks `layer(i)` for its attention; the stream drives the rest.

    `observer(layer, local, full)` listens on F-layers: (B, S, H, D) outputs of attention over local and over all keys.
    `committing` marks the clean pass, the only writer of history. Shapes other than the spec's own latent size are
    given by `grid` (rows, columns of tokens). `kv_dtype`: `auto` holds frames in `dtype`, `int8` and `fp8` in 8 bits.
    `attention_dtype` `int8` lets F-layers read int8 frames as they lie; `auto` decodes them first.
    `generation` counts the times that a buffer which passes read was replaced by another one.
    `past_bias` in (0, 1] weighs the keys between the first frame and the current chunk against the others
    (daydreamlive/scope's KV attention bias); 1: as they are. `rests`: whether idle parts lie in host memory.
    """

    rests = False
    condition_tokens = 0
    """Tokens that every pass sees beside the window (speech to video's condition)."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        recent: int = 0,
        local_sink: int = 1,
        grid: tuple[int, int] | None = None,
        backend: str = "auto",
        kv_dtype: str = "auto",
        attention_dtype: str = "auto",
        past_bias: float = 1.0,
    ):
        if not 0 < past_bias <= 1:
            raise InputError(f"KV bias {past_bias}: expected a number above 0 and at most 1, which is off")
        self.past_bias = math.log(past_bias)
        rows, columns = grid or spec.grid
        self.spec, self.recent, self.local_sink, self.backend = spec, recent, local_sink, backend
        self.batch = batch
        self.observer: Observer | None = None
        self.committing = self.recaching = False
        self.generation = 0
        self.start, self.count, self.origin = 0, 0, 0
        self._context: tuple[int, ...] = ()
        self.device, self.frame_tokens = torch.device(device), rows * columns
        self._layout = Layout(batch, rows * columns, spec.heads, spec.head_dim, dtype, self.device)
        self.kv_dtype, self._coders = kv_dtype, coders(kv_dtype, self.device)
        self.coded_attention = self._coded_attention(attention_dtype, dtype)
        self._rope = Rope(spec.head_dim, (rows, columns), theta=spec.rope_theta, device=device)
        self._turn = torch.empty(0)
        self._turn_of: dict[int, Tensor] = {}
        self._turns: dict[tuple[int, ...], Tensor] = {}
        self._scratch: dict[str, Tensor] = {}
        self._recoded: tuple[Tensor, ...] = ()
        self._layers: list[LayerCache] = [self._fresh() for _ in range(spec.layers)]

    def _coded_attention(self, name: str, dtype: torch.dtype) -> CodedAttention | None:
        if name not in ATTENTION_DTYPES:
            raise known_names("attention dtype", name, ATTENTION_DTYPES)
        if name == "auto":
            return None
        if self.kv_dtype != name:
            raise InputError(f"--attention-dtype {name} with --kv-dtype {self.kv_dtype}: expected --kv-dtype {name}")
        if self.past_bias:
            raise InputError(
                f"--attention-dtype {name} with --kv-bias: it does not weigh the past, leave one of them out"
            )
        return CodedAttention(self.device, dtype, self.spec.head_dim)

    def _fresh(self) -> LayerCache:
        """An F-layer at the stream's beginning."""
        return self._window()

    def _window(self) -> WindowCache:
        spec = self.spec
        capacity = spec.window_frames
        slots = WindowSlots(capacity, spec.sink_frames, spec.chunk_frames, self.recent, spec.rolls, self.origin)
        return WindowCache(slots, *self._stores(capacity), spec.ema_sink, spec.ema_wide)

    def _stores(self, frames: int) -> tuple[Store, Store]:
        """Room for the keys and the values of `frames` frames of a layer."""
        k, v = (self._layout.store(frames, coder) for coder in self._coders)
        return k, v

    # -- driven by the stream

    def begin(self, start: int, count: int) -> None:
        """Start a chunk of `count` frames at frame `start`: make room in every layer, fix this chunk's rotations."""
        limit = self.spec.max_frames
        if self.spec.rope == "absolute" and start + count > limit:
            raise InputError(
                f"frame {start + count - 1} is past this model's {limit} absolute positions: "
                f"ask for at most {limit} frames, or rotate keys by their slot in the window (--infinity)"
            )
        with region("attention.cache"):
            for layer in self._layers:
                layer.begin(start, count)
        self._turn_to(start, count)

    @contextmanager
    def again(self, start: int, count: int) -> Iterator[None]:
        """For one pass: compute frames [start, start + count) anew, the newest of the past, in F-layers only.

        Where the spec renews its sink, older frames are let go and the first of these take the sink's place.
        """
        renew = self.spec.renews_sink and start > 0
        self.origin = start if renew else self.origin
        for layer in self._layers:
            assert isinstance(layer, WindowCache), "make every layer an F-layer before computing its past anew"
            layer.begin_again(start, count, renew)
        self._turn_to(start, count)
        self.recaching = True
        try:
            yield
        finally:
            self.recaching = False

    @contextmanager
    def encoding(self, frames: Sequence[int]) -> Iterator[None]:
        """For one pass: compute the past `frames` of the current chunk anew, each chunk of them seeing itself and the
        ones before. All layers attend to all of it, their keys being there anyway; each keeps what it would keep."""
        turn, self._context = self._turn, tuple(frames)
        self._turn = self._rope.frames([self.position(frame) for frame in frames])
        try:
            yield
        finally:
            self._turn, self._context = turn, ()

    def _turn_to(self, start: int, count: int) -> None:
        """Queries are those of frames [start, start + count): fix their rotations."""
        self.start, self.count = start, count
        with region("overhead.rope"):
            self._turns.clear()
            self._rope.forget(start if self.spec.rope == "absolute" else 0)
            with torch.inference_mode(False):  # written to in later chunks, from whatever mode they run in
                turn = self._rope.frames([self.position(frame) for frame in range(start, start + count)])
            self._turn = self._turn_of.setdefault(len(turn), turn)
            if self._turn is not turn:
                self._turn.copy_(turn)

    def position(self, frame: int) -> int:
        """Time position of a frame: its index, or its slot in the window that ends with the current chunk."""
        if self.spec.rope == "absolute":
            return frame
        if frame < self.origin + max(1, self.spec.sink_frames):
            return frame - self.origin
        first = min(self.start, self.spec.window_frames - self.count)
        return first - (self.start - frame)

    def localise(self, layer: int, sink: int, recent: int, *, amid: bool = False) -> None:
        """Make an F-layer an L-layer: keep its first `sink` and newest `recent` frames, free the rest.

        `amid`: between passes of a chunk, whose own frames are not kept before its clean pass.
        """
        old = self._layers[layer]
        assert isinstance(old, WindowCache), f"layer {layer} is local already"
        kept_until = self.origin + sink if sink else 0
        new = LocalCache(*self._stores(sink + recent), kept_until, recent)
        slots = old.slots.temporal()
        if amid:
            slots = [s for s in slots if old.slots.frames[s] < self.start]
        kept = [s for s in slots if old.slots.frames[s] < kept_until] + (slots[-recent:] if recent else [])
        kept = list(dict.fromkeys(kept))
        new.take([old.slots.frames[s] for s in kept], old, kept)
        self._layers[layer] = new
        self.generation += 1

    def globalise(self, layer: int) -> None:
        """Make an L-layer an F-layer again, with what it still holds and a fresh history."""
        old = self._layers[layer]
        assert isinstance(old, LocalCache), f"layer {layer} is an F-layer already"
        new = self._window()
        order = sorted(range(len(old.frames)), key=old.frames.__getitem__)
        new.k.take(old.k, order)
        new.v.take(old.v, order)
        new.slots.resume(sorted(old.frames))
        self._layers[layer] = new
        self.generation += 1

    # -- asked by the model

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of one layer: q, k, v (B, S, H, D) before rotation -> (B, S, H, D)."""
        return partial(self._attend, index)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the text: q (B, S, H, D), k and v (B, L, H, D) -> (B, S, H, D)."""
        return attend(q, k, v, backend=self.backend, mark="attention.cross").out

    def store(self, index: int, k: Tensor, v: Tensor) -> None:
        """What a clean pass leaves in one layer, k and v (B, S, H, D) before rotation, without attending."""
        if self._context:
            self._refill(index, self.stored(k), v)
        else:
            self._layers[index].store(k, v, self)

    def storing_layers(self) -> int | None:
        """How many leading layers hold every layer in which a clean pass leaves something; None: it must run whole."""
        if self.observer is not None:
            return None
        kept = [layer.keeps if self._context else layer.stores for layer in self._layers]
        return max((index + 1 for index, keeps in enumerate(kept) if keeps), default=0)

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with region("overhead.rope"):
            q = rotate(q, self._turn)
        if self._context:
            return self._encode(index, q, k, v)
        return self._layers[index].attend(index, q, k, v, self)

    def _encode(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The context pass in one layer: q is rotated, k is not."""
        k, chunk = self.stored(k), self.spec.chunk_frames * self.frame_tokens
        parts = [
            attend(q[:, end - chunk : end], k[:, :end], v[:, :end], backend=self.backend).out
            for end in range(chunk, q.shape[1] + 1, chunk)
        ]
        self._refill(index, k, v)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _refill(self, index: int, k: Tensor, v: Tensor) -> None:
        """Keys as stored and values (B, S, H, D) of the context pass."""
        layer = self._layers[index]
        assert isinstance(layer, WindowCache | LocalCache)
        with region("attention.cache"):
            layer.refill(self._context, self.by_frame(k), self.by_frame(v))

    # -- asked by the layer caches

    def by_frame(self, x: Tensor) -> Tensor:
        """(B, S, H, D) -> (B, F, T, H, D)."""
        return x.unflatten(1, (-1, self.frame_tokens))

    def stored(self, k: Tensor) -> Tensor:
        """The current chunk's keys in the form the cache stores."""
        if self.spec.rotates_on_read:
            return k
        with region("overhead.rope"):
            return rotate(k, self._turn)

    def seen(self, k: Tensor, frames: list[int]) -> Tensor:
        """Stored keys (B, F, T, H, D) of `frames` in the form a query sees; rotated ones lie in the scratch `k`."""
        if not self.spec.rotates_on_read:
            return k
        with region("overhead.rope"):
            positions = tuple(self.position(frame) for frame in frames)
            if positions not in self._turns:
                self._turns[positions] = self._rope.frames(positions)
            scratch = self.scratch("k", len(frames))
            scratch.copy_(rotate(k.flatten(1, 2), self._turns[positions]).view_as(scratch))
            return scratch

    def seen_now(self, k: Tensor) -> Tensor:
        """Keys (B, S, H, D) of this pass, as stored, in the form its queries see."""
        if not self.spec.rotates_on_read:
            return k
        with region("overhead.rope"):
            return rotate(k, self._turn)

    def seen_codes(self, k: Store, slots: list[int], frames: list[int]) -> tuple[Tensor, ...]:
        """Codes (B, F, T, H, D) and scales (B, F, T, H, 1) of stored keys as a query sees them: slot by slot, good in
        `slots`, where `frames` lie. Keys that are rotated on every read are coded again after it."""
        if not self.spec.rotates_on_read:
            return k.parts
        assert isinstance(k, CodedStore)
        if not self._recoded:
            self._recoded = self._layout.store(self.spec.window_frames, k.coder).parts
        with region("overhead.rope"):
            for slot in slots:
                position = (self.position(frames[slot]),)
                if position not in self._turns:
                    self._turns[position] = self._rope.frames(position)
                turned = rotate(k.frame(slot), self._turns[position])
                for part, value in zip(self._recoded, k.coder.code(turned), strict=True):
                    part[:, slot] = value
        return self._recoded

    def scratch(self, name: str, frames: int) -> Tensor:
        """(B, F, T, H, D) of shared, transient space."""
        held = self._scratch.get(name)
        if held is None or held.shape[1] < frames:
            held = self._scratch[name] = self._layout.buffer(frames)
            self.generation += 1
        return held[:, :frames]

    # -- asked before a pass is recorded

    def form(self) -> Hashable | None:
        """All that the coming pass depends on beside its arguments and what lies in buffers; None where Python keeps
        books in it, so that it must be run and not replayed."""
        if self.observer is not None or self.recaching or self._context:
            return None
        layers = [layer.form(self) for layer in self._layers]
        return None if None in layers else (self.count, self.committing, *layers)

    def arrangement(self, held: list[int]) -> Hashable:
        """What a query's keys depend on of the frames that lie in the slots it sees."""
        positions = tuple(map(self.position, held)) if self.spec.rotates_on_read else ()
        past = split_past(((0, len(held)),), held, self.start) if self.past_bias else ()
        return len(held), positions, past

    # -- asked by reports and tests

    def is_local(self, layer: int) -> bool:
        return isinstance(self._layers[layer], LocalCache)

    def temporal(self, layer: int) -> tuple[list[int], Tensor, Tensor]:
        """Frames an F-layer holds, oldest first, with their stored keys and values (B, F, T, H, D)."""
        cache = self._layers[layer]
        if isinstance(cache, LocalCache):
            order, frames = sorted(range(len(cache.frames)), key=cache.frames.__getitem__), cache.frames
        else:
            assert isinstance(cache, WindowCache)
            order, frames = cache.slots.temporal(), cache.slots.frames
        held = [[store.frame(slot) for slot in order] for store in (cache.k, cache.v)]
        k, v = (torch.stack(each, 1) if each else self._layout.buffer(0) for each in held)
        return [frames[slot] for slot in order], k, v

    def persistent_bytes(self) -> int:
        """Bytes allocated for keys and values kept between chunks, over all layers."""
        return sum(layer.nbytes() for layer in self._layers)

    def layer_bytes(self, layer: int) -> int:
        """Bytes allocated for the keys and values that one layer keeps between chunks."""
        return self._layers[layer].nbytes()

    def host_bytes(self) -> int:
        """Of `persistent_bytes`, those that lie in host memory while the model runs on another device: every pass reads
        every window, so here none are idle."""
        return 0

    def wide_sink_bytes(self) -> int:
        """Bytes of float32 copies of averaging sinks, on top of `persistent_bytes`."""
        return sum(layer.wide_bytes() for layer in self._layers if isinstance(layer, WindowCache))

    def scratch_bytes(self) -> int:
        """Bytes allocated for transient keys and values shared by all layers."""
        held = (*self._scratch.values(), *self._recoded)
        return int(sum(scratch.untyped_storage().nbytes() for scratch in held))

    def errors(self) -> dict[str, float | None]:
        """Relative L2 error of keys and values held in 8 bits; empty where frames are held as they come."""
        named = zip(("keys", "values"), self._coders, strict=True)
        return {name: coder.error() for name, coder in named if coder is not None}

    def full_bytes(self) -> int:
        """Bytes of a cache whose every layer is an F-layer, held in the model's dtype."""
        return self._layout.frame_bytes * self.spec.window_frames * self.spec.layers
