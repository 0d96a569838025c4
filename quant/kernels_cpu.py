"""int8 products on the CPU: oneDNN with unsigned activations, a C kernel for AVX2, PyTorch's `_int_mm`, and a stand-in.

Without VNNI instructions oneDNN's sums saturate, so it is refused; the C kernel takes its place, exact and about 1.5
times as fast as float32. `_int_mm`, left where there is no C compiler, is then many times slower than float32.

oneDNN is fast only with uint8 activations (zero point 128): signed ones fall to its reference loop, thousands of times
slower. It scales by columns inside the product; the row scale and the bias need a pass of their own, which like the
quantiser is memory-bound and therefore compiled where that pays and a C++ compiler exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.native import elementwise, linear_int8
from ispa_deploy.passes import Norm
from ispa_deploy.regions import region
from quant.kernels_stored import BaseKernel
from quant.primitives import (
    CODE_MAX,
    ZERO_POINT,
    fixed_scale,
    inverse_step,
    join_wide,
    quantise_fixed,
    quantise_rows,
    quantise_wide_rows,
    rescale,
    row_scale,
)

# Compiling costs about 4 s per process, 25 s where the compiler's caches are cold, and wins 0-25 % of a layer's time.
# So by default only passes over real chunks ask for it (4680 x 1536, not 1560 x 1536); `accelerate` lowers the bar.
COMPILE_FROM = 6 << 20
ACCELERATED_FROM = 1 << 19
# Rows per step of the eager passes: the float32 scratch of a step stays in the cache.
STEP = 128
# Rows of 16-bit activations per product, whose float32 sums are small beside a chunk's own tensors.
WIDE_STEP = 512


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one place that asks for a compiler. Dynamic shapes: one compilation for all layers, and as fast as static."""
    return torch.compile(function, dynamic=True, fullgraph=True)


@dataclass(slots=True)
class _Accelerated:
    """A memory-bound pass: compiled for large inputs, eager for small ones and for ever after a failed compilation.

    Both forms give the same bits, so which of them ran shows in the time alone.
    """

    plain: Callable[..., Any]
    eager: Callable[..., Any]
    threshold: int = COMPILE_FROM
    compiled: Callable[..., Any] | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if x.numel() < self.threshold or self.failure is not None:
            return self.eager(x, *rest)
        try:
            self.compiled = self.compiled or _compile(self.plain)
            return self.compiled(x, *rest)
        except Exception as error:  # no compiler, no headers, no cache folder: each raises its own; eager needs none
            lines = str(error).strip().splitlines()
            self.failure = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            return self.eager(x, *rest)


