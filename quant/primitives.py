"""The arithmetic of 8-bit linear layers as pure functions: codes (int8, e4m3), scales, their product, their error.

M rows (tokens), K input features, N output features. A code q with scale s stands for q * s. Scales are amax / 127, so
codes made here lie in -127..127; codes made elsewhere may hold -128 and every kernel must multiply it exactly.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ispa_deploy.errors import InputError

# What a kernel takes the activations as; `x2`: two codes for each of 16 bits; `float`: it quantises them itself.
Activations = Literal["uint8", "int8", "uint8x2", "int8x2", "float8", "float"]

CODE_MAX = 127
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
ZERO_POINT = 128
# A code of 16 bits is HIGH times one of 8 bits plus another; the largest whose parts both fit.
HIGH = 256
WIDE_MAX = HIGH * CODE_MAX + CODE_MAX
# A row of zeros gets this scale instead of 0, so that it divides; its reciprocal is still finite in float32.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
# The largest K whose sum of 255 * 128 products stays inside int32.
MAX_FEATURES = (2**31 - 1) // (255 * 128)
# Wide intermediates are made for this many elements at a time, so that they stay small beside a large weight.
_BLOCK = 1 << 18


def check_finite(weight: Tensor, name: str) -> Tensor:
    """(N, K), K > 0 -> float32 largest magnitude per row (N, 1). Raises `InputError` naming a non-finite weight."""
    weight = weight.detach()
    amax = torch.cat([weight[rows].abs().amax(dim=1, keepdim=True) for rows in _blocks(weight)]).to(torch.float32)
    bad = int((~torch.isfinite(amax)).sum())
    if bad:
        raise InputError(f"{name}: {bad} of {len(amax)} rows hold NaN or Inf, expected finite weights; check the file")
    return amax


def quantise_weight(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """(N, K) of any float dtype -> int8 codes (N, K) contiguous and float32 scales (N, 1), symmetric per row.

    Rounds half to even. Raises `InputError` naming `name` when a value is not finite.
    """
    weight = weight.detach()
    scale = (check_finite(weight, name) / CODE_MAX).clamp_min(SCALE_FLOOR)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _blocks(weight):
        codes[rows] = torch.round(weight[rows].to(torch.float32) / scale[rows]).clamp_(-CODE_MAX, CODE_MAX)
    return codes, scale


def row_scale(amax: Tensor) -> Tensor:
    """(M, 1) float32 largest magnitudes -> scales. NaN where the row holds NaN or Inf, so its whole output is NaN."""
    return torch.where(torch.isfinite(amax), amax / CODE_MAX, float("nan")).clamp_min(SCALE_FLOOR)


def widened(x: Tensor, factor: Tensor | None) -> Tensor:
    """x (M, K) in float32, times `factor` (K,) where there is one."""
    values = x.to(torch.float32)
    return values if factor is None else values * factor


def quantise_rows(x: Tensor, factor: Tensor | None = None, *, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """(M, K) of any float dtype, times `factor` (K,) -> codes (M, K) and float32 scales (M, 1), symmetric per row.

    `unsigned` stores the code as uint8 with zero point 128, the form x86 multiplies; otherwise int8.
    A row that holds NaN or Inf gets the scale NaN and unspecified codes: nothing is clipped silently.
    """
    values = widened(x, factor)
    scale = row_scale(values.abs().amax(dim=-1, keepdim=True))
    codes = torch.round(values * (1.0 / scale))
    return ((codes + ZERO_POINT).to(torch.uint8) if unsigned else codes.to(torch.int8)), scale


def quantise_wide_rows(x: Tensor, factor: Tensor | None = None, *, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """(M, K) of any float dtype, times `factor` (K,) -> codes (M, 2 K) and float32 scales (M, 1) = amax / 32639.

    A row is K high codes in -127..127 and then K low ones in -128..127, for values of high * 256 + low; `unsigned`
    stores both with zero point 128. A row that holds NaN or Inf gets the scale NaN and unspecified codes.
    """
    values = widened(x, factor)
    amax = values.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(torch.isfinite(amax), amax / WIDE_MAX, float("nan")).clamp_min(SCALE_FLOOR)
    whole = torch.round(values * (1.0 / scale))
    high = torch.floor((whole + HIGH // 2) / HIGH)  # exact: whole numbers far below 2^24
    codes = torch.cat([high, whole - high * HIGH], dim=-1)
    return ((codes + ZERO_POINT).to(torch.uint8) if unsigned else codes.to(torch.int8)), scale


def join_wide(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Products (2 M, N) of high and low codes in turns, row scales (M, 1), bias (N,) -> float32 (M, N)."""
    high, low = product.to(torch.float32).unflatten(0, (-1, 2)).unbind(1)
    y = (high * HIGH + low) * scale
    return y if bias is None else y + bias


