"""Triton kernel of attention over int8 keys and values with log-sum-exp: products of codes on int8 tensor cores.

See `ispa_deploy.attention_int8` for the arithmetic. Weights times the values' scales are rounded to bfloat16, which
holds every code exactly; float32 queries keep float32 weights. Importing this file needs triton; `attention_int8`
tries the kernel once per device. With TRITON_INTERPRET=1 set before the import it runs on CPU tensors: so it is tested
without a GPU.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, import-not-found, import-untyped, valid-type"
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

# Adding and taking away 1.5 * 2^23 rounds a float32 to an integer, half to even, on every back-end alike.
_ROUNDER = tl.constexpr(12582912.0)
_FLOOR = tl.constexpr(1e-30)
_LN2 = tl.constexpr(log(2.0))


def _config(m: int, n: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


_CONFIGS = [_config(64, 64, 4, 3), _config(128, 64, 4, 3), _config(128, 64, 8, 3), _config(128, 128, 8, 2)]
# The interpreter cannot time anything; one configuration leaves it nothing to choose.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.autotune(configs=_CONFIGS[:1] if INTERPRETED.value else _CONFIGS, key=["SIZE", "BLOCK_D"])
@triton.jit
def _attention_kernel(
    q, k, k_scale, v, v_scale, out, lse, out_before, lse_before, queries, keys, heads, width, scale,
    q_item, q_row, q_head, k_item, k_row, k_head, ks_item, ks_row, ks_head,
    v_item, v_row, v_head, vs_item, vs_row, vs_head, SIZE,
    JOINS: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    m, n, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = (m < queries)[:, None] & (d < width)[None, :]
    x = tl.load(q + item * q_item + head * q_head + m.to(tl.int64)[:, None] * q_row + d[None, :], mask=real, other=0.0)
    x = x.to(tl.float32)
    top = tl.max(tl.abs(x), axis=1)
    step = tl.where(top < _FLOOR, 1.0, top / 127.0)
    codes = (((x / step[:, None]) + _ROUNDER) - _ROUNDER).to(tl.int8)
    # max drops NaN; this sum is 0 for finite rows and NaN for a row with NaN or Inf.
    factor = step * scale + tl.sum(x * 0.0, axis=1)

    row = (item * queries + m) * heads + head
    at = row[:, None] * width + d[None, :]
    reference = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if JOINS:
        reference = tl.load(lse_before + row, mask=m < queries, other=0.0) / _LN2
        total = tl.where(reference == float("-inf"), 0.0, 1.0)
        sums = tl.load(out_before + at, mask=real, other=0.0).to(tl.float32) * total[:, None]

    k += item * k_item + head * k_head
    v += item * v_item + head * v_head
    k_scale += item * ks_item + head * ks_head
    v_scale += item * vs_item + head * vs_head
    for start in range(0, keys, BLOCK_N):
        here = (start + n).to(tl.int64)
        inside = here < keys
        key = tl.load(k + here[None, :] * k_row + d[:, None], mask=inside[None, :] & (d < width)[:, None], other=0)
        by = tl.load(k_scale + here * ks_row, mask=inside, other=0.0).to(tl.float32)
        scores = tl.dot(codes, key, out_dtype=tl.int32).to(tl.float32) * factor[:, None] * by[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(reference, tl.max(scores, axis=1))
        weights, fade = tl.exp2(scores - higher[:, None]), tl.exp2(reference - higher)
        total = total * fade + tl.sum(weights, axis=1)
        reference = higher
        by = tl.load(v_scale + here * vs_row, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + here[:, None] * v_row + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0)
        weights *= by[None, :]
        if not WIDE:
            weights = weights.to(tl.bfloat16)
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        product: tl.constexpr = tl.float32 if WIDE or INTERPRETED else tl.bfloat16
        more = tl.dot(weights.to(product), value.to(product), input_precision="ieee")
        sums = sums * fade[:, None] + more

    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=real)
    tl.store(lse + row, (reference + tl.log2(total)) * _LN2, mask=m < queries)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the tensors' own card, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attention(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, Q, H, D) of any dtype up to float32, codes (B, K, H, D) int8 and scales (B, K, H, 1) float16 of K > 0 keys
    and their values -> out (B, Q, H, D) in the dtype of q, lse (B, Q, H) float32.

    `out` and `lse` are those of other keys, which are joined; None: there are none.
    """
    batch, queries, heads, width = q.shape
    count = keys[0].shape[1]
    read = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, *keys, *values)]
    made = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    made_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    strides = [tensor.stride(axis) for tensor in read for axis in range(3)]
    with _on(q.device):
        _attention_kernel[lambda meta: (triton.cdiv(queries, meta["BLOCK_M"]), batch * heads)](
            *read, made, made_lse, made if out is None else out.contiguous(),
            made_lse if lse is None else lse.contiguous(), queries, count, heads, width, width**-0.5 / log(2.0),
            *strides, triton.next_power_of_2(count), JOINS=out is not None, WIDE=q.dtype == torch.float32,
            BLOCK_D=max(32, triton.next_power_of_2(width)),
        )  # fmt: skip
    return made, made_lse
