"""Which pass of a stream is running: its chunk, its number within the chunk, its timestep, told before it runs.

Activations of an autoregressive model depend on all of these and on a cache that a real stream has filled, so whatever
measures them (calibration, teacher-forced errors) rides on a stream rather than on noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ispa_deploy.model import TextKV
from ispa_deploy.stream import Stream


@dataclass(frozen=True, order=True, slots=True)
class Pass:
    """One forward pass: `step` counts within the chunk, `clean` marks the one whose keys the history keeps.

    `TEXT` is what runs once before the first chunk: the text's keys and values.
    """

    chunk: int
    step: int
    timestep: float
    clean: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


TEXT = Pass(-1, 0, 0.0, False)

Listener = Callable[[Pass, Tensor], None]
"""The pass that is about to run and its noisy latents (B, F, C, H, W)."""


@dataclass
class ToldStream(Stream):
    """A stream that says which pass comes before it runs it; what it computes is not touched."""

    before: Listener | None = None

    @classmethod
    def of(cls, stream: Stream, before: Listener) -> Self:
        """`stream`, not yet begun, with a listener."""
        given = {field.name: getattr(stream, field.name) for field in fields(Stream) if field.init}
        return cls(**given, before=before)

    def __post_init__(self) -> None:
        assert not self.switches, "another prompt computes old frames anew: those passes have no number"
        super().__post_init__()
        self._chunk_of = {start: index for index, (start, _) in enumerate(self.chunks)}
        self._last = (-1, -1)

    def _velocity(self, x: Tensor, timestep: float) -> Tensor:
        self._tell(x, timestep, clean=False)
        return super()._velocity(x, timestep)

    def _store(self, latents: Tensor, timestep: float, text: TextKV) -> None:
        self._tell(latents, timestep, clean=True)
        super()._store(latents, timestep, text)

    def _follow_prompt(self, start: int) -> None:
        super()._follow_prompt(start)
        self._last = (self._chunk_of[start], -1)

    @torch.inference_mode()
    def _tell(self, x: Tensor, timestep: float, *, clean: bool) -> None:
        self._last = (self._last[0], self._last[1] + 1)
        if self.before is not None:
            self.before(Pass(*self._last, timestep, clean), x)
