"""Triton kernels of the int8 linear: quantise rows, and multiply with both scales and the bias in the epilogue.

M rows, K input features, N output features. Importing this file needs triton; `quant.kernels_cuda` does so on first
use. With TRITON_INTERPRET=1 set before the import the kernels run on CPU tensors: so they are tested without a GPU.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, import-not-found, import-untyped, valid-type"
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ispa_deploy.triton_passes import coded, grouped, on, whole
from quant.primitives import HIGH, WIDE_MAX


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=warps, num_stages=stages)


# Hopper: tiles of 64 rows per warp group, two operand tiles of up to three stages inside 228 KiB of shared memory.
_CONFIGS = [
    _config(64, 64, 128, 4, 4),
    _config(64, 128, 128, 4, 4),
    _config(128, 128, 64, 4, 4),
    _config(128, 128, 128, 4, 3),
    _config(128, 128, 64, 8, 4),
    _config(128, 128, 128, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 256, 128, 8, 3),
    _config(256, 128, 128, 8, 3),
]
# int32 of a tile's accumulators that a thread may hold: with more, its 255 registers do not do for the rest.
_HELD = 128
# The interpreter cannot time anything; one configuration leaves it nothing to choose.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HIGH, _WIDE_MAX = tl.constexpr(float(HIGH)), tl.constexpr(float(WIDE_MAX))


def _fitting(configs: list[triton.Config], _: dict[str, object], **options: object) -> list[triton.Config]:
    """The configurations whose accumulators a thread can hold; rows of two codes have two."""
    held = _HELD // (2 if options["WIDE"] else 1)
    return [one for one in configs if one.kwargs["BLOCK_M"] * one.kwargs["BLOCK_N"] <= held * 32 * one.num_warps]


@triton.jit
def _quantise_kernel(
    x, codes, scale, factor, K, stride,
    GELU: tl.constexpr, HAS_FACTOR: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        cubic = values + 0.044715 * values * values * values
        values = values / (1.0 + tl.exp(tl.minimum(-1.5957691216057308 * cubic, 80.0)))
    if HAS_FACTOR:
        values *= tl.load(factor + column, mask=inside, other=0.0)
    if WIDE:
        both, step = whole(values, _WIDE_MAX)
        high = tl.floor((both + _HIGH / 2) * (1 / _HIGH))  # exact: whole numbers, a power of two
        tl.store(codes + row * 2 * K + column, high.to(tl.int8), mask=inside)
        tl.store(codes + row * 2 * K + K + column, (both - high * _HIGH).to(tl.int8), mask=inside)
    else:
        rounded, step = coded(values)
        tl.store(codes + row * K + column, rounded, mask=inside)
    tl.store(scale + row, step)


@triton.autotune(
    configs=_CONFIGS[:1] if _INTERPRETED else _CONFIGS,
    key=["ROWS", "N", "K", "WIDE"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _linear_kernel(
    codes, weight, y, row_scale, column_scale, bias, residual, gate, M, N, K, ROWS, gate_group,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs walk down GROUP_M row tiles before the next column tile, so that weight tiles are found in L2.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside_group = tile % (GROUP_M * tiles_n)
    m = (group * GROUP_M + inside_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N

    a = codes + m.to(tl.int64)[:, None] * (2 * K if WIDE else K) + k[None, :]
    b = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if WIDE:
        low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        left = tl.load(a + start, mask=in_m[:, None] & in_k[None, :], other=0)
        right = tl.load(b + start, mask=in_k[:, None] & in_n[None, :], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        if WIDE:
            beside = tl.load(a + K + start, mask=in_m[:, None] & in_k[None, :], other=0)
            low = tl.dot(beside, right, low, out_dtype=tl.int32)

    rows = tl.load(row_scale + m, mask=in_m, other=0.0)
    columns = tl.load(column_scale + n, mask=in_n, other=0.0)
    out = total.to(tl.float32)
    if WIDE:
        out = out * _HIGH + low.to(tl.float32)
    out = out * columns[None, :] * rows[:, None]
    if HAS_BIAS:
        out += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if ADDS:
        if GATED:
            own = (m // gate_group).to(tl.int64)[:, None] * N + n[None, :]
            out *= tl.load(gate + own, mask=inside, other=0.0).to(tl.float32)
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def quantise_rows(
    x: Tensor, factor: Tensor | None = None, *, gelu: bool = False, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """(M, K) float, rows contiguous -> int8 codes (M, K) and float32 scales (M, 1); see `quant.primitives`.

    `gelu`: of GELU (tanh) of x. `factor` (K,) float32: what the values are multiplied by before they are quantised.
    `wide`: codes (M, 2 K) of `quant.primitives.quantise_wide_rows`.
    """
    x = (x if x.dtype != torch.float64 else x.float()).contiguous()
    m, k = x.shape
    codes = torch.empty(m, 2 * k if wide else k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    with on(x.device):
        _quantise_kernel[(m,)](
            x, codes, scale, scale if factor is None else factor.contiguous(), k, x.stride(0), GELU=gelu,
            HAS_FACTOR=factor is not None, WIDE=wide, BLOCK=block, num_warps=4 if block <= 4096 else 8,
            enable_fp_fusion=False,  # or ties fall otherwise than in PyTorch, which rounds the product before the sum
        )  # fmt: skip
    return codes, scale


def int8_linear(
    codes: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    residual: Tensor | None = None, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """int8 (M, K) by int8 (N, K), scales (M, 1) and (N,) float32, bias (N,) -> y (M, N) in `dtype`.

    Codes (M, 2 K) are those of `quantise_rows(wide=True)`: two products of every weight tile, joined in float32.
    With `residual` (..., N), of M rows, it is residual + gate * y instead, rounded once; gate (N,) or (B, F, 1, N), for
    equal numbers of rows. Tuned once per N, K, kind of codes and power of two of M; the first such call takes seconds.
    """
    m, (n, k) = codes.shape[0], weight.shape
    wide = codes.shape[1] == 2 * k
    for operand in (codes, weight):
        assert operand.is_contiguous(), "the kernel walks rows of K"
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    gates, group = grouped(gate, m, y)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    with on(codes.device):
        _linear_kernel[grid](
            codes, weight, y, row_scale, column_scale, column_scale if bias is None else bias.contiguous(),
            y if residual is None else residual.contiguous(), gates, m, n, k, triton.next_power_of_2(m), group,
            HAS_BIAS=bias is not None, ADDS=residual is not None, GATED=gate is not None, WIDE=wide,
        )  # fmt: skip
    return y
