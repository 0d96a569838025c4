"""The passes of `elementwise.c` on tensors: residual and norm, RMS norm, rotation, quantisation, rescaling, GELU.

Each is one pass over memory where PyTorch takes two to six. All of them expect what `applies` has checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ispa_deploy.native import library

ROW_LIMIT = 16384
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


_INPUTS = ("x", "y", "gate", "scale", "shift", "row_scale", "bias", "by")
_OUTPUTS = ("sum", "normed", "codes", "code_scale")


class _Passage(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in (*_INPUTS, *_OUTPUTS)),
        ("columns", _LONG), ("group", _LONG), ("eps", _FLOAT), ("one", _INT),
    )  # fmt: skip


class Unscaled(NamedTuple):
    """A product that still lacks its row scales and its bias, which the pass that reads it gives it.

    `product` (M, N) bfloat16, `scale` (M, 1) float32, `bias` (N,) or None: product * scale + bias is meant.
    """

    product: Tensor
    scale: Tensor
    bias: Tensor | None


def applies(x: Tensor, columns: int, *, wide: bool = False) -> bool:
    """Whether the C passes take rows of `x`: bfloat16 (or float32, if `wide`) on a CPU, nothing to differentiate."""
    return (
        (x.dtype == torch.bfloat16 or (wide and x.dtype == torch.float32))
        and x.device.type == "cpu"
        and columns % 16 == 0
        and 0 < columns <= ROW_LIMIT
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and library() is not None
    )


def _native() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask `applies` first"
    return found


def _at(x: Tensor | None) -> ctypes.c_void_p:
    return _POINTER(None if x is None else x.data_ptr())


def _groups(table: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """(B, F, 1, C) or (C,) -> rows of C, and how many rows of the activations share one (0: all of them)."""
    if table is None:
        return None, 0
    flat = table.reshape(-1, table.shape[-1]).contiguous()
    return flat, 0 if len(flat) == 1 else rows // len(flat)


def residual_norm(
    x: Tensor, y: Tensor | Unscaled | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float, one: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(x + gate * y, its LayerNorm times (1 + scale if `one`, else scale) plus shift), all bfloat16 (..., C).

    gate, scale and shift: (C,), or (B, F, 1, C) for x of (B, F, T, C). y may be a product that lacks its scales.
    Without y the sum is x; without scale there is no norm.
    """
    normed = None if scale is None else torch.empty(x.shape, dtype=x.dtype)
    return _pass(x, y, gate, scale, shift, eps, one, {"normed": normed}), normed


