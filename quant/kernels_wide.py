"""16-bit activations out of 8-bit products: every code is split into a high and a low one, each multiplied on its own.

The weight is that of an int8 layer and is kept once; both products are exact and are joined in float32. It takes twice
the products of an int8 layer and none of its activations' error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ispa_deploy.regions import region
from quant.primitives import HIGH, ZERO_POINT, Activations, quantise_wide_rows, split_wide

# Rows whose float32 scratch stays in a CPU's cache.
STEP = 128

if TYPE_CHECKING:
    from quant.kernels import Kernel


@dataclass(frozen=True)
class Wide:
    """An int8 kernel called twice. `base` quantises by rows and takes codes of one byte."""

    base: Kernel
    activations: Activations = "int16"

    @property
    def name(self) -> str:
        """Whose products, and that there are two."""
        return f"{self.base.name}, 16-bit activations in two products"

    @property
    def exact(self) -> bool:
        """That of the products."""
        return self.base.exact

    def fits(self, features: int, outputs: int) -> bool:
        """Whether the int8 kernel takes a weight of this shape."""
        return self.base.fits(features, outputs)

    def pack(self, codes: Tensor) -> Tensor:
        """As the int8 kernel does."""
        return self.base.pack(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        """As the int8 kernel does."""
        return self.base.unpack(packed)

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(M, K) float, times `factor` (K,) -> int16 codes (M, K) and float32 scales (M, 1)."""
        assert step is None, "rows of 16 bits have scales of their own"
        codes, scale = x.new_empty(x.shape, dtype=torch.int16), x.new_empty(len(x), 1, dtype=torch.float32)
        with torch.no_grad():
            for rows in _steps(x):
                codes[rows], scale[rows] = quantise_wide_rows(x[rows], factor)
        return codes, scale

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `quant.kernels.Kernel`."""
        with region("linear.quantise"):
            high, low = self._split(codes)
        y = self.base.multiply(high, scale * HIGH, packed, column, bias, torch.float32)
        y += self.base.multiply(low, scale, packed, column, None, torch.float32)
        return y.to(dtype)

    def _split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """int16 codes (M, K) -> high and low ones as the int8 kernel takes them."""
        unsigned = self.base.activations == "uint8"
        parts = codes.new_empty(2, *codes.shape, dtype=torch.uint8 if unsigned else torch.int8)
        for rows in _steps(codes):
            for part, values in zip(parts, split_wide(codes[rows]), strict=True):
                part[rows] = values.add_(ZERO_POINT) if unsigned else values
        return parts[0], parts[1]


def _steps(x: Tensor) -> list[slice]:
    """The rows of x (M, K) on a CPU in parts whose scratch stays in the cache; elsewhere all at once."""
    step = STEP if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + step) for start in range(0, len(x), step)]
