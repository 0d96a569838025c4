"""int8 products of other packages behind the same façade: torchao's `Int8Tensor`, bitsandbytes' LLM.int8.

Both quantise the activations themselves and by rules of their own (torchao: amax / 127.5; bitsandbytes: in float16, so
that beyond 65504 a row overflows), so they are handed floating-point rows. Both take our weight codes as they are,
-128 included. Imported on the first product: torchao takes 2.4 s, bitsandbytes 1.2 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from ispa_deploy.regions import region
from quant.kernels_stored import StoredKernel
from quant.primitives import Activations, watch_rows

# bitsandbytes stores 127 times the scale.
SCB_PER_SCALE = 127.0


@dataclass(frozen=True)
class _PackageKernel(StoredKernel):
    """What the kernels of this file share: floating-point rows in, weight codes (N, K) as they are stored."""

    activations: Activations = "float"

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows as they are, or multiplied by `factor`; only those that are not finite are noted."""
        assert step is None, "the package quantises as it goes"
        return watch_rows(x, factor)


class _TorchAo(_PackageKernel):
    """`Int8DynamicActivationInt8WeightConfig(version=2)`: symmetric, per token and per output channel."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        x = codes if codes.dtype != torch.float64 else codes.to(torch.float32)
        with region("linear.gemm"):
            y = torch.nn.functional.linear(
                x, torchao_tensor(packed, column[:, None], x.dtype), None if bias is None else bias.to(x.dtype)
            )
        return _poisoned(y, scale, dtype)


class _BitsAndBytes(_PackageKernel):
    """`Linear8bitLt(has_fp16_weights=False, threshold=0)` in eval mode: float16 in and out, int8 product.

    On a CPU the product is `torch._int_mm` and the passes around it are plain float16: right, and slow.
    """

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        bitsandbytes = import_module("bitsandbytes")  # not imported by name: its types are there or not, as it is
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = packed, column * SCB_PER_SCALE
        state.has_fp16_weights = state.is_training = False
        half = codes.to(torch.float16)  # here, where it is no warning on every call
        overflow = half.abs().amax(dim=-1, keepdim=True).isinf()
        with region("linear.gemm"), torch.no_grad():
            y = bitsandbytes.matmul(half, packed, state=state, bias=None if bias is None else bias.to(torch.float16))
        return _poisoned(y, torch.where(overflow, float("nan"), scale), dtype)


def _poisoned(y: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) with NaN in the rows whose scale (M, 1) is NaN."""
    bad = scale.isnan()
    return (y.masked_fill(bad, float("nan")) if bool(bad.any()) else y).to(dtype)


def torchao_tensor(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) int8 codes and (N, 1) float32 scales, neither copied, as torchao's weight for layers of `dtype`."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs

    return Int8Tensor(
        codes, scale, [1, codes.shape[1]], dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )  # fmt: skip


TORCHAO = _TorchAo("int8 torchao")
BITSANDBYTES = _BitsAndBytes("int8 bitsandbytes")
