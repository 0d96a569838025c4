"""Keys and values of one speech-to-video stream: a ring for each denoising step, and the condition beside them.

Legend: B batch, T tokens of a frame, S = F * T tokens of the current chunk, M tokens of the condition, H heads, D head
width.

Each pass of a chunk looks back at the passes of the same step in earlier chunks, noisy as they were: there is no clean
pass. So an F-layer has as many rings of W frames as there are steps, and one copy of the condition's keys, before
rotation, because the reference moves. An L-layer has no rings (or short ones, for recent frames): it keeps the
condition, which is its sink, and borrows the scratch that all L-layers share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from ispa_deploy.attention import Attended, attend, merge
from ispa_deploy.avatar.condition import REFERENCE, ConditionRope, reference_position
from ispa_deploy.avatar.sizes import check_rings, condition_length
from ispa_deploy.cache import KVCache
from ispa_deploy.kvstore import Layout
from ispa_deploy.regions import region
from ispa_deploy.rope import Rope, rotate
from ispa_deploy.slots import Range, coalesce
from ispa_deploy.specs import ModelSpec

KV = tuple[Tensor, Tensor]


class Ring:
    """Frames in the order of their arrival, the oldest overwritten first: buffers (steps, B, W, T, H, D), one table.

    `frames[slot]` is what a slot holds once the current chunk is written; `before` slots were filled ahead of it.
    `home`: where the buffers lie; on the host of a GPU, in memory that it reads directly.
    """

    def __init__(self, layout: Layout, steps: int, capacity: int, home: torch.device):
        self.frames: list[int] = []
        self.capacity, self.current, self.before = capacity, (0, 0), 0
        self._next = 0
        shape = (steps, layout.batch, capacity, layout.tokens, layout.heads, layout.width)
        pinned = home.type == "cpu" and layout.device.type == "cuda"
        self.k, self.v = (torch.zeros(shape, dtype=layout.dtype, device=home, pin_memory=pinned) for _ in range(2))

    def begin(self, start: int, count: int) -> None:
        """The next chunk's slots."""
        self.before = len(self.frames)
        if self.capacity:
            first, self._next = self._next, (self._next + count) % self.capacity
            self.frames[first : first + count] = range(start, start + count)
            self.current = first, first + count

    def write(self, step: int, k: Tensor, v: Tensor) -> None:
        """The current chunk's keys and values (B, S, H, D) of one pass."""
        first, last = self.current
        if self.capacity:
            like = self.k[step, :, first:last]
            self.k[step, :, first:last], self.v[step, :, first:last] = k.view_as(like), v.view_as(like)

    def take(self, other: Ring, frames: list[int]) -> None:
        """Hold `frames` of another ring, oldest first, in front."""
        slots = [other.frames.index(frame) for frame in frames]
        self.k[:, :, : len(slots)], self.v[:, :, : len(slots)] = other.k[:, :, slots], other.v[:, :, slots]
        self.frames = list(frames)
        self._next = len(frames) % self.capacity if self.capacity else 0

    def part(self, step: int, span: Range) -> KV:
        """Keys and values (B, S', H, D) of a run of slots."""
        first, last = span
        return self.k[step, :, first:last].flatten(1, 2), self.v[step, :, first:last].flatten(1, 2)

    def nbytes(self) -> int:
        return int(self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes())


