"""Attention over int8 keys and values with log-sum-exp, by the kernel of `attention_int8.c`: AVX512-VNNI or AVX2."""

from __future__ import annotations

import ctypes
from math import log

import torch
from torch import Tensor

from ispa_deploy.native import INT8, library, refusal

WIDTHS = (32, 64, 96, 128)
_SIZES = ctypes.c_int64 * 21
_TENSORS = ctypes.c_void_p * 10


def attention(
    name: str,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    out: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q (B, Q, H, D) in bfloat16 or float32, keys and values as int8 codes (B, K, H, D) with float16 scales
    (B, K, H, 1) -> out (B, Q, H, D) in the dtype of q, lse (B, Q, H) float32.

    `name`: of `native.INT8`. `out` and `lse` are those of other keys, which are joined; None: there are none.
    Raises ValueError where the kernel does not apply: another dtype, device or head width, or no library.
    """
    native = library(INT8[name])
    if native is None:
        raise ValueError(refusal(INT8[name]))
    batch, queries, heads, width = q.shape
    count = keys[0].shape[1]
    if width not in WIDTHS or q.dtype not in (torch.bfloat16, torch.float32) or q.device.type != "cpu":
        raise ValueError(f"bfloat16 and float32 on a CPU with heads of {', '.join(map(str, WIDTHS))} only")
    read = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, *keys, *values)]
    before = [None if tensor is None else tensor.contiguous() for tensor in (out, lse)]
    made = torch.empty(batch, queries, heads, width, dtype=q.dtype), torch.empty(batch, queries, heads)
    native.ispa_attention_int8_room.restype = ctypes.c_int64
    room = native.ispa_attention_int8_room(*map(ctypes.c_int64, (batch, heads, count, width)))
    tensors = [*read, *made, torch.empty(room, dtype=torch.uint8), *before]
    sizes = [batch, heads, queries, count, width, int(q.dtype == torch.float32)]
    native.ispa_attention_int8(
        _TENSORS(*(None if tensor is None else tensor.data_ptr() for tensor in tensors)),
        _SIZES(*sizes, *(tensor.stride(axis) for tensor in read for axis in range(3))),
        ctypes.c_float(width**-0.5 / log(2.0)),
    )
    return made
