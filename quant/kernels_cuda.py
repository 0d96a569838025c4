"""int8 products on CUDA: a fused Triton kernel, `_int_mm` with an epilogue of its own, a floating-point stand-in.

`_int_mm` writes int32 to memory and reads it back to scale it, which at width 1536 costs more than eight bits win; the
Triton kernel keeps the accumulator in registers and writes the scaled bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.passes import Norm, norm, on_triton
from ispa_deploy.regions import region
from quant.kernels_stored import StoredKernel
from quant.primitives import dequantise_wide, join_wide, quantise_fixed, quantise_rows, quantise_wide_rows, rescale

# `_int_mm` refuses fewer rows on CUDA.
MIN_ROWS = 17


class Unmultiplied(NamedTuple):
    """A product not made yet, as `quant.triton_kernels.int8_linear` takes it."""

    codes: Tensor
    scale: Tensor
    weight: Tensor
    column: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class _CudaKernel(StoredKernel):
    """What the kernels of this file share: signed activation codes, weight codes (N, K) as they are stored."""

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `quant.kernels.Kernel`."""
        return quantise_rows(x, factor) if step is None else quantise_fixed(x, step, factor)

    def quantise_wide(self, x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `quant.kernels_wide.WideBase`."""
        return quantise_wide_rows(x, factor)

    def multiply_wide(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `quant.kernels_wide.WideBase`."""
        pairs = codes.view(2 * len(codes), -1)
        product = self.multiply(pairs, scale.new_ones(len(pairs), 1), packed, column, None, torch.float32)
        with region("linear.dequantise"):
            return join_wide(product, scale, bias).to(dtype)


class _Triton(_CudaKernel):
    """Row quantiser and product in `quant.triton_kernels`, imported on first use."""

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if step is not None:
            return quantise_fixed(x, step, factor)
        from quant.triton_kernels import quantise_rows as fused

        return fused(x, factor)

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        from quant.triton_kernels import int8_linear

        with region("linear.gemm"):
            return int8_linear(codes, scale, packed, column, bias, dtype)

    def quantise_wide(self, x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        if not _widens_right(x.device):
            return super().quantise_wide(x, factor)
        from quant.triton_kernels import quantise_rows as fused

        return fused(x, factor, wide=True)

    def multiply_wide(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not _widens_right(codes.device):
            return super().multiply_wide(codes, scale, packed, column, bias, dtype)
        return self.multiply(codes, scale, packed, column, bias, dtype)  # which tells them by their length

    def multiply_gelu_quantise(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype,
        after: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes and scales of GELU (tanh) of the product, for the next layer of this kind: one pass for two."""
        from quant.triton_kernels import quantise_rows as fused

        product = self.multiply(codes, scale, packed, column, bias, dtype)
        with region("linear.quantise"):
            return fused(product, after, gelu=True)

    def fuses_gelu(self, x: Tensor, columns: int) -> bool:
        """Whether the pass behind the product takes rows of so many columns in the dtype of x."""
        return x.numel() > 0

    def fuses_norm(self, x: Tensor, columns: int) -> bool:
        """Whether `begin` and `normalise` take them."""
        return on_triton(x) and _adds_right(x.device)

    def begin(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Unmultiplied:
        """The operands: `normalise` multiplies them, the residual in the epilogue."""
        return Unmultiplied(codes, scale, packed, column, bias, dtype)

    def normalise(self, x: Tensor, y: Any, gate: Tensor | None, how: Norm | None) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and its norm, y from `begin`."""
        total = _added(x, y, gate)
        return total, None if how is None else norm(total, how)

    def normalise_quantise(
        self, x: Tensor, y: Any, gate: Tensor | None, how: Norm, factor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + gate * y; codes and scales of its norm times `factor`; y a tensor, or from `begin`."""
        from ispa_deploy.triton_passes import residual_norm_quantise

        if isinstance(y, Unmultiplied):
            x, y, gate = _added(x, y, gate), None, None
        return residual_norm_quantise(x, y, gate, *how, factor)


def _added(x: Tensor, y: Unmultiplied, gate: Tensor | None) -> Tensor:
    from quant.triton_kernels import int8_linear

    with region("linear.gemm"):
        return int8_linear(*y, residual=x, gate=gate).view(x.shape)


@functools.cache
def _adds_right(device: torch.device) -> bool:
    """The product with a residual in its epilogue, and codes from the norm's pass, tried once against plain PyTorch."""
    try:
        draw = torch.Generator(device).manual_seed(0)
        codes, weight = (torch.randint(-127, 128, (64, 64), generator=draw, device=device).to(torch.int8) for _ in "ab")
        x = torch.randn(1, 2, 32, 64, generator=draw, device=device).to(torch.bfloat16)
        ones, gate = torch.full((64, 1), 2.0**-14, device=device), x[:, :, :1]
        total = _added(x, Unmultiplied(codes, ones, weight, ones[:, 0] * 2.0**10, ones[:, 0], x.dtype), gate)
        y = codes.float() @ weight.float().t() * 2.0**-18 + 2.0**-14
        want = x.float() + gate.float() * y.view(x.shape)
        how = Norm(x[:, :, :1], x[:, :, 1:2], 1e-6)
        _, got, scale = TRITON.normalise_quantise(x, None, None, how, None)
        exact = F.layer_norm(x.float(), (64,), eps=how.eps) * (1 + how.scale.float()) + how.shift.float()
        near = (got * scale - exact.view(64, 64)).abs() <= 0.51 * scale
        return torch.allclose(total.float(), want, 2e-2, 2e-2) and bool(near.all())
    except Exception:  # a Triton that does not know this card raises its own
        return False


@functools.cache
def _widens_right(device: torch.device) -> bool:
    """Codes of 16 bits and the kernel that joins their products, tried once; where wrong, each has its own product."""
    try:
        from quant.triton_kernels import int8_linear
        from quant.triton_kernels import quantise_rows as fused

        draw = torch.Generator(device).manual_seed(0)
        x = torch.randn(32, 64, generator=draw, device=device).to(torch.bfloat16)
        weight = torch.randint(-127, 128, (64, 64), generator=draw, device=device).to(torch.int8)
        codes, scale = fused(x, wide=True)
        values = dequantise_wide(codes, scale)
        y = int8_linear(codes, scale, weight, torch.full((64,), 2.0**-10, device=device), None, torch.float32)
        want = values.double() @ weight.double().t() * 2.0**-10
        near = (values - x.float()).abs() <= 0.51 * scale
        return bool(near.all()) and torch.allclose(y.double(), want, 1e-5, 1e-5)
    except Exception:  # a Triton that does not know this card raises its own
        return False


class _IntMm(_CudaKernel):
    """`torch._int_mm`: needs K and N in eights, 17 rows, and the weight column-major, which (N, K).t() is."""

    def fits(self, features: int, outputs: int) -> bool:
        return features > 0 and outputs > 0 and features % 8 == 0 and outputs % 8 == 0

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        m = codes.shape[0]
        with region("linear.gemm"):
            rows = codes if m >= MIN_ROWS else F.pad(codes, (0, 0, 0, MIN_ROWS - m))
            product = torch._int_mm(rows, packed.t())[:m]
        with region("linear.dequantise"):
            return rescale(product * column, scale, bias, dtype)


class _Simulated(_CudaKernel):
    """The codes multiplied in float32: no faster than floating point, and named so."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        with region("linear.gemm"):
            product = torch.mm(codes.to(torch.float32), packed.to(torch.float32).t())
        with region("linear.dequantise"):
            return rescale(product.mul_(column), scale, bias, dtype)


TRITON = _Triton("int8 triton fused")
INT_MM = _IntMm("int8 cuda _int_mm")
SIMULATED = _Simulated("simulated", exact=False)
KERNELS = (TRITON, INT_MM)
