"""Second-order statistics of what the history adds to a layer's attention output.

Legend: R rows (tokens of a pass), I inputs of the output projection `o`, O its outputs. Row vectors, as in the paper: a
row `a` of A_loc and the gap `e` of A_full - A_loc enter `o` as rows, and W = o.weight.T.

Only sums are kept, so memory does not grow with the stream and ΔW, its error on these rows and on any other split
follow without a second pass (paper eq. 4-6). W is never copied: a layer's own tensor is referred to, and one that is
stored otherwise is made anew for each use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ispa_deploy.native import sums

Weight = Tensor | Callable[[], Tensor]
"""(O, I), or what makes it on every call."""

_HALF = (torch.bfloat16, torch.float16)
# From this width on, the upper triangle of G in blocks is faster than the square (0.6x at 768, 0.7x at 1536).
_BLOCKS_FROM, _BLOCKS = 512, 4
_FADED = 2.0**-24
"""What older rows count at the least before the squares are scaled for it: newer ones count its inverse until then."""


class Statistics:
    """G = Σ aᵀa and H = Σ aᵀe (I, I), s = Σ ‖eW‖², a₁ = Σ a, e₁ = Σ e (I,) and the row count n.

    Totals are `dtype` (float32 or float64) on `device`; products are formed in the same dtype on the rows' own device.
    """

    def __init__(self, weight: Weight, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None):
        self._weight = weight
        sample = self.weight
        device = sample.device if device is None else torch.device(device)
        width = sample.shape[1]
        self._gram, self._half = torch.zeros(width, width, dtype=dtype, device=device), False
        self._cross, self._whole = torch.zeros_like(self._gram), False
        self.local_sum = torch.zeros(width, dtype=dtype, device=device)
        self.gap_sum = torch.zeros_like(self.local_sum)
        self._energy = torch.zeros((), dtype=torch.float64, device=sample.device)
        self.projected: Tensor | None = None
        """H W (I, O) float64 where it is known: what `projected_cross` gives."""
        self._fade = 1.0
        self.rows = 0.0

    @property
    def weight(self) -> Tensor:
        """(O, I) as the layer holds it."""
        return self._weight() if callable(self._weight) else self._weight

    @property
    def gram(self) -> Tensor:
        """G, both triangles of it."""
        self._settle()
        if self._half:
            self._gram, self._half = self._gram.triu() + self._gram.triu(1).T, False
        return self._gram

    @gram.setter
    def gram(self, total: Tensor) -> None:
        self._settle()
        self._gram, self._half = total, False

    @property
    def cross(self) -> Tensor:
        """H, off which G has been taken where rows of A_full were summed."""
        self._settle()
        self._part_from_gram()
        return self._cross

    def _settle(self) -> None:
        """Squares as they count now."""
        if self._fade != 1.0:
            for square in (self._gram, self._cross):
                square.mul_(self._fade)
            self._fade = 1.0

    @property
    def gap_energy(self) -> float:
        """s. It is summed where the rows are: reading it waits for the device, so nothing does before the solve."""
        return float(self._energy)

    def update(
        self, local: Tensor, gap: Tensor, *, weight: float = 1.0, energy_dtype: torch.dtype | None = None
    ) -> None:
        """Add rows a (R, I) and e (R, I), each counting `weight` times. `energy_dtype`: what s is projected in."""
        a, e = local.to(self._cross.dtype), gap.to(self._cross.dtype)
        self._part_from_gram()
        counts = weight / self._fade
        if a.device == self._cross.device:
            self._half = _add_square_(self._gram, a, counts) or self._half
            self._cross.addmm_(a.T, e, alpha=counts)
        else:
            self._gram.add_((a.T @ a).to(self._gram.device), alpha=counts)
            self._cross.add_((a.T @ e).to(self._gram.device), alpha=counts)
        self._count(a.sum(0), e.sum(0), len(a), weight)
        self._spend(e.to(energy_dtype or e.dtype), weight)

    def update_pair(self, local: Tensor, full: Tensor, *, weight: float = 1.0) -> None:
        """Add rows of A_loc (R, I) and A_full (R, I), each counting `weight` times, in the dtype attention gave them.

        s is a sum of squares: projected in the 16 bits that the rows came in, it is off by 1e-5 of itself. On CUDA and
        by the C kernel such rows are also multiplied as they are, with float32 sums: their products are exact in
        float32, and H = Σ aᵀ(a + e) - G needs no rounded e. float32 products take ten times as long on CUDA.
        """
        halves = local.dtype in _HALF and self._cross.dtype == torch.float32
        if halves and local.is_cuda:
            self.update_halves(local, full, weight=weight)
        elif sums.applies(local, full, self._cross):
            self._update_natively(local, full, weight)
        else:
            gap = full.float() - local.float()
            self.update(local, gap, weight=weight, energy_dtype=local.dtype if halves else None)

    def update_halves(self, local: Tensor, full: Tensor, *, weight: float = 1.0) -> None:
        """`update_pair` for rows of 16 bits; one product (I, I) at a time lies beside the totals."""
        self._part_from_gram()
        counts = weight / self._fade
        product = _exact_product(local, local).to(self._gram.device)
        self._gram.add_(product, alpha=counts)
        self._cross.sub_(product, alpha=counts)
        del product
        self._cross.add_(_exact_product(local, full).to(self._gram.device), alpha=counts)
        near = local.sum(0, dtype=torch.float32)
        self._count(near, full.sum(0, dtype=torch.float32) - near, len(local), weight)
        self._spend(full - local, weight)

    def _update_natively(self, local: Tensor, full: Tensor, weight: float) -> None:
        """G is taken off H once, when somebody reads it: the kernel sums only the upper triangle of G."""
        if not self._whole and self.rows:
            self._cross.add_(self.gram)
        near, far = sums.add_sums(local, full, self._gram, self._cross, weight / self._fade)
        self._half = self._whole = True
        self._count(near, far - near, len(local), weight)
        self._spend(full - local, weight)

    def _part_from_gram(self) -> None:
        """Before rows of the gap are summed: H without the G that rows of A_full brought into it."""
        if self._whole:
            self._cross.sub_(self.gram)
            self._whole = False

    def _count(self, a: Tensor, e: Tensor, rows: int, weight: float) -> None:
        self.projected = None
        self.local_sum.add_(a.to(self.local_sum.device), alpha=weight)
        self.gap_sum.add_(e.to(self.gap_sum.device), alpha=weight)
        self.rows += weight * rows

    def _spend(self, gap: Tensor, weight: float) -> None:
        projected = gap @ self.weight.T.to(gap.device, gap.dtype)
        squares = projected.float().square_() if gap.dtype in _HALF else projected.square()
        self._energy.add_(squares.sum(dtype=torch.float64).to(self._energy.device), alpha=weight)

    def scale(self, factor: float) -> None:
        """Let every row so far count `factor` times what it did: exponential forgetting when called once a chunk.

        The squares are left as they are, and later rows count more in them.
        """
        self.projected = None
        for total in (self.local_sum, self.gap_sum, self._energy):
            total.mul_(factor)
        self.rows *= factor
        self._fade *= factor
        if self._fade < _FADED:
            self._settle()

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows."""
        return self._like(lambda name: getattr(self, name) + getattr(other, name), self.rows + other.rows)

    def to(self, device: torch.device) -> Statistics:
        """The same sums on another device; themselves where they are there already."""
        if self._cross.device == device:
            return self
        return self._like(lambda name: getattr(self, name).to(device), self.rows)

    def _like(self, total: Callable[[str], Tensor], rows: float) -> Statistics:
        made = object.__new__(Statistics)
        made._weight, made.rows, made.projected, made._fade = self._weight, rows, None, 1.0
        made._gram, made._cross, made._half, made._whole = total("gram"), total("cross"), False, False
        made.local_sum, made.gap_sum, made._energy = total("local_sum"), total("gap_sum"), total("_energy")
        return made

    def nbytes(self) -> int:
        """Bytes of the totals; the weight belongs to the layer."""
        return sum(total.nbytes for total in (self._gram, self._cross, self.local_sum, self.gap_sum))

    def residual(self, delta_weight: Tensor, delta_bias: Tensor | None = None) -> float:
        """‖A_loc(W + ΔW) + b − A_full W‖² on these rows (paper eq. 6), for any ΔW (O, I) and bias change b (O,)."""
        delta, cross_w = delta_weight.double().T, self.projected_cross()
        error = self.gap_energy - 2 * inner(delta, cross_w)
        error += sum(float((delta[rows] * (self.gram[rows].double() @ delta)).sum()) for rows in _slices(len(delta)))
        if delta_bias is not None:
            bias = delta_bias.double()
            weight = self.weight.to(self.gram.device).double()
            mean = self.local_sum.double() @ delta - weight @ self.gap_sum.double()
            error += float(self.rows * bias.square().sum() + 2 * bias @ mean)
        return error

    def projected_cross(self) -> Tensor:
        """H W, (I, O) float64, columns contiguous: made once, solve and certificate both ask for it."""
        if self.projected is None:
            weight, cross = self.weight.to(self.cross.device).double(), self.cross
            made = torch.empty_like(weight)
            for rows in _slices(len(cross)):
                torch.mm(cross[rows].double(), weight.T, out=made.T[rows])
            self.projected = made.T
        return self.projected


def inner(a: Tensor, b: Tensor) -> float:
    """tr(aᵀb) of two squares, in parts: no third is made."""
    return sum(float((a[rows] * b[rows]).sum()) for rows in _slices(len(a)))


def _slices(rows: int, step: int = 256) -> list[slice]:
    """Rows in parts: of a wide layer no second float64 copy is made of what is only summed over."""
    return [slice(first, first + step) for first in range(0, rows, step)]


def _add_square_(total: Tensor, rows: Tensor, weight: float) -> bool:
    """total += weight * rowsᵀ rows, (I, I); of a wide one only the upper triangle is right then, and True returned."""
    width = len(total)
    if width < _BLOCKS_FROM or total.is_cuda:
        total.addmm_(rows.T, rows, alpha=weight)
        return False
    step = -(-width // _BLOCKS)
    for first in range(0, width, step):
        total[first : first + step, first:].addmm_(rows[:, first : first + step].T, rows[:, first:], alpha=weight)
    return True


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b (I, I) float32 of 16-bit rows (R, I), summed in float32 without rounding a product."""
    if a.is_cuda:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()
