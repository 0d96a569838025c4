"""The scheme table: what a linear layer's numbers become, and which layers stay as they are.

A scheme is a value and this file does not import torch. To add one: a row here and a class in `quant.convert.LAYERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ispa_deploy.errors import InputError, known_names

if TYPE_CHECKING:
    import torch

LayerKind = Literal["float", "int8"]

# Small, run once per pass or less, and every block inherits their error. Norms and modulation are no linears.
_PARTS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head")
KEEP_DEFAULT = (*(rf"(^|\.){part}(\.|$)" for part in _PARTS), "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One way to hold and multiply a linear layer.

    `layer`: the class of layer that `quant.convert` puts in place. `keep`: regular expressions, searched in the
    module's dotted name; a linear that matches stays in floating point.
    """

    name: str
    layer: LayerKind
    summary: str
    keep: tuple[str, ...] = KEEP_DEFAULT


_TABLE = (
    Scheme(name="none", layer="float", summary="linears as loaded"),
    Scheme(
        name="w8a8-int8",
        layer="int8",
        summary="int8 weights, one scale per output channel; int8 activations, one scale per token taken as they come",
    ),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}

# `w8a8` alone asks for the best of the eight-bit schemes on a device type.
_BEST_W8A8 = {"cpu": "w8a8-int8", "cuda": "w8a8-int8"}


def resolve(name: str, device: str | torch.device) -> tuple[Scheme, str]:
    """The scheme called `name` on `device` and one printable line: what was chosen and the kernel that will run it.

    `w8a8` is the best eight-bit scheme of the device. Raises `InputError` for an unknown name or device.
    """
    kind = str(device).split(":")[0]
    if kind not in _BEST_W8A8:
        raise InputError(f"quantisation on device '{device}': expected one of {', '.join(sorted(_BEST_W8A8))}")
    chosen = _BEST_W8A8[kind] if name == "w8a8" else name
    if chosen not in SCHEMES:
        raise known_names("scheme", name, [*SCHEMES, "w8a8"])
    scheme = SCHEMES[chosen]
    line = f"scheme {name}" + (f" = {chosen}" if name != chosen else "") + f" on {kind}: {scheme.summary}"
    if scheme.layer == "int8":
        from quant.kernels import describe

        line += f"; {describe(str(device))}"
    return scheme, line
