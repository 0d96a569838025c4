"""What one layer holds of a stream, and attention over it.

Legend: B batch, F frames, T tokens of a frame, S = F * T tokens of the current chunk, H heads, D head width.
A layer is one of two things:

- `WindowCache` (F-layer): the model's whole window in one buffer. The current chunk is written in place and attention
  is one call over the filled part. While an observer listens, the same keys are attended as local and history parts
  and merged, which is exact and yields both outputs (paper section 3.4).
- `LocalCache` (L-layer): frame 0 and r recent frames. The current chunk is transient: all L-layers share one scratch
  [sink | recent | current], reported apart from the persistent bytes.

How frames are held, as they come or in 8 bits, is the business of `kvstore`; `Frames` is what a layer asks of the
stream's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial, reduce
from typing import Any, Protocol

from torch import Tensor

from ispa_deploy.attention import Attended, attend, merge
from ispa_deploy.attention_int8 import Coded, CodedAttention
from ispa_deploy.kvstore import Places, Store
from ispa_deploy.regions import region
from ispa_deploy.slots import Range, WindowSlots, coalesce, split_past

Observer = Callable[[int, Tensor, Tensor], None]


class Frames(Protocol):
    """What the layer caches ask of the stream's cache: this chunk's frames and their rotations."""

    start: int
    count: int
    committing: bool
    recaching: bool
    observer: Observer | None
    local_sink: int
    backend: str
    past_bias: float
    coded_attention: CodedAttention | None

    def by_frame(self, x: Tensor) -> Tensor: ...
    def stored(self, k: Tensor) -> Tensor: ...
    def seen(self, k: Tensor, frames: list[int]) -> Tensor: ...
    def seen_now(self, k: Tensor) -> Tensor: ...
    def seen_codes(self, k: Store, slots: list[int], frames: list[int]) -> tuple[Tensor, ...]: ...
    def scratch(self, name: str, frames: int) -> Tensor: ...
    def arrangement(self, held: list[int]) -> Hashable: ...


class LayerCache(Protocol):
    """What one layer holds of a stream."""

    def begin(self, start: int, count: int) -> None: ...
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, frames: Any, /) -> Tensor: ...
    def store(self, k: Tensor, v: Tensor, frames: Any, /) -> None: ...
    def nbytes(self) -> int: ...
    def form(self, frames: Any, /) -> Hashable | None: ...

    @property
    def stores(self) -> bool: ...
    @property
    def keeps(self) -> bool: ...


class WindowCache:
    """An F-layer's window: stores of W frames and the table of what lies where."""

    def __init__(self, slots: WindowSlots, k: Store, v: Store, ema: float | None, ema_wide: bool = True):
        self.slots, self.k, self.v, self._ema, self._ema_wide = slots, k, v, ema, ema_wide
        self._again: Places = ()
        self._wide: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, start: int, count: int) -> None:
        """Evict and move so that the chunk's slots are free."""
        room = self.slots.begin(start, count)
        if self._ema is not None and room.evicted:
            self._feed_sink(room.evicted)
        for source, target in room.moves:
            for store in (self.k, self.v):
                store.move(source, target)

    def begin_again(self, start: int, count: int, renew: bool) -> None:
        """The next pass computes frames anew that lie before the current chunk; with `renew` they are all there is."""
        self._again = self.slots.renew(start, count) if renew else self.slots.readmit(start, count)

    def _places(self, frames: Frames) -> Places:
        """Where the frames of this pass go."""
        return self._again if frames.recaching else tuple(enumerate(range(*self.slots.current)))

    def _window(self, k: Tensor, v: Tensor, frames: Frames) -> tuple[Tensor, Tensor]:
        """Keys as stored and values of this pass, (B, F, T, H, D), enter; the filled window, (B, W', T, H, D) each."""
        held, places, keep = self.slots.filled, self._places(frames), frames.committing or frames.recaching
        keys = self.k.window(held, places, k, keep, lambda: frames.scratch("k", held))
        return keys, self.v.window(held, places, v, keep, lambda: frames.scratch("v", held))

    def refill(self, frames: Sequence[int], k: Tensor, v: Tensor) -> None:
        """The past computed anew: keys as stored and values (B, F, T, H, D) of `frames`, written to their slots."""
        for index, slot in enumerate(self.slots.admit(frames)):
            self.k.put(slot, k[:, index])
            self.v.put(slot, v[:, index])

    def _feed_sink(self, evicted: tuple[int, ...]) -> None:
        """Reward-Forcing: the sink frames absorb what the window drops, slot by slot, oldest first.

        At a weight of 0.999 a sink of 16 bits or fewer rounds most updates away; unless told to do as upstream, it is
        kept in float32 beside the window.
        """
        first, held = self.slots.origin, self.slots.frames
        sink = [held.index(frame) for frame in range(first, first + self.slots.sink) if frame in held]
        # Upstream replaces the sink when the counts differ. A layer that was local kept frame 0 alone: there it fades.
        alpha = 0.0 if len(sink) == self.slots.sink != len(evicted) else self._ema
        assert alpha is not None
        for slot, old in zip(sink, evicted, strict=False):
            frame = self.slots.frames[slot]
            wide = self._wide.get(frame, (self.k.frame(slot).float(), self.v.frame(slot).float()))
            mixed = tuple(
                sink * alpha + store.frame(old).float() * (1 - alpha)
                for sink, store in zip(wide, (self.k, self.v), strict=True)
            )
            self.k.put(slot, mixed[0])
            self.v.put(slot, mixed[1])
            if self._ema_wide and not self.k.exact:
                self._wide[frame] = (mixed[0], mixed[1])

    @property
    def stores(self) -> bool:
        """Whether a clean pass leaves anything here."""
        return True

    keeps = stores

    def store(self, k: Tensor, v: Tensor, frames: Frames) -> None:
        """Keep k and v (B, S, H, D) of a pass, as `attend` would, without attending."""
        stored, values = frames.by_frame(frames.stored(k)), frames.by_frame(v)
        with region("attention.cache"):
            for index, slot in self._places(frames):
                self.k.put(slot, stored[:, index])
                self.v.put(slot, values[:, index])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, frames: Frames) -> Tensor:
        if frames.coded_attention is not None:
            return self._attend_coded(layer, q, k, v, frames, frames.coded_attention)
        stored = frames.stored(k)
        with region("attention.cache"):
            keys, values = self._window(frames.by_frame(stored), frames.by_frame(v), frames)
        held = keys.shape[1]
        keys = frames.seen(keys, self.slots.frames[:held])
        over = partial(_over, q, keys, values, held=self.slots.frames, frames=frames)
        if frames.observer is None:
            return over(((0, held),)).out
        near = self.slots.local(frames.start, frames.local_sink)
        local = over(near)
        full = local
        for part in self.slots.rest(near):
            full = merge(full, over((part,)))
        frames.observer(layer, local.out, full.out)
        return full.out

    def _attend_coded(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, frames: Frames, coded: CodedAttention
    ) -> Tensor:
        """The past is read in 8 bits as it lies, what this pass computes as it came; each part joins the last."""
        places, stored = self._places(frames), frames.stored(k)
        fresh = (self._placed(frames.by_frame(x), places).flatten(1, 2) for x in (frames.seen_now(stored), v))
        now = attend(q, *fresh, backend=frames.backend)
        taken = {slot for _, slot in places}
        past = [slot for slot in range(self.slots.filled) if slot not in taken]
        with region("attention.cache"):
            keys, values = frames.seen_codes(self.k, past, self.slots.frames), self.v.parts

        def join(before: Attended, ranges: tuple[Range, ...]) -> Attended:
            for a, b in ranges:
                k_part, v_part = (Coded(*(x[:, a:b].flatten(1, 2) for x in each)) for each in (keys, values))
                before = coded(q, k_part, v_part, before)
            return before

        if frames.observer is None:
            out = join(now, coalesce(past)).out
        else:
            near = {slot for a, b in self.slots.local(frames.start, frames.local_sink) for slot in range(a, b)}
            local = join(now, coalesce(slot for slot in past if slot in near))
            out = join(local, coalesce(slot for slot in past if slot not in near)).out
            frames.observer(layer, local.out, out)
        if frames.committing or frames.recaching:
            with region("attention.cache"):
                for index, slot in places:
                    self.k.put(slot, frames.by_frame(stored)[:, index])
                    self.v.put(slot, frames.by_frame(v)[:, index])
        return out

    @staticmethod
    def _placed(x: Tensor, places: Places) -> Tensor:
        """Those frames of x (B, F, T, H, D) that have a place."""
        return x if len(places) == x.shape[1] else x[:, [index for index, _ in places]]

    def form(self, frames: Frames) -> Hashable:
        """As `KVCache.form`."""
        return self.slots.current, frames.arrangement(self.slots.frames[: self.slots.filled])

    def wide_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._wide.values() for tensor in pair)

    def nbytes(self) -> int:
        return self.k.nbytes() + self.v.nbytes()