def dequantise_wide(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (M, 2 K) of `quantise_wide_rows` and scales (M, 1) -> float32 (M, K)."""
    high, low = dequantise(codes, torch.ones_like(scale)).chunk(2, dim=-1)
    return (high * HIGH + low) * scale


def quantise_weight_fp8(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """(N, K) of any float dtype -> e4m3 codes (N, K) contiguous and float32 scales (N, 1) = amax / 448.

    Raises `InputError` naming `name` when a value is not finite.
    """
    weight = weight.detach()
    scale = (check_finite(weight, name) / FLOAT8_MAX).clamp_min(SCALE_FLOOR)
    codes = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
    for rows in _blocks(weight):
        codes[rows] = (weight[rows].to(torch.float32) / scale[rows]).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return codes, scale


def quantise_rows_fp8(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, K) of any float dtype, times `factor` (K,) -> e4m3 codes (M, K) and float32 scales (M, 1) = amax / 448.

    A row that holds NaN or Inf gets the scale NaN.
    """
    values = widened(x, factor)
    amax = values.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(torch.isfinite(amax), amax / FLOAT8_MAX, float("nan")).clamp_min(SCALE_FLOOR)
    return (values * (1.0 / scale)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def quantise_fixed(
    x: Tensor, step: Tensor, factor: Tensor | None = None, *, unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    """(M, K) and one calibrated step (1,) float32 -> codes (M, K) and that step for every row, float32 (M, 1).

    `factor` (K,), powers of two: what x is multiplied by first; it goes into the division by the step.

    What lies outside the calibrated range saturates at 127 steps: that is what static means. A row that holds NaN or
    Inf still gets the scale NaN.
    """
    rounded = torch.round(x.to(torch.float32) * inverse_step(step, factor))
    codes = rounded.clamp(-CODE_MAX, CODE_MAX)
    codes = (codes + ZERO_POINT).to(torch.uint8) if unsigned else codes.to(torch.int8)
    return codes, fixed_scale(rounded.sum(dim=-1, keepdim=True), step)


def inverse_step(step: Tensor, factor: Tensor | None) -> Tensor:
    """What an input is multiplied by on its way to codes: (1,), or (K,) with a factor, a power of two, in it."""
    inverse = 1.0 / step
    return inverse if factor is None else inverse * factor


def fixed_scale(total: Tensor, step: Tensor) -> Tensor:
    """Row sums (M, 1), which NaN and Inf survive, and the step (1,) -> scales (M, 1), NaN where a sum is not finite."""
    return torch.where(torch.isfinite(total), step, float("nan"))


def watch_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, K) for a kernel that quantises for itself -> x and (M, 1) float32: 1, or NaN where the row is not finite.

    With a `factor` (K,) x is multiplied by it first: such a kernel has no pass of ours to do it in.
    """
    x = x if factor is None else x * factor.to(x.dtype)
    finite = torch.isfinite(x.abs().amax(dim=-1, keepdim=True))
    return x, torch.where(finite, 1.0, float("nan")).to(torch.float32)


def quantise_as(x: Tensor, activations: Activations, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, K) float, times `factor` (K,) -> what a kernel of that kind takes, and (M, 1) float32.

    Plain operations, for compiled graphs.
    """
    if activations == "float":
        return watch_rows(x, factor)
    if activations == "float8":
        return quantise_rows_fp8(x, factor)
    if activations in ("uint8x2", "int8x2"):
        return quantise_wide_rows(x, factor, unsigned=activations == "uint8x2")
    return quantise_rows(x, factor, unsigned=activations == "uint8")


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (R, K), int8, e4m3 or uint8 with zero point 128, and scales (R, 1) -> float32 (R, K)."""
    values = codes.to(torch.float32)  # always a copy
    if codes.dtype == torch.uint8:
        values -= ZERO_POINT
    return values.mul_(scale)


def rescale(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(M, N) products, row scales (M, 1), bias (N,) -> product * scale + bias, computed in float32, in `dtype`."""
    y = product.to(torch.float32) * scale
    return (y if bias is None else y + bias).to(dtype)


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """Reference product of codes (M, K), int8 or uint8 with zero point 128, and (N, K) int8: exact int64 (M, N)."""
    rows = codes.to(torch.int64)
    return (rows - ZERO_POINT if codes.dtype == torch.uint8 else rows) @ weight.to(torch.int64).t()


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantisation noise in dB, summed in float64. inf where nothing was lost, 0 where all was."""
    noise = power = torch.zeros((), dtype=torch.float64, device=reference.device)
    for rows in _blocks(reference):
        signal = reference[rows].to(torch.float64)
        noise = noise + (signal - approximation[rows].to(torch.float64)).square().sum()
        power = power + signal.square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(power / noise)) if power > 0 else float("-inf")


def _blocks(tensor: Tensor) -> list[slice]:
    """Slices of rows of at most `_BLOCK` elements, or of one row."""
    if tensor.ndim == 0:
        return [slice(None)]
    step = max(1, _BLOCK * len(tensor) // max(1, tensor.numel()))
    return [slice(start, start + step) for start in range(0, max(1, len(tensor)), step)]
