"""Which rows of a pass statistics are taken from: enough of them, evenly spaced, at another offset each pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORTH_SKIPPING = 1.5
_GOLDEN = (math.sqrt(5) - 1) / 2


def stride_of(rows: int, per_width: int | None, width: int) -> float:
    """One row in how many is taken so that of `rows` at least `per_width` times the layer's width are left.

    1, every row, for `per_width` None and where less than a third would be spared.
    """
    stride = 1.0 if per_width is None else rows / (per_width * width)
    return stride if stride >= _WORTH_SKIPPING else 1.0


def thinned(count: int, stride: float, phase: int) -> Tensor:
    """(R,) int64: numbers of the rows taken of `count`, at least count / stride of them.

    Each `phase` starts elsewhere: a fixed offset could meet the same image columns in every pass.
    """
    taken = math.ceil(count / stride)
    rows = (torch.arange(taken, dtype=torch.float64) + phase * _GOLDEN % 1) * (count / taken)
    return rows.long().clamp_(max=count - 1)
