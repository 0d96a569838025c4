"""A correction of low rank: what of ΔW the rows can tell apart, and the exact price of leaving out the rest.

Reduced-rank regression: with V the top r eigenvectors of ΔW G ΔWᵀ (O, O), ΔW_r = V Vᵀ ΔW is the matrix of rank r that
changes the layer's outputs on the rows of the fit least; the SVD of ΔW would be that for rows of white noise. The
certificate is the error of eq. 6 with ΔW_r less the error with ΔW, both from the sums. Without a ridge it is the sum of
the eigenvalues that were left out; a ridge λ adds 2λ‖ΔW − ΔW_r‖².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.absorb.solve import Solution
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.errors import InputError


@dataclass(frozen=True)
class Rank:
    """`count` directions, or as few as hold this `share` of the eigenvalues' sum."""

    count: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        assert (self.count is None) != (self.share is None)
        if self.count is not None and self.count < 1:
            raise InputError(f"delta rank {self.count}: expected 1 or more")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"delta rank auto:{self.share}: expected a share above 0 and up to 1, as in auto:0.99")

    def check(self, width: int) -> None:
        """InputError for more directions than there are."""
        if self.count is not None and self.count > width:
            raise InputError(f"delta rank {self.count}: expected 1 to {width}, the model's width")

    def of(self, values: Tensor) -> int:
        """The rank for these eigenvalues, largest first."""
        if self.share is None:
            return min(self.count or 1, len(values))
        short = int((values.cumsum(0) < self.share * values.sum()).sum())
        return min(short + 1, len(values))


@dataclass(frozen=True)
class Truncation:
    """ΔW_r = `weight` (O, r) `down` (r, I) and its bias change (O,) or None, float64; `kept` of the eigenvalues' sum;
    `residual` on the rows of the fit, and its exact `increase` over that of the whole ΔW. As in a `Solution`, who only
    wants the figures drops the tensors."""

    weight: Tensor | None
    down: Tensor | None
    bias: Tensor | None
    rank: int
    kept: float
    residual: float
    increase: float


def truncate(stats: Statistics, solution: Solution, rank: Rank) -> Truncation:
    """The best part of that rank of a solution on its own rows, its bias fitted anew."""
    assert solution.weight is not None
    weight, gram = solution.weight.double(), stats.gram.double()
    local_sum = stats.local_sum.double()
    if solution.bias is not None:
        gram = gram - torch.outer(local_sum, local_sum) / stats.rows
    values, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
    values = values.flip(0).clamp_min(0)
    count = rank.of(values)
    up = vectors.flip(1)[:, :count].contiguous()
    down = up.T @ weight
    bias = None
    if solution.bias is not None:
        gap = stats.weight.to(gram.device).double() @ stats.gap_sum.double()
        bias = (gap - up @ (down @ local_sum)) / stats.rows
    residual = stats.residual(up @ down, bias)
    total = float(values.sum())
    kept = float(values[:count].sum()) / total if total > 0 else 1.0
    return Truncation(up, down, bias, count, kept, residual, residual - solution.residual)
