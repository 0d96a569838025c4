"""The closed form: ΔW = (G + λI)⁻¹ H W by Cholesky in float64 (paper eq. 5), with its certificate.

With an intercept the same system is solved on centred statistics and the mean that is left over becomes a change of the
bias, at no cost when running. λ is absolute (the paper's 0.001) or relative, λ = ρ · tr(G) / I: an absolute one means
something else for every number of rows and every scale of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.absorb.stats import Statistics, inner
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

    `certified` False leaves the condition number out (NaN), for a fit that is only tried.
    """
    # In this order and in place: of a wide layer three squares lie beside its sums, no more.
    cross_w = stats.projected_cross()
    gap_w = stats.weight.to(cross_w.device).double() @ stats.gap_sum.double()
    gram = _centred_gram(stats, intercept)
    if not (gram.sum().isfinite() and cross_w.sum().isfinite()):  # of a sum: it needs no room beside the squares
        return _failure(stats, "failed: the statistics hold NaN or Inf")
    if stats.rows == 0 or not gram.any():
        return _failure(stats, "failed: no rows with history were seen")
    effective_rank = float(gram.trace() ** 2 / gram.norm().square())
    strength, floor = ridge.strength(gram), 1e-12 * float(gram.diagonal().mean())
    factor, strength, raised = _factorise(gram, strength, floor, lambda: _centred_gram(stats, intercept))
    if factor is None:
        return _failure(stats, f"failed: G + λI is not positive definite up to λ = {strength:.3g}")
    del gram
    delta = cross_w.clone()  # columns contiguous, as the solver takes them without a copy
    if intercept:
        delta.addr_(stats.local_sum.double(), gap_w, alpha=-1 / stats.rows)
    _solve_by(factor, delta)
    condition = _condition(factor) if certified else math.nan
    del factor  # as large as the solution: a wide layer has no room for it beside what follows
    moved = stats.local_sum.double() @ delta
    bias = (gap_w - moved) / stats.rows if intercept else None
    # The normal equations stand in for G ΔW: ε = s - tr((HW)ᵀΔW) - λ‖ΔW‖², of centred sums with an intercept.
    residual = stats.gap_energy - inner(cross_w, delta) - strength * inner(delta, delta)
    if intercept:
        residual -= float((gap_w - moved) @ gap_w) / stats.rows
    weight = delta.T
    return Solution(
        weight=weight,
        bias=bias,
        ridge=strength,
        condition=condition,
        effective_rank=effective_rank,
        residual=residual,
        gap=stats.gap_energy,
        status=f"ridge raised x10^{raised}" if raised else "ok",
    )


def _centred_gram(stats: Statistics, intercept: bool) -> Tensor:
    """G in float64, of rows about their mean if `intercept`."""
    gram = stats.gram.to(torch.float64, copy=True)
    if intercept and stats.rows > 0:
        near = stats.local_sum.double()
        gram.addr_(near, near, alpha=-1 / stats.rows)
    return gram


def _factorise(
    gram: Tensor, strength: float, floor: float, again: Callable[[], Tensor]
) -> tuple[Tensor | None, float, int]:
    """Cholesky of G + λI in the place of G, which a failure spoils and `again` makes anew.

    λ grows tenfold while that fails, from a floor that float64 can tell from zero.
    """
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    for raised in range(RETRIES + 1):
        gram.diagonal().add_(strength)
        torch.linalg.cholesky_ex(gram, out=(gram, info))
        if not info:
            return gram, strength, raised
        strength, gram = max(10 * strength, floor), again()
    return None, strength, RETRIES


def _solve_by(factor: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ right, in its place: `torch.cholesky_solve` copies both."""
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    return torch.linalg.solve_triangular(factor.T, right, upper=True, out=right)


def _condition(factor: Tensor, steps: int = 30) -> float:
    """Largest over smallest eigenvalue of L Lᵀ by power and inverse iteration: products, not a decomposition."""
    start = torch.ones(len(factor), 1, dtype=factor.dtype, device=factor.device)
    start += torch.arange(len(factor), device=factor.device).unsqueeze(1) / len(factor)
    largest, smallest = start, start.clone()
    for _ in range(steps):
        largest, smallest = factor @ (factor.T @ largest), _solve_by(factor, smallest)
        top, bottom = largest.norm(), smallest.norm()
        largest, smallest = largest / top, smallest / bottom
    return float(top * bottom)


def _failure(stats: Statistics, status: str) -> Solution:
    nan = float("nan")
    return Solution(None, None, nan, nan, nan, nan, stats.gap_energy, status)
