"""e4m3 products, one scale per token and one per output: PyTorch's row-wise `_scaled_mm`, and a stand-in.

The tensor cores that multiply e4m3 came with compute capability 8.9. Elsewhere the codes can only be read back as
numbers and multiplied in floating point, which keeps the error and the bytes but wins no time: `simulated`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.errors import RunError
from ispa_deploy.regions import region
from quant.kernels_stored import StoredKernel
from quant.primitives import Activations, quantise_rows_fp8, rescale

CAPABILITY = (8, 9)


@dataclass(frozen=True)
class _Float8Kernel(StoredKernel):
    """What the kernels of this file share: activation and weight codes in e4m3, the weight (N, K) as it is stored."""

    activations: Activations = "float8"

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `quant.kernels.Kernel`."""
        assert step is None, "e4m3 activations are quantised as they come"
        return quantise_rows_fp8(x, factor)


class _ScaledMm(_Float8Kernel):
    """`torch._scaled_mm`, row-wise: K and N in sixteens, bfloat16 out, float32 accumulation in full."""

    def fits(self, features: int, outputs: int) -> bool:
        return features > 0 and outputs > 0 and features % 16 == 0 and outputs % 16 == 0

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        # Asked here, because on a CPU the call is accepted for some shapes and multiplies in floating point.
        if codes.device.type != "cuda" or torch.cuda.get_device_capability(codes.device) < CAPABILITY:
            raise RunError("no e4m3 tensor cores (compute capability 8.9 or newer)")
        with region("linear.gemm"):
            y = torch._scaled_mm(
                codes, packed.t(), scale_a=scale, scale_b=column[None], out_dtype=torch.bfloat16,
                bias=None if bias is None else bias.to(torch.bfloat16), use_fast_accum=False,
            )  # fmt: skip
        return y.to(dtype)


class _Simulated(_Float8Kernel):
    """The codes read back and multiplied in float32: no faster than floating point, and named so."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        with region("linear.gemm"):
            product = torch.mm(codes.to(torch.float32), packed.to(torch.float32).t())
        with region("linear.dequantise"):
            return rescale(product.mul_(column), scale, bias, dtype)


SCALED_MM = _ScaledMm("fp8 _scaled_mm row-wise")
SIMULATED = _Simulated("simulated fp8", exact=False)
