"""The closed form: ΔW = (G + λI)⁻¹ H W by Cholesky in float64 (paper eq. 5), with its certificate.

With an intercept the same system is solved on centred statistics and the mean that is left over becomes a change of the
bias, at no cost when running. λ is absolute (the paper's 0.001) or relative, λ = ρ · tr(G) / I: an absolute one means
something else for every number of rows and every scale of activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.errors import InputError

RETRIES = 6
"""Factor-of-ten increases of λ that are tried, and reported, before a layer is given up."""


@dataclass(frozen=True)
class Ridge:
    """λ = `absolute` + `relative` · tr(G) / I."""

    absolute: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.absolute < math.inf and 0 <= self.relative < math.inf):
            raise InputError(f"ridge {self.absolute} + {self.relative} tr(G)/I: expected finite numbers from 0 on")

    def strength(self, gram: Tensor) -> float:
        return self.absolute + self.relative * float(gram.diagonal().mean())


@dataclass(frozen=True)
class Solution:
    """ΔW (O, I) and bias change (O,) or None in float64, both None where a delta was made of them; λ used; condition of
    G + λI; effective rank tr(G)²/‖G‖²_F; `residual` on the rows of the fit and `gap`, what it was without ΔW. `status`:
    `ok`, `ridge raised x10^k` or `failed: why`."""

    weight: Tensor | None
    bias: Tensor | None
    ridge: float
    condition: float
    effective_rank: float
    residual: float
    gap: float
    status: str

    @property
    def failed(self) -> bool:
        return self.status.startswith("failed")


def solve(stats: Statistics, ridge: Ridge, *, intercept: bool = False, certified: bool = True) -> Solution:
    """Ridge regression of the gap's projection on the local rows; never raises on bad numbers, says so in `status`.

    `certified` False leaves condition and residual out (NaN): half the time, for a fit that is only tried.
    """
    gram, cross_w = stats.gram.to(torch.float64, copy=True), stats.projected_cross()
    if intercept and stats.rows > 0:
        gap_w = stats.weight.to(gram.device).double() @ stats.gap_sum.double()
        near = stats.local_sum.double()
        gram.addr_(near, near, alpha=-1 / stats.rows)
        cross_w = torch.addr(cross_w, near, gap_w, alpha=-1 / stats.rows)
    if not (gram.isfinite().all() and cross_w.isfinite().all()):
        return _failure(stats, "failed: the statistics hold NaN or Inf")
    if stats.rows == 0 or not gram.any():
        return _failure(stats, "failed: no rows with history were seen")
    strength = ridge.strength(gram)
    factor, strength, raised = _factorise(gram, strength)
    if factor is None:
        return _failure(stats, f"failed: G + λI is not positive definite up to λ = {strength:.3g}")
    delta = torch.cholesky_solve(cross_w, factor)
    del cross_w
    condition = _condition(gram, strength, factor) if certified else math.nan
    effective_rank = float(gram.trace() ** 2 / gram.norm().square())
    del gram, factor  # each as large as the solution: a wide layer has no room for them beside what follows
    bias = (gap_w - stats.local_sum.double() @ delta) / stats.rows if intercept else None
    weight = delta.T.contiguous()
    del delta
    return Solution(
        weight=weight,
        bias=bias,
        ridge=strength,
        condition=condition,
        effective_rank=effective_rank,
        residual=stats.residual(weight, bias) if certified else math.nan,
        gap=stats.gap_energy,
        status=f"ridge raised x10^{raised}" if raised else "ok",
    )


def _factorise(gram: Tensor, strength: float) -> tuple[Tensor | None, float, int]:
    """Cholesky of G + λI; λ grows tenfold while that fails, from a floor that float64 can tell from zero."""
    floor, diagonal = 1e-12 * float(gram.diagonal().mean()), gram.diagonal().clone()
    for raised in range(RETRIES + 1):
        gram.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(gram)
        gram.diagonal().copy_(diagonal)
        if not info:
            return factor, strength, raised
        strength = max(10 * strength, floor)
    return None, strength, RETRIES


def _condition(gram: Tensor, strength: float, factor: Tensor, steps: int = 30) -> float:
    """Largest over smallest eigenvalue of G + λI by power and inverse iteration: products, not a decomposition."""
    start = torch.ones(len(gram), 1, dtype=gram.dtype, device=gram.device)
    start += torch.arange(len(gram), device=gram.device).unsqueeze(1) / len(gram)
    largest, smallest = start, start
    for _ in range(steps):
        largest = gram @ largest + strength * largest
        smallest = torch.cholesky_solve(smallest, factor)
        top, bottom = largest.norm(), smallest.norm()
        largest, smallest = largest / top, smallest / bottom
    return float(top * bottom)


def _failure(stats: Statistics, status: str) -> Solution:
    nan = float("nan")
    return Solution(None, None, nan, nan, nan, nan, stats.gap_energy, status)
