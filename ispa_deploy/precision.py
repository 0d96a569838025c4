"""Where 8-bit linears take 16-bit activations: the last third of the layers, in the last denoising pass of a chunk.

What that pass gets wrong goes into the frame as it is, anew in every chunk; errors of earlier passes are mixed with
fresh noise and denoised again. Rounding of activations there is what makes the background of 8-bit videos flicker
(docs/log.md). Weights are rounded once and for all and do not; no byte is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ispa_deploy.errors import InputError

if TYPE_CHECKING:
    from ispa_deploy.model import CausalWanDiT

# One layer in so many, rounded up, counted from the last.
PART = 3
# Keys and values of the text are made before any pass.
_TEXT = ("cross_attn.k", "cross_attn.v")
BITS = (16, 8)


class Widening(Protocol):
    """A linear whose activations can have 16 bits."""

    def set_wide(self, wide: bool) -> bool:
        """Let them have 16 bits, or 8 again; whether they now have 16."""
        ...


def last_pass_layers(layers: int) -> range:
    """The layers, of so many, whose linears widen in the last pass."""
    return range(layers - -(-layers // PART), layers)


def check_bits(bits: int) -> None:
    """InputError for other `--last-pass-bits` than there are."""
    if bits not in BITS:
        raise InputError(f"--last-pass-bits {bits}: expected 16, or 8 for activations as in every other pass")


def last_pass_linears(model: CausalWanDiT, bits: int = 16) -> list[Widening]:
    """The linears of `model` that take activations of 16 bits in the last pass; none where `bits` is 8, or none can."""
    if bits == 8:
        return []
    blocks = model.layers()
    last = [blocks[index] for index in last_pass_layers(len(blocks))]
    found: list[Any] = [one for block in last for name, one in block.named_modules() if name not in _TEXT]
    able = [one for one in found if hasattr(one, "set_wide") and one.set_wide(True)]
    for one in able:
        one.set_wide(False)
    return able


@contextmanager
def widened(linears: Sequence[Widening]) -> Iterator[None]:
    """16-bit activations of `linears` inside."""
    try:
        for one in linears:
            one.set_wide(True)
        yield
    finally:
        for one in linears:
            one.set_wide(False)
