"""What kernels share, and what those share that multiply weight codes as a bundle stores them, (N, K), unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.primitives import Activations


@dataclass(frozen=True)
class BaseKernel:
    """What most kernels share; see `quant.kernels.Kernel`."""

    name: str
    exact: bool = True
    activations: Activations = "int8"

    @property
    def unsigned(self) -> bool:
        """Whether activation codes are uint8 with zero point 128."""
        return self.activations == "uint8"

    def fits(self, features: int, outputs: int) -> bool:
        """Every shape with something in it."""
        return features > 0 and outputs > 0

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `quant.kernels.Kernel`: each kernel's own."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredKernel(BaseKernel):
    """A kernel whose packed weight is the codes themselves."""

    def pack(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes themselves."""
        return packed