class LocalCache:
    """An L-layer's persistent frames: those before frame `sink` and the `recent` newest committed ones."""

    def __init__(self, k: Store, v: Store, sink: int, recent: int):
        self.k, self.v, self.sink, self.recent = k, v, sink, recent
        self.frames: list[int] = []

    def begin(self, start: int, count: int) -> None:
        """Nothing to move: the current chunk lives in the shared scratch."""

    def take(self, frames: list[int], window: WindowCache, slots: list[int]) -> None:
        """Start with `frames`, which lie in `slots` of a window."""
        self.frames = frames
        self.k.take(window.k, slots)
        self.v.take(window.v, slots)

    def keep(self, frames: list[int], k: Tensor, v: Tensor) -> None:
        """Keep those of `frames` (k, v: (B, F, T, H, D)) that are sink or recent, replacing the oldest recent ones."""
        for index, frame in enumerate(frames):
            if frame < self.sink or self.recent:
                slot = self._slot_for(frame)
                self.k.put(slot, k[:, index])
                self.v.put(slot, v[:, index])

    def refill(self, frames: Sequence[int], k: Tensor, v: Tensor) -> None:
        """The past computed anew, of which this layer keeps its share."""
        self.frames = []
        rolling = [frame for frame in frames if frame >= self.sink]
        recent = rolling[-self.recent :] if self.recent else []
        kept = [index for index, frame in enumerate(frames) if frame < self.sink or frame in recent]
        self.keep([frames[index] for index in kept], k[:, kept], v[:, kept])

    def _slot_for(self, frame: int) -> int:
        rolling = [f for f in self.frames if f >= self.sink]
        if frame < self.sink or len(rolling) < self.recent:
            self.frames.append(frame)
            return len(self.frames) - 1
        oldest = min(rolling)
        slot = self.frames.index(oldest)
        self.frames[slot] = frame
        return slot

    @property
    def keeps(self) -> bool:
        """Whether anything of the past stays here."""
        return self.sink + self.recent > 0

    @property
    def stores(self) -> bool:
        """Whether a clean pass leaves anything here: recent frames, or frame 0 where it is still to come."""
        return self.recent > 0 or (self.sink > 0 and not self.frames)

    def store(self, k: Tensor, v: Tensor, frames: Frames) -> None:
        """Keep what a clean pass leaves here of k and v (B, S, H, D), without attending."""
        if self.stores:
            stored, values = frames.by_frame(frames.stored(k)), frames.by_frame(v)
            with region("attention.cache"):
                self.keep(list(range(frames.start, frames.start + frames.count)), stored, values)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, frames: Frames) -> Tensor:
        held, current = len(self.frames), list(range(frames.start, frames.start + frames.count))
        stored, chunk_v = frames.by_frame(frames.stored(k)), frames.by_frame(v)
        with region("attention.cache"):
            keys, values = frames.scratch("k", held + len(current)), frames.scratch("v", held + len(current))
            for scratch, store, chunk in ((keys, self.k, stored), (values, self.v, chunk_v)):
                for slot in range(held):
                    scratch[:, slot] = store.frame(slot)
                scratch[:, held:] = chunk
        all_held = [*self.frames, *current]
        keys = frames.seen(keys, all_held)
        out = _over(q, keys, values, ((0, len(all_held)),), held=all_held, frames=frames).out
        if frames.committing and self.stores:
            with region("attention.cache"):
                self.keep(current, stored, chunk_v)
        return out

    def form(self, frames: Frames) -> Hashable | None:
        """As `KVCache.form`: which frames are kept is decided anew in every clean pass."""
        if frames.committing and self.stores:
            return None
        return frames.arrangement([*self.frames, *range(frames.start, frames.start + frames.count)])

    def nbytes(self) -> int:
        return self.k.nbytes() + self.v.nbytes()


def _over(
    q: Tensor, keys: Tensor, values: Tensor, ranges: tuple[Range, ...], *, held: list[int], frames: Frames
) -> Attended:
    """Attention over slots of (B, F, T, H, D) buffers in which frame `held[slot]` lies, the past biased."""
    plain, past = (ranges, ()) if frames.past_bias == 0.0 else split_past(ranges, held, frames.start)
    parts = [
        attend(q, keys[:, a:b].flatten(1, 2), values[:, a:b].flatten(1, 2), backend=frames.backend)
        for a, b in (*plain, *past)
    ]
    for index in range(len(plain), len(parts)):  # a bias of scores is one of their log-sum-exp
        parts[index] = Attended(parts[index].out, parts[index].lse + frames.past_bias)
    return reduce(merge, parts)
