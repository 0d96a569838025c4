"""Sums of outer products by the kernel of `sums.c`: bfloat16 rows on AVX512-BF16, float32 totals."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ispa_deploy.native import library

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


def applies(a: Tensor, f: Tensor, totals: Tensor) -> bool:
    """Whether `add_sums` takes bfloat16 rows a and f (R, I) into float32 totals (I, I), all on a CPU."""
    return (
        a.dtype == f.dtype == torch.bfloat16
        and totals.dtype == torch.float32
        and a.device.type == totals.device.type == "cpu"
        and a.shape[1] % 16 == 0
        and library() is not None
    )


def add_sums(a: Tensor, f: Tensor, gram: Tensor, cross: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """gram += weight aᵀa, of which only the upper triangle is right then, and cross += weight aᵀf, (I, I) float32.

    a, f: (R, I) bfloat16. Returns the sums over rows of both, (I,) float32. Expects what `applies` has checked.
    """
    native = library()
    assert native is not None, "ask `applies` first"
    assert gram.is_contiguous()
    assert cross.is_contiguous()
    a, f = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (a, f))
    count, width = a.shape
    for asked in (native.ispa_sums_room, native.ispa_sums_columns):
        asked.restype = ctypes.c_int64
    room = torch.empty(native.ispa_sums_room(_LONG(width)), dtype=torch.int32)
    sums = torch.zeros(2, native.ispa_sums_columns(_LONG(width)))
    sizes = map(_LONG, (count, width, a.stride(0), f.stride(0)))
    totals = (_POINTER(total.data_ptr()) for total in (gram, cross, sums, room))
    native.ispa_sums(_POINTER(a.data_ptr()), _POINTER(f.data_ptr()), *sizes, ctypes.c_float(weight), *totals)
    return sums[0, :width], sums[1, :width]
