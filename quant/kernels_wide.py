"""16-bit activations out of 8-bit products: a row of codes becomes two, a high and a low one, of the same weight.

The weight is that of an int8 layer and is kept once; the product is exact and the two sums of a row are joined in
float32. It takes twice the products of an int8 layer and none of its activations' error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quant.primitives import Activations


@runtime_checkable
class WideBase(Protocol):
    """An int8 kernel (see `quant.kernels.Kernel`) that also takes rows of two codes."""

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def activations(self) -> Activations: ...
    def __hash__(self) -> int: ...
    def fits(self, features: int, outputs: int) -> bool: ...
    def pack(self, codes: Tensor) -> Tensor: ...
    def unpack(self, packed: Tensor) -> Tensor: ...
    def quantise_wide(self, x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes and scales of `quant.primitives.quantise_wide_rows`."""
        ...

    def multiply_wide(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As `multiply`, codes (M, 2 K)."""
        ...


@dataclass(frozen=True)
class Wide:
    """An int8 kernel on twice the rows."""

    base: WideBase

    @property
    def activations(self) -> Activations:
        """Two of the kernel's own codes for each value."""
        return "uint8x2" if self.base.activations == "uint8" else "int8x2"

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
        """(M, K) float, times `factor` (K,) -> codes (M, 2 K), high ones before low ones, and float32 scales (M, 1)."""
        assert step is None, "rows of 16 bits have scales of their own"
        return self.base.quantise_wide(x, factor)

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `quant.kernels.Kernel`; codes (M, 2 K)."""
        return self.base.multiply_wide(codes, scale, packed, column, bias, dtype)
