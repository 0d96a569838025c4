"""The clean past that a model's context is encoded from before every chunk (Krea's server).

The context of a chunk is the stream's first frame and the K - 1 newest ones; until there are more than K, all of them.
Once the window slides, its first frame is made anew: the oldest pixel frame of the context's time, encoded alone, as a
clip's first frame is. So the sink is a place and not a constant. Where nothing encodes pixels, or on request, it stays
the stream's own first frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ispa_deploy.regions import region
from ispa_deploy.specs import ModelSpec

Encoder = Callable[[Tensor], Tensor]
"""Pixels (B, 1 + 4 n, 3, h, w) in [0, 1] -> latents (B, 1 + n, C, H, W) float32."""


@dataclass
class Context:
    """Clean latents and pixels of a stream's past, as much as the next context needs. `encode` None: the first frame
    is kept."""

    spec: ModelSpec
    encode: Encoder | None = None
    _first: Tensor = field(default_factory=lambda: torch.empty(0))
    _past: Tensor = field(default_factory=lambda: torch.empty(0))
    _pixels: Tensor = field(default_factory=lambda: torch.empty(0))

    def remember(self, latents: Tensor, pixels: Tensor | None) -> None:
        """Take in a finished chunk: (B, F, C, H, W), and its pixels (B, F', 3, h, w) where there are any."""
        kept = self.spec.context_frames
        if not self._past.numel():
            self._first = latents[:, :1]
        self._past = _newest(self._past, latents, kept)
        if self.encode is not None and pixels is not None:
            self._pixels = _newest(self._pixels, pixels, 1 + self.spec.temporal_stride * (kept - 1))

    def notes(self, frames: int) -> list[str]:
        """What someone with a stream of `frames` frames should know and did not ask."""
        if self.encode is not None or frames <= self.spec.window_frames:
            return []
        return ["the context keeps the video's own first frame: sliding it takes a VAE (--vae) that encodes as well"]

    def frames(self, start: int) -> tuple[int, ...]:
        """Frames that the context of a chunk from `start` on stands for, oldest first; none before the first chunk."""
        kept = self.spec.context_frames
        return tuple(range(start)) if start <= kept else (0, *range(start - kept + 1, start))

    def latents(self, start: int) -> Tensor:
        """Clean latents (B, K, C, H, W) of those frames."""
        kept = self.spec.context_frames
        if start <= kept:
            return self._past
        return torch.cat([self._first_frame(), self._past[:, 1 - kept :]], 1)

    def _first_frame(self) -> Tensor:
        if self.encode is None or not self._pixels.numel():
            return self._first
        with region("overhead.decode"):
            return self.encode(self._pixels[:, :1]).to(self._past)


def _newest(past: Tensor, more: Tensor, count: int) -> Tensor:
    """The last `count` frames of both."""
    joined = torch.cat([past, more], 1) if past.numel() else more
    return joined[:, -count:]
