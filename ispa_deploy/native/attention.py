"""Attention with log-sum-exp by the kernel of `attention.c`: bfloat16 on AVX512-BF16, float32 scores."""

from __future__ import annotations

import ctypes
from math import log

import torch
from torch import Tensor

from ispa_deploy.native import library, refusal

WIDTHS = (32, 64, 96, 128)
_POINTER = ctypes.c_void_p
_SIZES = ctypes.c_int64 * 14


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 q (B, Q, H, D), k and v (B, K, H, D) -> out (B, Q, H, D), lse (B, Q, H) float32.

    Raises ValueError where the kernel does not apply: another dtype, device or head width, or no library.
    """
    native = library()
    if native is None:
        raise ValueError(refusal())
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    if width not in WIDTHS or any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in (q, k, v)):
        raise ValueError(f"bfloat16 on a CPU with heads of {', '.join(map(str, WIDTHS))} only")
    q, k, v = (t if t.stride(-1) == 1 and t.stride(1) % 2 == 0 else t.contiguous() for t in (q, k, v))
    out, lse = torch.empty(batch, queries, heads, width, dtype=q.dtype), torch.empty(batch, queries, heads)
    native.ispa_attention_room.restype = ctypes.c_int64
    room = torch.empty(native.ispa_attention_room(*map(ctypes.c_int64, (batch, heads, keys, width))), dtype=q.dtype)
    sizes = _SIZES(batch, heads, queries, keys, width, *(t.stride(axis) for t in (q, k, v) for axis in range(3)))
    pointers = (_POINTER(t.data_ptr()) for t in (q, k, v, out, lse, room))
    native.ispa_attention(*pointers, sizes, ctypes.c_float(width**-0.5 / log(2.0)))
    return out, lse