class AvatarLayer:
    """One layer: its ring, and the condition's keys (before rotation) and values (B, M, H, D).

    An F-layer's ring ends with the current chunk, an L-layer's (`local`) holds the past only, if anything.
    """

    def __init__(self, ring: Ring, condition: KV, *, local: bool = False):
        self.ring, self.condition, self.local = ring, condition, local

    def begin(self, start: int, count: int) -> None:
        self.ring.begin(start, count)

    def keep_condition(self, k: Tensor, v: Tensor) -> None:
        """Take in a prefill's keys and values; a layer that keeps no sink lets them go."""
        if self.condition[0].shape[1]:
            self.condition[0].copy_(k)
            self.condition[1].copy_(v)

    stores = keeps = False  # in a clean pass, which this model has not

    def form(self, cache: AvatarCache) -> None:
        """Each pass appends to its step's ring and counts what is in it: none can be replayed."""
        return

    def store(self, k: Tensor, v: Tensor, cache: AvatarCache) -> None:
        raise AssertionError("a speech-to-video model has no clean pass")

    def nbytes(self) -> int:
        return self.ring.nbytes() + int(sum(part.untyped_storage().nbytes() for part in self.condition))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: AvatarCache) -> Tensor:
        """q rotated, k as stored (B, S, H, D) -> (B, S, H, D)."""
        if self.local:
            return self._attend_local(q, k, v, cache)
        with region("attention.cache"):
            self.ring.write(cache.step, k, v)
        if cache.observer is not None:
            return self._observed(layer, q, cache)
        held = cache.attended(q, cache.visited(self.ring, (0, len(self.ring.frames))))
        return merge(held, cache.attended(q, cache.shown(self.condition))).out

    def _observed(self, layer: int, q: Tensor, cache: AvatarCache) -> Tensor:
        """The same keys in parts: local ones, and the rest."""
        assert cache.observer is not None
        frames, shown = self.ring.frames, cache.attended(q, cache.shown(self.condition))
        near = coalesce(slot for slot, frame in enumerate(frames) if frame >= cache.start - cache.recent)
        far = coalesce(slot for slot, frame in enumerate(frames) if frame < cache.start - cache.recent)
        parts = [cache.attended(q, cache.visited(self.ring, span)) for span in near]
        local = reduce(merge, [shown, *parts] if cache.local_sink else parts)
        full = local if cache.local_sink else merge(local, shown)
        for span in far:
            full = merge(full, cache.attended(q, cache.visited(self.ring, span)))
        cache.observer(layer, local.out, full.out)
        return full.out

    def _attend_local(self, q: Tensor, k: Tensor, v: Tensor, cache: AvatarCache) -> Tensor:
        """[condition | recent | current] joined in the shared scratch, so that it is one call."""
        recent = cache.visited(self.ring, (0, self.ring.before))
        keys, values = cache.shown(self.condition)
        with region("attention.cache"):
            near = cache.joined("k", keys, recent[0], k), cache.joined("v", values, recent[1], v)
            self.ring.write(cache.step, k, v)
        return cache.attended(q, near).out


