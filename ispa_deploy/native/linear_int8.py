"""Products of int8 codes by the kernel of `linear_int8.c`, for CPUs with AVX2: exact sums, both scales and the bias."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ispa_deploy.native import LINEAR, library, refusal

WIDTH = 16
"""Columns of a panel of the packed weight."""
_FORMS = {torch.bfloat16: 0, torch.float32: 1, torch.int32: 2}


class _Product(ctypes.Structure):
    """`Product` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "row", "column", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "features", "columns", "form")),
    )


def pack(codes: Tensor) -> Tensor:
    """(N, K) int8 -> the same numbers as the kernel reads them, padded with zeros to whole panels.

    What is returned says (N, K) and the padded row length in its shape and strides, and nothing else by them: read it
    with `unpack` alone.
    """
    outputs, features = codes.shape
    rows, columns = -(-outputs // WIDTH) * WIDTH, -(-features // 2) * 2
    padded = torch.nn.functional.pad(codes, (0, columns - features, 0, rows - outputs))
    panels = padded.view(rows // WIDTH, WIDTH, columns // 2, 2).transpose(1, 2).contiguous()
    return panels.as_strided((outputs, features), (columns, 1))


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`, exact."""
    outputs, features = packed.shape
    panels, pairs = -(-outputs // WIDTH), -(-features // 2)
    stored = packed.as_strided((panels, pairs, WIDTH, 2), (pairs * 2 * WIDTH, 2 * WIDTH, 2, 1))
    return stored.transpose(1, 2).reshape(panels * WIDTH, pairs * 2)[:outputs, :features].contiguous()


def product(
    codes: Tensor, packed: Tensor, row: Tensor | None, column: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """codes (M, K) int8 times a packed weight (N, K), transposed: sums as they are in int32, or in bfloat16 or float32
    times column (N,) and row (M, 1), float32, plus bias (N,).

    Raises ValueError where there is no library.
    """
    native = library(LINEAR)
    if native is None:
        raise ValueError(refusal(LINEAR))
    whole = dtype == torch.int32
    assert whole or (row is not None and column is not None), "scales are left out of int32 sums alone"
    codes, (outputs, features) = codes.contiguous(), packed.shape
    y = torch.empty(len(codes), outputs, dtype=dtype)
    native.ispa_linear_int8_room.restype = ctypes.c_int64
    room = torch.empty(native.ispa_linear_int8_room(ctypes.c_int64(features)), dtype=torch.uint8)
    factors = [None if x is None or whole else x.to(torch.float32).contiguous() for x in (row, column, bias)]
    tensors = (None if x is None else x.data_ptr() for x in (codes, packed, *factors, y))
    call = _Product(*tensors, len(codes), features, outputs, _FORMS[dtype])
    native.ispa_linear_int8(ctypes.byref(call), ctypes.c_void_p(room.data_ptr()))
    return y
