"""The delta seam: what a linear layer must offer so that absorption can correct it and take the correction back.

A delta is instance-specific and temporary: it belongs to one stream. So a target keeps its own weight untouched and
`set_delta(None)` restores it bit for bit, whatever the mode:

=========  ==========================================================================================
`side`     y = W x + dW x, a second product in the delta's dtype
`fold`     one product with (W + dW) in the layer's floating dtype; on a quantised layer this leaves 8 bits
`requant`  one product with the quantised (W + dW); quantised layers only
`auto`     the fastest of those the layer offers, by the table of `python -m tests.bench.deltas`
=========  ==========================================================================================

`auto` is a rule and not a race at run time: a race may end otherwise next time, and the same seed gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

DELTA_MODES = ("auto", "side", "requant", "fold")


@dataclass(frozen=True)
class Delta:
    """A correction of one linear layer, already rounded to the dtype it is stored in.

    `weight` is (O, I) in torch's layout, `y += x @ weight.T`; `bias` is (O,) float32 or None. With `down` (r, I) it is
    of rank r: `weight` is (O, r), and their product takes the place of the (O, I) matrix. `on_codes`: fitted to
    activations as the 8-bit layer multiplies them, so a side product takes those too.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    on_codes: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.weight.shape[0], (self.weight if self.down is None else self.down).shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self) -> Tensor:
        """(O, I) float32. Factors are multiplied in float64 and rounded once: the order of sums does not show."""
        if self.down is None:
            return self.weight.float()
        return (self.weight.double() @ self.down.double()).float()

    def beside(self, x: Tensor) -> Tensor:
        """x (M, I) -> x dW^T (M, O), in the dtype of the weight."""
        x = x.to(self.weight.dtype)
        return F.linear(x if self.down is None else F.linear(x, self.down), self.weight)

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by the names that delta files use."""
        whole = {"delta_weight": self.weight}
        named = whole if self.down is None else {"delta_up": self.weight, "delta_down": self.down}
        return named if self.bias is None else {**named, "delta_bias": self.bias}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], *, on_codes: bool = False) -> Delta:
        """Inverse of `tensors`."""
        weight = tensors["delta_up"] if "delta_up" in tensors else tensors["delta_weight"]
        return Delta(weight, tensors.get("delta_bias"), tensors.get("delta_down"), on_codes)

    def to(self, device: torch.device | str) -> Delta:
        """The same numbers on another device."""
        return Delta.of({name: tensor.to(device) for name, tensor in self.tensors().items()}, on_codes=self.on_codes)


@runtime_checkable
class DeltaTarget(Protocol):
    """A linear layer that can carry a delta. Implemented by `ispa_deploy.linear.Linear` and `quant`'s layers."""

    delta: Delta | None
    delta_mode: str | None
    DELTA_STATE: ClassVar[tuple[str, ...]]
    """Attributes that hold the delta and what was prepared for it; None each where there is none."""

    def reference_weight(self) -> Tensor:
        """(O, I) float32: the weight this layer multiplies by while it carries no delta."""
        ...

    def multiplied(self, x: Tensor) -> Tensor:
        """x (M, I) float as this layer's product takes it: itself, or what its codes stand for, float32."""
        ...

    def set_delta(self, delta: Delta | None, mode: str = "auto") -> None:
        """Carry `delta` from now on, or none; None restores the original weight bit for bit."""
        ...

    def delta_nbytes(self) -> int:
        """Bytes held on top of the plain layer because of the delta."""
        ...


@contextmanager
def resting(targets: Sequence[DeltaTarget]) -> Iterator[None]:
    """Run `targets` as if they carried no delta; what was prepared for it stays, so that resting costs nothing."""
    held = [(target, name, getattr(target, name)) for target in targets for name in target.DELTA_STATE]
    for target, name, _ in held:
        setattr(target, name, None)
    try:
        yield
    finally:
        for target, name, value in held:
            setattr(target, name, value)
