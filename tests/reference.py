"""The same mathematics a second time: float64, dense, slow, written to be read; it calls nothing that it checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ispa_deploy.specs import ModelSpec

Keys = tuple[Tensor, Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q (B, Q, H, D) over k, v (B, K, H, D) -> out (B, Q, H, D), log-sum-exp (B, Q, H)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights / total) @ v
    return out.transpose(1, 2), (top + total.log()).squeeze(-1).transpose(1, 2)


def ridge(rows: Tensor, targets: Tensor, strength: float, *, intercept: bool = False) -> tuple[Tensor, Tensor]:
    """Least squares on stacked rows: min ‖rows X + b − targets‖² + λ‖X‖²; X (I, O), b (O,), zero without intercept."""
    rows, targets = rows.double(), targets.double()
    width = rows.shape[1]
    penalty = math.sqrt(strength) * torch.eye(width, dtype=torch.float64)
    if intercept:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        penalty = torch.cat([penalty, torch.zeros(width, 1, dtype=torch.float64)], 1)
    stacked = torch.cat([rows, penalty])
    wanted = torch.cat([targets, torch.zeros(width, targets.shape[1], dtype=torch.float64)])
    found = torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution
    return (found[:-1], found[-1]) if intercept else (found, torch.zeros(targets.shape[1], dtype=torch.float64))


def rotate(x: Tensor, position: int, grid: tuple[int, int], theta: float) -> Tensor:
    """Rotary embedding of one frame x (B, T, H, D): channel pairs turn by time, then row, then column."""
    head = x.shape[-1]
    spatial = 2 * (head // 6)
    token = torch.arange(x.shape[1], dtype=torch.float64)
    places = (torch.full_like(token, position), token // grid[1], token % grid[1])
    angles = []
    for place, width in zip(places, (head - 2 * spatial, spatial, spatial), strict=True):
        for pair in range(width // 2):
            angles.append(place * theta ** (-2 * pair / width))
    angle = torch.stack(angles, 1)[:, None]  # (T, 1, D / 2)
    even, odd = x[..., 0::2].double(), x[..., 1::2].double()
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, -1).flatten(-2)


def kept_frames(capacity: int, sink: int, chunks: Sequence[tuple[int, int]]) -> list[int]:
    """Frames of a rolling window after these (start, count) chunks, oldest first."""
    held: list[int] = []
    for start, count in chunks:
        held += range(start, start + count)
        extra = max(0, len(held) - capacity)
        drop = [frame for frame in held if frame >= sink][:extra]
        held = [frame for frame in held if frame not in drop]
    return held


class NaiveMemory:
    """A model's `Memory` without a cache: every frame's unrotated keys and values in dicts, rules by the book."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.window: list[int] = []
        self.current: list[int] = []
        self.local: dict[int, int] = {}  # L-layer -> its recent frames
        self.lost: dict[int, set[int]] = {}  # frames a layer dropped while it was local
        self.queries: dict[int, Tensor] = {}  # of the latest pass
        self.held: list[dict[int, Keys]] = [{} for _ in range(spec.layers)]

    def begin(self, start: int, count: int) -> None:
        spec = self.spec
        self.current = list(range(start, start + count))
        overflow = max(0, len(self.window) + count - spec.window_frames)
        evicted = [frame for frame in self.window if frame >= spec.sink_frames][:overflow]
        if spec.ema_sink is not None and evicted:
            self._feed_sink(evicted, spec.ema_sink if len(evicted) == spec.sink_frames else 0.0)
        self.window = [frame for frame in self.window if frame not in evicted] + self.current

    def _feed_sink(self, evicted: list[int], alpha: float) -> None:
        for layer, held in enumerate(self.held):
            if layer not in self.local:
                for sink, old in zip(range(self.spec.sink_frames), evicted, strict=False):
                    k, v = (alpha * a + (1 - alpha) * b for a, b in zip(held[sink], held[old], strict=True))
                    held[sink] = k, v

    def localise(self, layer: int, recent: int) -> None:
        """From now on this layer attends to frame 0, `recent` frames and the current chunk."""
        self.local[layer] = recent

    def globalise(self, layer: int) -> None:
        """From now on this layer attends to what it still holds and all that follows."""
        recent = self.local.pop(layer)
        end = self.current[-1] + 1
        self.lost[layer] = {frame for frame in self.window if frame != 0 and frame < end - recent}

    def local_output(self, layer: int, q: Tensor, recent: int) -> Tensor:
        """What an L-layer with `recent` frames would answer to the current chunk's queries q (B, S, H, D)."""
        return self._over(layer, q, self._near(recent))

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            tokens = self.spec.frame_tokens
            for number, frame in enumerate(self.current):
                rows = slice(number * tokens, (number + 1) * tokens)
                self.held[index][frame] = k[:, rows].double(), v[:, rows].double()
            self.queries[index] = q
            return self._over(index, q, self._seen(index))

        return attend

    def _over(self, layer: int, q: Tensor, seen: list[int]) -> Tensor:
        turned = [
            self._turn(part, frame) for part, frame in zip(q.chunk(len(self.current), 1), self.current, strict=True)
        ]
        keys = torch.cat([self._turn(self.held[layer][frame][0], frame) for frame in seen], 1)
        values = torch.cat([self.held[layer][frame][1] for frame in seen], 1)
        return attention(torch.cat(turned, 1), keys, values)[0].to(q.dtype)

    def _near(self, recent: int) -> list[int]:
        return [frame for frame in self.window if frame == 0 or frame >= self.current[0] - recent]

    def _seen(self, layer: int) -> list[int]:
        if layer in self.local:
            return self._near(self.local[layer])
        return [frame for frame in self.window if frame not in self.lost.get(layer, ())]

    def _turn(self, x: Tensor, frame: int) -> Tensor:
        position = frame if self.spec.rope == "absolute" else self.window.index(frame)
        return rotate(x, position, self.spec.grid, self.spec.rope_theta)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)[0].to(q.dtype)
