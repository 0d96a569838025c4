"""Three-axis rotary embedding of Wan: time, row and column each rotate their own share of a head.

Legend: D head width, F frames, T tokens of a frame (rows x columns), S = F * T.
A head of width D gives 2 * floor(D / 6) channels each to rows and columns and the rest to time; neighbouring channels
(2j, 2j + 1) form one complex number. Angles are computed in float64 and rounded once to complex64; a `half` table is
rounded to 16-bit floats before, as LiveAvatar's upstream keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ispa_deploy.native import elementwise


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with time, row and column."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """(P,) positions -> (P, width / 2) angles in float64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return torch.outer(positions.to(torch.float64), theta**-exponents)


def _spread(length: int, count: int) -> Tensor:
    """`count` positions from the first of `length` to the last, cut to whole ones."""
    return torch.from_numpy(np.linspace(0, length - 1, count).astype(np.int64))


class Rope:
    """Rotations of whole frames, built on first use for each frame position and kept."""

    def __init__(
        self,
        head_dim: int,
        grid: tuple[int, int],
        *,
        theta: float = 10000.0,
        half: bool = False,
        device: str | torch.device = "cpu",
    ):
        self._time_width, self._row_width, self._column_width = axis_widths(head_dim)
        self._grid, self._theta, self._half, self._device = grid, theta, half, torch.device(device)
        self._plane = self._plane_of(*grid)
        self._frames: dict[int, Tensor] = {}

    def _plane_of(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, .) float64 angles of a frame of that many tokens spread over the whole picture."""
        row = _angles(_spread(self._grid[0], rows), self._row_width, self._theta).repeat_interleave(columns, 0)
        column = _angles(_spread(self._grid[1], columns), self._column_width, self._theta).repeat(rows, 1)
        return torch.cat([row, column], 1)

    def _turned(self, position: int, plane: Tensor) -> Tensor:
        time = _angles(torch.tensor([position]), self._time_width, self._theta).expand(len(plane), -1)
        angles = torch.cat([time, plane], 1)
        turn = torch.polar(torch.ones_like(angles), angles)
        if self._half:
            turn = torch.view_as_complex(torch.view_as_real(turn).half().double())
        return turn.to(torch.complex64).to(self._device)

    def frame(self, position: int) -> Tensor:
        """(T, D / 2) complex64: the rotation of one frame's tokens at a time position."""
        if position not in self._frames:
            self._frames[position] = self._turned(position, self._plane)
        return self._frames[position]

    def coarse(self, positions: Sequence[int], rows: int, columns: int) -> Tensor:
        """(len * rows * columns, 1, D / 2) complex64 for frames of fewer tokens that show the same picture."""
        plane = self._plane_of(rows, columns)
        return torch.cat([self._turned(position, plane) for position in positions]).unsqueeze(1)

    def frames(self, positions: Sequence[int]) -> Tensor:
        """(S, 1, D / 2) complex64 for frames at `positions`, ready to broadcast over heads."""
        return torch.cat([self.frame(position) for position in positions]).unsqueeze(1)

    def forget(self, before: int) -> None:
        """Drop positions below `before`: absolute positions never come back, and a stream may be endless."""
        for position in [p for p in self._frames if 0 < p < before]:
            del self._frames[position]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate (B, S, H, D) by (S, 1, D / 2); computed in float32, returned in the dtype of `x`."""
    if x.shape[-1] % 16 == 0 and elementwise.applies(x, x.shape[-2] * x.shape[-1]):
        return elementwise.rotate(x, rotation)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