def residual_norm_quantise(
    x: Tensor, y: Tensor | Unscaled | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, one: bool,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of `residual_norm`; uint8 codes (M, C) and float32 scales (M, 1) of its norm times `by` (C,) float32."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    codes, code_scale = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 1)
    return _pass(x, y, gate, scale, shift, eps, one, {"codes": codes, "code_scale": code_scale}, by), codes, code_scale


def _pass(
    x: Tensor, y: Tensor | Unscaled | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float, one: bool, outputs: dict[str, Tensor | None], by: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill `outputs`, which are contiguous, and return the sum."""
    columns = x.shape[-1]
    x = x.contiguous()
    rows = x.numel() // columns
    added, *factors = (y, None, None) if not isinstance(y, Unscaled) else y
    tables = [_groups(table, rows) for table in (gate, scale, shift)]
    group = max(size for _, size in tables)
    if group:
        # A table of one row among tables of many: every row its own copy.
        tables = [(_repeated(table, rows // group), group) for table, _ in tables]
    added = None if added is None else added.contiguous()
    wide = [None if factor is None else factor.to(torch.float32).contiguous() for factor in (*factors, by)]
    total = x if added is None else torch.empty_like(x)
    given = (x, added, *(table for table, _ in tables), *wide)
    made = {"sum": None if added is None else total, **outputs}
    call = _Passage(*map(_at, given), *(_at(made.get(name)) for name in _OUTPUTS), columns, group, eps, int(one))
    _native().ispa_passage(ctypes.byref(call), _LONG(rows))
    return total


def _repeated(table: Tensor | None, count: int) -> Tensor | None:
    return table if table is None or len(table) == count else table.expand(count, -1).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """bfloat16 (B, S, C), last dimension contiguous -> the same shape, contiguous."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = map(_LONG, (len(rows), columns, rows.stride(0)))
    _native().ispa_rms(_at(rows), _at(weight.contiguous()), _at(y), *sizes, _FLOAT(eps))
    return y


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """bfloat16 (B, S, H, D) by complex64 (S, 1, D / 2) -> (B, S, H, D); D a multiple of 16."""
    batch, tokens, heads, width = x.shape
    rows = x.reshape(batch * tokens, heads * width)
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = map(_LONG, (len(rows), heads, width, rows.stride(0), tokens))
    _native().ispa_rotate(_at(rows), _at(rotation.contiguous()), _at(y), *sizes)
    return y


def quantise(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, K) bfloat16 or float32, times `by` (K,) float32 -> uint8 codes (M, K), zero point 128, and float32 scales
    (M, 1): the bits of `quant.primitives.quantise_rows`."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    return codes, _quantised(_native().ispa_quantise, x, by, codes)


def quantise_wide(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in 16 bits: uint8 codes (M, 2 K) of `quant.primitives.quantise_wide_rows`, bit for bit, and scales."""
    codes = torch.empty(len(x), 2 * x.shape[1], dtype=torch.uint8)
    return codes, _quantised(_native().ispa_quantise_wide, x, by, codes)


def _quantised(into: Callable[..., None], x: Tensor, by: Tensor | None, codes: Tensor) -> Tensor:
    """Fill the codes; the scales (M, 1)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    scale, wide = torch.empty(rows, 1), _INT(x.dtype == torch.float32)
    by = None if by is None else by.contiguous()
    sizes = map(_LONG, (rows, columns, x.stride(0)))
    into(_at(x), wide, *sizes, _at(by), _at(codes), _at(scale))
    return scale


def join_wide(product: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Products (2 M, N) float32 of high and low codes in turns, scales (M, 1), bias (N,) float32 -> into y (M, N)."""
    rows, columns = y.shape
    wide, sizes = _INT(y.dtype == torch.float32), map(_LONG, (rows, columns))
    _native().ispa_join_wide(_at(product), _at(scale), _at(bias), _at(y), wide, *sizes)


def rescale(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool = False) -> Tensor:
    """(M, N) times scale (M, 1) plus bias (N,), then GELU (tanh) if asked, in `dtype`; may write over product."""
    product = product.contiguous()
    rows, columns = product.shape
    y = product if product.dtype == dtype else torch.empty(rows, columns, dtype=dtype)
    wide = (_INT(t.dtype == torch.float32) for t in (product, y))
    factors = scale.contiguous(), None if bias is None else bias.to(torch.float32).contiguous()
    _native().ispa_rescale(
        _at(product), next(wide), *map(_at, factors), _at(y), next(wide), _INT(gelu), _LONG(rows), _LONG(columns)
    )
    return y


def gelu_(x: Tensor) -> Tensor:
    """GELU (tanh) of bfloat16 x (..., C), contiguous, written over it."""
    rows = x.view(-1, x.shape[-1])
    return rescale(rows, torch.ones(len(rows), 1), None, x.dtype, gelu=True).view(x.shape)


def gelu_quantise(
    product: Tensor, scale: Tensor, bias: Tensor | None, by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of product (M, N) times scale (M, 1) plus bias (N,) -> uint8 codes (M, N) and scales (M, 1).

    `by` (N,) float32: what the values are multiplied by before they are quantised.
    """
    product = product.contiguous()
    rows, columns = product.shape
    codes, after = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 1)
    floats = (None if bias is None else bias.to(torch.float32).contiguous(), None if by is None else by.contiguous())
    factors = scale.contiguous(), *floats
    wide = _INT(product.dtype == torch.float32)
    _native().ispa_gelu_quantise(
        _at(product), wide, *map(_at, factors), _at(codes), _at(after), _LONG(rows), _LONG(columns)
    )
    return codes, after