class AvatarCache(KVCache):
    """All layers' rings and conditions. The stream says which step a pass is of, and how far ahead the reference is.

    `half_table`: rotations rounded to 16-bit floats, as upstream keeps them. `offload`: rings lie in host memory, since
    only one of a layer's is read in a pass; that one visits space on the device that all layers share.
    """

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
        half_table: bool = False,
        offload: bool = False,
    ):
        check_rings(spec, recent)
        self.step, self.prefilling, self.rests = 0, False, offload
        self._grid = grid or spec.grid
        self.condition_tokens = condition_length(spec, self._grid)
        super().__init__(
            spec, batch=batch, dtype=dtype, device=device, recent=recent, local_sink=local_sink, grid=grid,
            backend=backend,
        )  # fmt: skip
        self._rope = Rope(spec.head_dim, self._grid, theta=spec.rope_theta, half=half_table, device=device)
        self._condition_rope = ConditionRope(spec, self._grid, self._rope)
        self._condition_turn = self._condition_rope.at(REFERENCE)

    def _fresh(self) -> AvatarLayer:
        return AvatarLayer(self._ring(self.spec.window_frames), self._condition(self.condition_tokens))

    def _ring(self, frames: int) -> Ring:
        home = torch.device("cpu") if self.rests else self._layout.device
        return Ring(self._layout, len(self.spec.steps), frames, home)

    def _condition(self, tokens: int) -> KV:
        layout = self._layout
        shape = (layout.batch, tokens, layout.heads, layout.width)
        k, v = (torch.zeros(shape, dtype=layout.dtype, device=layout.device) for _ in range(2))
        return k, v

    # -- driven by the stream

    def begin_pass(self, step: int, distance: int) -> None:
        """The next pass is denoising step `step`; the reference stands `distance` frames ahead."""
        self.step = step
        with region("overhead.rope"):
            self._condition_turn = self._condition_rope.at(reference_position(self.start, distance))

    @contextmanager
    def condition(self) -> Iterator[None]:
        """For one pass: the tokens are the condition's, they see each other, and every layer keeps what it needs."""
        turn, self._turn = self._turn, self._condition_rope.at(REFERENCE)
        self.prefilling = True
        try:
            yield
        finally:
            self.prefilling, self._turn = False, turn

    def localise(self, layer: int, sink: int, recent: int, *, amid: bool = False) -> None:
        """Make an F-layer an L-layer: keep the condition if `sink`, and its newest `recent` frames of each step."""
        old = self._own(layer)
        assert not old.local, f"layer {layer} is local already"
        ring = self._ring(recent)
        newest = sorted(old.ring.frames)
        ring.take(old.ring, newest[len(newest) - recent :])
        self._layers[layer] = AvatarLayer(ring, old.condition if sink else self._condition(0), local=True)

    def globalise(self, layer: int) -> None:
        """Make an L-layer an F-layer again, with what it still holds and a fresh history."""
        old, new = self._own(layer), self._fresh()
        assert old.local, f"layer {layer} is an F-layer already"
        new.ring.take(old.ring, sorted(old.ring.frames))
        if old.condition[0].shape[1]:
            new.condition = old.condition
        self._layers[layer] = new

    # -- asked by the model and the layers

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self._own(index)
        if self.prefilling:
            layer.keep_condition(k, v)
        with region("overhead.rope"):
            q, k = rotate(q, self._turn), rotate(k, self._turn)
        return self.attended(q, (k, v)).out if self.prefilling else layer.attend(index, q, k, v, self)

    def attended(self, q: Tensor, kv: KV) -> Attended:
        return attend(q, *kv, backend=self.backend)

    def shown(self, condition: KV) -> KV:
        """The condition as this pass sees it: keys rotated."""
        if not condition[0].shape[1]:
            return condition
        with region("overhead.rope"):
            return rotate(condition[0], self._condition_turn), condition[1]

    def visited(self, ring: Ring, span: Range) -> KV:
        """Keys and values (B, S', H, D) of a run of slots of this pass's ring, on the device until the next call."""
        k, v = ring.part(self.step, span)
        if not self.rests:
            return k, v
        room = ring.capacity * self.frame_tokens
        with region("attention.cache"):
            keys, values = self._shared("ring k", room)[:, : k.shape[1]], self._shared("ring v", room)[:, : v.shape[1]]
            return keys.copy_(k, non_blocking=True), values.copy_(v, non_blocking=True)

    def joined(self, name: str, *parts: Tensor) -> Tensor:
        """Parts (B, ., H, D) side by side in space that all layers share."""
        return torch.cat(parts, 1, out=self._shared(name, sum(part.shape[1] for part in parts)))

    def _shared(self, name: str, length: int) -> Tensor:
        held = self._scratch.get(name)
        if held is None or held.shape[1] < length:
            held = self._scratch[name] = self._condition(length)[0]
        return held[:, :length]

    # -- asked by reports and tests

    def _own(self, layer: int) -> AvatarLayer:
        own = self._layers[layer]
        assert isinstance(own, AvatarLayer)
        return own

    def is_local(self, layer: int) -> bool:
        return self._own(layer).local

    def temporal(self, layer: int) -> tuple[list[int], Tensor, Tensor]:
        """Frames a layer's ring of the current step holds, oldest first, with keys and values (B, F, T, H, D)."""
        ring = self._own(layer).ring
        order = sorted(range(len(ring.frames)), key=ring.frames.__getitem__)
        return [ring.frames[slot] for slot in order], ring.k[self.step][:, order], ring.v[self.step][:, order]

    def conditioned(self, layer: int) -> KV:
        """Keys before rotation and values of a layer's condition, (B, M, H, D)."""
        return self._own(layer).condition

    def host_bytes(self) -> int:
        """Of `persistent_bytes`, those in host memory."""
        return sum(self._own(layer).ring.nbytes() for layer in range(self.spec.layers)) if self.rests else 0

    def full_bytes(self) -> int:
        """Bytes `persistent_bytes` reports while every layer is an F-layer."""
        ring = self._layout.frame_bytes * self.spec.window_frames * len(self.spec.steps)
        condition = self._layout.frame_bytes * self.condition_tokens // self.frame_tokens
        return (ring + condition) * self.spec.layers
