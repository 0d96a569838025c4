"""Triton kernels for what lies between matrix products on CUDA: residual + norm + modulation (+ codes), the merge.

One pass over memory each, float32 arithmetic, results rounded once. Importing this file needs triton;
`ispa_deploy.passes` tries the kernels once per device against plain PyTorch. With TRITON_INTERPRET=1 set before the
import they run on CPU tensors: so they are tested without a GPU.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, import-not-found, import-untyped, valid-type"
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_MERGE_ROWS = 16
# Adding and taking away 1.5 * 2^23 rounds a float32 to an integer, half to even, on every back-end alike.
_ROUNDER = tl.constexpr(12582912.0)
_FLOOR = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def whole(values, TOP: tl.constexpr):
    """A row of float32, zero beyond its end -> whole numbers up to TOP, float32, and their step.

    The step is NaN where a value is NaN or Inf. Divisions round to nearest, as PyTorch's do.
    """
    # max drops NaN; this sum is 0 for finite rows and NaN for a row with NaN or Inf.
    poison = tl.sum(values * 0.0, axis=0)
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), TOP), _FLOOR)
    rounded = (values * tl.div_rn(1.0, step) + _ROUNDER) - _ROUNDER
    return tl.minimum(tl.maximum(rounded, -TOP), TOP), step + poison


@triton.jit
def coded(values):
    """A row of float32, zero beyond its end -> int8 codes and their scale: NaN where a value is NaN or Inf."""
    rounded, step = whole(values, 127.0)
    return rounded.to(tl.int8), step


@triton.jit
def _residual_norm_kernel(
    x, y, gate, scale, shift, factor, total, normed, code_scale, columns, gate_group, norm_group, eps,
    ADDS: tl.constexpr, GATED: tl.constexpr, NORMS: tl.constexpr, ONE: tl.constexpr, CODES: tl.constexpr,
    HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        other = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            other *= tl.load(gate + (row // gate_group) * columns + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (values + other).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)  # what later layers will read is what is normed
    if NORMS:
        mean = tl.sum(values, axis=0) / columns
        off = tl.where(inside, values - mean, 0.0)
        deviation = tl.sqrt(tl.sum(off * off, axis=0) / columns + eps)
        table = (row // norm_group) * columns + column
        by = tl.load(scale + table, mask=inside, other=0.0).to(tl.float32)
        if ONE:
            by += 1.0
        plus = tl.load(shift + table, mask=inside, other=0.0).to(tl.float32)
        result = off * (1.0 / deviation) * by + plus
        if CODES:
            if HAS_FACTOR:
                result *= tl.load(factor + column, mask=inside, other=0.0)
            codes, step = coded(result)
            tl.store(normed + at, codes, mask=inside)
            tl.store(code_scale + row, step)
        else:
            tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    a, b, lse_a, lse_b, out, lse, rows, queries, heads, width,
    a_item, a_row, a_head, b_item, b_row, b_head, la_item, la_row, la_head, lb_item, lb_row, lb_head,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    head, query, item = row % heads, row // heads % queries, row // heads // queries
    first = tl.load(lse_a + item * la_item + query * la_row + head * la_head, mask=real, other=0.0)
    second = tl.load(lse_b + item * lb_item + query * lb_row + head * lb_head, mask=real, other=0.0)
    top = tl.maximum(first, second)
    nothing = top == float("-inf")  # two empty sets: any weight serves, both outputs are zero
    base = tl.where(nothing, 0.0, top)
    left, right = tl.exp(first - base), tl.exp(second - base)
    both = left + right
    share = tl.where(nothing, 0.0, left / tl.where(nothing, 1.0, both))
    tl.store(lse + row, tl.where(nothing, top, base + tl.log(tl.where(nothing, 1.0, both))), mask=real)
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < width)[None, :]
    from_a = (item * a_item + query * a_row + head * a_head)[:, None] + column[None, :]
    from_b = (item * b_item + query * b_row + head * b_head)[:, None] + column[None, :]
    one = tl.load(a + from_a, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(b + from_b, mask=inside, other=0.0).to(tl.float32)
    mixed = two + share[:, None] * (one - two)
    tl.store(out + row[:, None] * width + column[None, :], mixed.to(out.dtype.element_ty), mask=inside)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the tensors' own card, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def grouped(table: Tensor | None, rows: int, x: Tensor) -> tuple[Tensor, int]:
    """(B, F, 1, C) or (C,) -> rows of C, and how many rows of the activations share one."""
    if table is None:
        return x, 1  # not read
    flat = table.reshape(-1, table.shape[-1]).contiguous()
    return flat, rows // len(flat)


def residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, one: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ispa_deploy.native.elementwise.residual_norm`: any dtype up to float32; scale and shift in equal rows."""
    normed = None if scale is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _pass(x, y, gate, scale, shift, eps, one, normed), normed


def residual_norm_quantise(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, one: bool,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of `residual_norm`; int8 codes (M, C) and float32 scales (M, 1) of its norm times `by` (C,) float32."""
    columns = x.shape[-1]
    codes = torch.empty(x.numel() // columns, columns, dtype=torch.int8, device=x.device)
    code_scale = torch.empty(len(codes), 1, dtype=torch.float32, device=x.device)
    return _pass(x, y, gate, scale, shift, eps, one, codes, code_scale, by), codes, code_scale


def _pass(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float, one: bool,
    normed: Tensor | None, code_scale: Tensor | None = None, by: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill `normed`, with codes where there is a `code_scale` to fill, and return the sum."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    total = x if y is None else torch.empty_like(x)
    (gates, gate_group), (scales, norm_group), (shifts, _) = (grouped(t, rows, x) for t in (gate, scale, shift))
    block = triton.next_power_of_2(columns)
    with on(x.device):
        _residual_norm_kernel[(rows,)](
            x, x if y is None else y.contiguous(), gates, scales, shifts, x if by is None else by.contiguous(), total,
            x if normed is None else normed, x if code_scale is None else code_scale, columns, gate_group, norm_group,
            eps, ADDS=y is not None, GATED=gate is not None, NORMS=scale is not None, ONE=one,
            CODES=code_scale is not None, HAS_FACTOR=by is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return total


def merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, Q, H, D) with log-sum-exps (B, Q, H) float32 of disjoint key sets -> those of their union."""
    batch, queries, heads, width = a.shape
    a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, b))
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=a.device)
    rows = batch * queries * heads
    strides = [t.stride(axis) for t in (a, b, lse_a, lse_b) for axis in range(3)]
    with on(a.device):
        _merge_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
            a, b, lse_a, lse_b, out, lse, rows, queries, heads, width, *strides,
            ROWS=_MERGE_ROWS, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
    return out, lse
