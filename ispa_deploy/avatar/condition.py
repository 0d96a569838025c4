"""Where the condition's tokens lie in time and space, and how many there are: integers and rotations.

The reference stands 30 frames after the start of the stream and, later, a drawn distance d ahead of the current chunk;
the frames before the stream stay where they were, at negative positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ispa_deploy.avatar.sizes import packed
from ispa_deploy.rope import Rope
from ispa_deploy.specs import ModelSpec

REFERENCE = 30
"""Time position of the reference as long as the stream has not come near it."""
NEAREST, FURTHEST = 4, 30

Distance = Callable[[int, int], int]
"""First frame of a chunk, number of the pass -> how many frames the reference stands ahead, in 4..30."""


def drawn_distance(seed: int) -> Distance:
    """Uniform over 4..30 for each pass, keyed by (seed, frame, pass): a longer stream keeps its early frames."""

    def draw(start: int, step: int) -> int:
        return random.Random(f"{seed} {start} {step}").randint(NEAREST, FURTHEST)

    return draw


def reference_position(start: int, distance: int) -> int:
    """Time position of the reference for a chunk that begins at frame `start`."""
    return REFERENCE + max(0, start - (REFERENCE - distance))


class ConditionRope:
    """Rotations of the condition's tokens, in their order: reference, then motion from the newest scale on."""

    def __init__(self, spec: ModelSpec, grid: tuple[int, int], rope: Rope):
        self._rope = rope
        self._motion = torch.cat([rope.coarse(*part) for part in packed(spec, grid)])

    def at(self, position: int) -> Tensor:
        """(M, 1, D / 2) complex64 with the reference at a time position."""
        return torch.cat([self._rope.frames([position]), self._motion])