def _codes(x: Tensor, factor: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    return quantise_rows(x, factor, unsigned=unsigned)


def _codes_eager(x: Tensor, factor: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """`quantise_rows` in steps of rows with one scratch: 3-4 times faster than whole tensors, same bits."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.uint8 if unsigned else torch.int8)
    scale = torch.empty(m, 1)
    values, magnitudes = torch.empty(2, min(m, STEP), k).unbind(0)
    for start in range(0, m, STEP):
        part = x[start : start + STEP]
        v, a, s = values[: len(part)], magnitudes[: len(part)], scale[start : start + STEP]
        v.copy_(part)
        if factor is not None:
            v.mul_(factor)
        s.copy_(row_scale(torch.abs(v, out=a).amax(dim=-1, keepdim=True)))
        v.mul_(1.0 / s).round_()
        codes[start : start + STEP] = v.add_(ZERO_POINT) if unsigned else v
    return codes, scale


def _fixed(x: Tensor, step: Tensor, factor: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    return quantise_fixed(x, step, factor, unsigned=unsigned)


def _fixed_eager(x: Tensor, step: Tensor, factor: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """`quantise_fixed` in steps of rows with one scratch, same bits."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.uint8 if unsigned else torch.int8)
    total, inverse = torch.empty(m, 1), inverse_step(step, factor)
    values = torch.empty(min(m, STEP), k)
    for start in range(0, m, STEP):
        part = x[start : start + STEP]
        v = values[: len(part)]
        v.copy_(part).mul_(inverse).round_()
        torch.sum(v, dim=-1, keepdim=True, out=total[start : start + STEP])
        v.clamp_(-CODE_MAX, CODE_MAX)
        codes[start : start + STEP] = v.add_(ZERO_POINT) if unsigned else v
    return codes, fixed_scale(total, step)


def _rescale_eager(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`rescale` in steps of rows, over the product itself where the dtypes allow."""
    m, n = product.shape
    y = product if product.dtype == dtype else torch.empty(m, n, dtype=dtype)
    values = torch.empty(min(m, STEP), n)
    for start in range(0, m, STEP):
        v = values[: min(STEP, m - start)]
        v.copy_(product[start : start + STEP]).mul_(scale[start : start + STEP])
        y[start : start + STEP] = v if bias is None else v.add_(bias)
    return y


_QUANTISE = _Accelerated(_codes, _codes_eager)
_FIXED = _Accelerated(_fixed, _fixed_eager)
_RESCALE = _Accelerated(rescale, _rescale_eager)


def accelerate() -> None:
    """For benchmarks and long runs: let medium inputs compile too (the first one pays seconds)."""
    for accelerated in (_QUANTISE, _FIXED, _RESCALE):
        accelerated.threshold = ACCELERATED_FROM


def compile_note() -> str | None:
    """One line, to be printed once, when a pass had to run eagerly for want of a compiler; None when there is none."""
    reason = _QUANTISE.failure or _FIXED.failure or _RESCALE.failure
    return None if reason is None else f"int8: activation passes run uncompiled, layers up to 1.2x slower ({reason})"


def _finish(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with region("linear.dequantise"), torch.no_grad():
        if dtype in (torch.bfloat16, torch.float32) and elementwise.applies(product, product.shape[-1], wide=True):
            return elementwise.rescale(product, scale, bias, dtype)
        y: Tensor = _RESCALE(product, scale, bias, dtype)
    return y


def _join(product: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """`join_wide` into y."""
    with region("linear.dequantise"), torch.no_grad():
        if y.dtype in (torch.bfloat16, torch.float32) and elementwise.applies(product, y.shape[1], wide=True):
            elementwise.join_wide(product, scale, bias, y)
        else:
            y.copy_(join_wide(product, scale, bias))


@dataclass(frozen=True)
class _CpuKernel(BaseKernel):
    """What the kernels of this file share."""

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `quant.kernels.Kernel`."""
        if step is None and self.unsigned and elementwise.applies(x, x.shape[-1], wide=True):
            return elementwise.quantise(x, factor)
        with torch.no_grad():
            if step is None:
                codes, scale = _QUANTISE(x, factor, self.unsigned)
            else:
                codes, scale = _FIXED(x, step, factor, self.unsigned)
        return codes, scale

    def pack(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes themselves."""
        return packed

    def quantise_wide(self, x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `quant.kernels_wide.WideBase`."""
        if self.unsigned and elementwise.applies(x, x.shape[-1], wide=True):
            return elementwise.quantise_wide(x, factor)
        codes = torch.empty(len(x), 2 * x.shape[1], dtype=torch.uint8 if self.unsigned else torch.int8)
        scale = torch.empty(len(x), 1)
        with torch.no_grad():
            for start in range(0, len(x), STEP):
                rows = slice(start, start + STEP)
                codes[rows], scale[rows] = quantise_wide_rows(x[rows], factor, unsigned=self.unsigned)
        return codes, scale

    def multiply_wide(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `quant.kernels_wide.WideBase`."""
        y = torch.empty(len(codes), len(column), dtype=dtype)
        bias = None if bias is None else bias.to(torch.float32)
        for start in range(0, len(codes), WIDE_STEP):
            rows = slice(start, start + WIDE_STEP)
            pairs = codes[rows].reshape(2 * len(y[rows]), -1)
            _join(self._of_columns(pairs, packed, column), scale[rows], bias, y[rows])
        return y

    def _of_columns(self, codes: Tensor, packed: Tensor, column: Tensor) -> Tensor:
        """(M, N) float32, scaled by columns alone."""
        return self.multiply(codes, torch.ones(len(codes), 1), packed, column, None, torch.float32)


class _OneDnn(_CpuKernel):
    """`onednn.qlinear_pointwise`. Its packed form unpacks exactly, so no second copy of the codes is kept."""

    def pack(self, codes: Tensor) -> Tensor:
        assert codes.is_contiguous(), "the packing ignores strides"
        return torch.ops.onednn.qlinear_prepack(codes, None)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.to_dense().t().contiguous()

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return _finish(self._product(codes, packed, column, dtype), scale, bias, dtype)

    def _of_columns(self, codes: Tensor, packed: Tensor, column: Tensor) -> Tensor:
        return self._product(codes, packed, column, torch.float32)

    def _product(self, codes: Tensor, packed: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, N), scaled by columns alone."""
        # A bfloat16 product halves the traffic and rounds once more (2e-3 beside the 1e-2 of eight bits).
        narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        with region("linear.gemm"):
            none = torch.zeros(len(column), dtype=torch.int32)
            return torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, ZERO_POINT, packed, column, none, None, 1.0, 0, narrow, "none", [], ""
            )

    def multiply_gelu_quantise(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype,
        after: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes and scales of GELU (tanh) of the product, for the next layer of this kind: one pass for three."""
        product = self._product(codes, packed, column, dtype)
        with region("linear.quantise"):
            return elementwise.gelu_quantise(product, scale, bias, after)

    def fuses_gelu(self, x: Tensor, columns: int) -> bool:
        """Whether the pass behind the product takes rows of so many columns in the dtype of x."""
        return elementwise.applies(x, columns, wide=True)

    def fuses_norm(self, x: Tensor, columns: int) -> bool:
        """Whether `begin` and `normalise` take them."""
        return elementwise.applies(x, columns)

    def begin(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> elementwise.Unscaled:
        """The product, which `normalise` scales and adds."""
        return elementwise.Unscaled(self._product(codes, packed, column, dtype), scale, bias)

    def normalise(self, x: Tensor, y: Any, gate: Tensor | None, how: Norm | None) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and its norm, y from `begin`."""
        scale, shift, eps, modulates = (None, None, 0.0, False) if how is None else how
        return elementwise.residual_norm(x, y, gate, scale, shift, eps, modulates)

    def normalise_quantise(
        self, x: Tensor, y: Any, gate: Tensor | None, how: Norm, factor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + gate * y; codes and scales of its norm times `factor`; y a tensor, or from `begin`."""
        return elementwise.residual_norm_quantise(x, y, gate, *how, factor)


class _OneDnnStatic(_OneDnn):
    """The same product where all rows share one scale: it and the bias go into the call, and no pass follows."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        bad = scale.isnan().flatten()
        step = float(scale.nan_to_num(0.0).amax()) or 1.0  # all rows are bad: any finite step
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        with region("linear.gemm"):
            none = torch.zeros(len(column), dtype=torch.int32)
            bias = None if bias is None else bias.to(torch.float32)
            y = torch.ops.onednn.qlinear_pointwise(
                codes, step, ZERO_POINT, packed, column, none, bias, 1.0, 0, wide, "none", [], ""
            )
        if bool(bad.any()):
            y[bad] = float("nan")
        return y.to(dtype)


class _Avx2(_CpuKernel):
    """The C kernel: scales and bias within the product, its own packed form, which unpacks exactly."""

    def pack(self, codes: Tensor) -> Tensor:
        return linear_int8.pack(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        return linear_int8.unpack(packed)

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        with region("linear.gemm"):
            return linear_int8.product(codes, packed, scale, column, bias, narrow).to(dtype)


class _IntMm(_CpuKernel):
    """`torch._int_mm`: int32 out, both scales in the pass after it."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        with region("linear.gemm"):
            product = torch._int_mm(codes, packed.t())
        with region("linear.dequantise"):
            product = product * column
        return _finish(product, scale, bias, dtype)


class _Simulated(_CpuKernel):
    """The codes multiplied in float32: right to rounding, no faster than floating point, and named so."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        with region("linear.gemm"):
            product = torch.mm(codes.to(torch.float32), packed.to(torch.float32).t()).mul_(column)
        return _finish(product, scale, bias, dtype)


ONEDNN = _OneDnn("int8 onednn u8s8", activations="uint8")
ONEDNN_STATIC = _OneDnnStatic("int8 onednn u8s8, static", activations="uint8")
AVX2 = _Avx2("int8 avx2 s8s8")
INT_MM = _IntMm("int8 _int_mm s8s8")
SIMULATED = _Simulated("simulated", exact=False)
KERNELS = (ONEDNN, AVX2, INT_MM)
STATIC_KERNELS = (ONEDNN_STATIC, AVX2, INT_MM)
