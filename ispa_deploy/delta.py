"""The delta seam: what a linear layer must offer so that absorption can correct it and take the correction back.

A delta is instance-specific and temporary: it belongs to one stream. So a target keeps its own weight untouched and
`set_delta(None)` restores it bit for bit, whatever the mode:

=========  ==========================================================================================
`side`     y = W x + dW x, a second product in the delta's dtype
`fold`     one product with (W + dW) in the layer's floating dtype; on a quantised layer this leaves 8 bits
`requant`  one product with the quantised (W + dW); quantised layers only
`auto`     the fastest of those the layer offers
=========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

DELTA_MODES = ("auto", "side", "requant", "fold")


@dataclass(frozen=True)
class Delta:
    """A correction of one linear layer, already rounded to the dtype it is stored in.

    `weight` is (O, I) in torch's layout, `y += x @ weight.T`; `bias` is (O,) float32 or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


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
