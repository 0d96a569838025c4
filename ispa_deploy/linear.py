"""A floating-point linear layer that marks its time and can carry an absorbed delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError
from ispa_deploy.regions import region


def shared_input(x: Tensor, layers: Sequence[nn.Module]) -> Any:
    """`x`, which all `layers` are about to be called with, prepared once where they agree how (8-bit codes); same bits.

    To be handed to them and to nobody else.
    """
    first: Any = layers[0]
    return first.shared(x, layers[1:]) if hasattr(first, "shared") else x


class Linear(nn.Linear):
    """`nn.Linear` with the delta seam. `auto` means `fold`: one product, no extra time, W kept aside for restoring."""

    DELTA_STATE: ClassVar[tuple[str, ...]] = ("delta", "delta_mode", "_folded_weight", "_folded_bias")

    delta: Delta | None = None
    delta_mode: str | None = None
    _folded_weight: Tensor | None = None
    _folded_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), dtype of the weight."""
        if self.delta is None:
            with region("linear.gemm"):
                return F.linear(x, self.weight, self.bias)
        assert self._folded_weight is not None
        with region("linear.gemm"):
            y = F.linear(x, self._folded_weight, self._folded_bias)
        if self.delta_mode == "side":
            with region("linear.delta"):
                y = y + self.delta.beside(x).to(y.dtype)
        return y

    def reference_weight(self) -> Tensor:
        """(O, I) float32 copy of the weight."""
        return self.weight.detach().float()

    def multiplied(self, x: Tensor) -> Tensor:
        """x itself: nothing is rounded on the way in."""
        return x

    def set_delta(self, delta: Delta | None, mode: str = "auto") -> None:
        """Carry `delta` (`side` or `fold`); None restores the layer, whose own weight was never written to."""
        self.delta = self.delta_mode = self._folded_weight = self._folded_bias = None
        if delta is None:
            return
        mode = "fold" if mode == "auto" else mode
        if mode not in ("side", "fold"):
            raise InputError(f"delta mode '{mode}' on a layer kept in {self.weight.dtype}: expected auto, side or fold")
        weight = self.weight.detach()
        self._folded_weight = weight if mode == "side" else (weight.float() + delta.dense()).to(weight.dtype)
        bias = self.bias.detach() if self.bias is not None else None
        if delta.bias is not None:
            old = bias.float() if bias is not None else torch.zeros_like(delta.bias)
            bias = (old + delta.bias).to(weight.dtype)
        self._folded_bias = bias
        self.delta, self.delta_mode = delta, mode

    def delta_nbytes(self) -> int:
        """Bytes of the delta, of the folded weight in mode `fold`, and of the bias that replaces the layer's own."""
        if self.delta is None or self._folded_weight is None:
            return 0
        held = self.delta.nbytes + (self._folded_weight.nbytes if self.delta_mode == "fold" else 0)
        replaced = self._folded_bias if self.delta.bias is not None else None
        return held + (replaced.nbytes if replaced is not None else 0)
