"""int8 products on CUDA: a fused Triton kernel, `_int_mm` with an epilogue of its own, a floating-point stand-in.

`_int_mm` writes int32 to memory and reads it back to scale it, which at width 1536 costs more than eight bits win; the
Triton kernel keeps the accumulator in registers and writes the scaled bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.regions import region
from quant.kernels_stored import StoredKernel
from quant.primitives import quantise_fixed, quantise_rows, rescale

# `_int_mm` refuses fewer rows on CUDA.
MIN_ROWS = 17


class _CudaKernel(StoredKernel):
    """What the kernels of this file share: signed activation codes, weight codes (N, K) as they are stored."""

    def quantise(
        self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `quant.kernels.Kernel`."""
        return quantise_rows(x, factor) if step is None else quantise_fixed(x, step, factor)


class _Triton(_CudaKernel):
    """Row quantiser and product in `quant.triton_kernels`, imported on first use."""

    def quantise(
        self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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

    def multiply_gelu_quantise(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype,
        after: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes and scales of GELU (tanh) of the product, for the next layer of this kind: one pass for two."""
        from quant.triton_kernels import quantise_rows as fused

        product = self.multiply(codes, scale, packed, column, bias, dtype)
        with region("linear.quantise"):
            return fused(product, after, gelu=True)


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
