"""Second-order statistics of what the history adds to a layer's attention output.

Legend: R rows (tokens of a pass), I inputs of the output projection `o`, O its outputs. Row vectors, as in the paper: a
row `a` of A_loc and the gap `e` of A_full - A_loc enter `o` as rows, and W = o.weight.T.

Only sums are kept, so memory does not grow with the stream and ΔW, its error on these rows and on any other split
follow without a second pass (paper eq. 4-6).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """G = Σ aᵀa and H = Σ aᵀe (I, I), s = Σ ‖eW‖², a₁ = Σ a, e₁ = Σ e (I,) and the row count n.

    Totals are `dtype` (float32 or float64) on `device`; products are formed in the same dtype on the rows' own device.
    """

    def __init__(self, weight: Tensor, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None):
        device = weight.device if device is None else torch.device(device)
        width = weight.shape[1]
        self.weight = weight.to(dtype)
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)
        self.cross = torch.zeros_like(self.gram)
        self.local_sum = torch.zeros(width, dtype=dtype, device=device)
        self.gap_sum = torch.zeros_like(self.local_sum)
        self.gap_energy = 0.0
        self.rows = 0.0

    def update(self, local: Tensor, gap: Tensor, *, weight: float = 1.0) -> None:
        """Add rows a (R, I) and e (R, I), each counting `weight` times."""
        a, e = local.to(self.gram.dtype), gap.to(self.gram.dtype)
        if a.device == self.gram.device:
            self.gram.addmm_(a.T, a, alpha=weight)
            self.cross.addmm_(a.T, e, alpha=weight)
        else:
            self.gram.add_((a.T @ a).to(self.gram.device), alpha=weight)
            self.cross.add_((a.T @ e).to(self.gram.device), alpha=weight)
        self.local_sum.add_(a.sum(0).to(self.gram.device), alpha=weight)
        self.gap_sum.add_(e.sum(0).to(self.gram.device), alpha=weight)
        projected = e @ self.weight.T.to(e.device)
        self.gap_energy += weight * float(projected.square().sum(dtype=torch.float64))
        self.rows += weight * len(a)

    def scale(self, factor: float) -> None:
        """Let every row so far count `factor` times what it did: exponential forgetting when called once a chunk."""
        for total in (self.gram, self.cross, self.local_sum, self.gap_sum):
            total.mul_(factor)
        self.gap_energy *= factor
        self.rows *= factor

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows."""
        both = Statistics(self.weight, dtype=self.gram.dtype, device=self.gram.device)
        for name in ("gram", "cross", "local_sum", "gap_sum", "gap_energy", "rows"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def nbytes(self) -> int:
        """Bytes of the totals; the weight belongs to the layer."""
        return sum(total.nbytes for total in (self.gram, self.cross, self.local_sum, self.gap_sum))

    def residual(self, delta_weight: Tensor, delta_bias: Tensor | None = None) -> float:
        """‖A_loc(W + ΔW) + b − A_full W‖² on these rows (paper eq. 6), for any ΔW (O, I) and bias change b (O,)."""
        delta, cross_w = delta_weight.double().T, self.projected_cross()
        error = (delta * (self.gram.double() @ delta)).sum() - 2 * (delta * cross_w).sum() + self.gap_energy
        if delta_bias is not None:
            bias = delta_bias.double()
            weight = self.weight.to(self.gram.device).double()
            mean = self.local_sum.double() @ delta - weight @ self.gap_sum.double()
            error = error + self.rows * bias.square().sum() + 2 * bias @ mean
        return float(error)

    def projected_cross(self) -> Tensor:
        """H W, (I, O) float64."""
        return self.cross.double() @ self.weight.to(self.cross.device).double().T
