"""The scheme table: what a linear layer's numbers become, and which layers stay as they are.

A scheme is a value and this file does not import torch. To add one: a row here and a class in `quant.layers.LAYERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ispa_deploy.errors import InputError, known_names

if TYPE_CHECKING:
    import torch

LayerKind = Literal["float", "int8", "int8-static", "int8-wide", "fp8", "bnb"]

# Small, run once per pass or less, and every block inherits their error. Norms and modulation are no linears.
_PARTS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head")
KEEP_DEFAULT = (*(rf"(^|\.){part}(\.|$)" for part in _PARTS), "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One way to hold and multiply a linear layer.

    `layer`: the class of layer that `quant.convert` puts in place, and the name of its family of kernels. `keep`:
    regular expressions, searched in the module's dotted name; a linear that matches stays in floating point.
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
    Scheme(
        name="w8a8-int8-static",
        layer="int8-static",
        summary="int8 weights, one scale per output channel; int8 activations, one calibrated scale per layer",
    ),
    Scheme(
        name="w8a16-int8",
        layer="int8-wide",
        summary="int8 weights as w8a8-int8; 16-bit activations, one scale per token, in two int8 products",
    ),
    Scheme(
        name="w8a8-fp8",
        layer="fp8",
        summary="e4m3 weights, one scale per output channel; e4m3 activations, one scale per token taken as they come",
    ),
    Scheme(
        name="bnb-int8",
        layer="bnb",
        summary="int8 weights as w8a8-int8, multiplied by bitsandbytes (LLM.int8, no outlier columns)",
    ),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}

# What `w8a8` alone chooses from, and a plan may mix. The first that runs is taken: e4m3 rounds three times as coarsely
# as int8, which shows as flicker (docs/log.md), so it is for those who ask for it.
W8A8 = ("w8a8-int8", "w8a8-fp8")
_DEVICES = ("cpu", "cuda")


def resolve(name: str, device: str | torch.device) -> tuple[Scheme, str]:
    """The scheme called `name` on `device` and one printable line: what was chosen and the kernel that will run it.

    `w8a8` is int8 wherever that runs exactly, else fp8; where both run, a short measurement of both is shown.
    Raises `InputError` for an unknown name or device.
    """
    kind = str(device).split(":")[0]
    if kind not in _DEVICES:
        raise InputError(f"quantisation on device '{device}': expected one of {', '.join(_DEVICES)}")
    if name not in (*SCHEMES, "w8a8"):
        raise known_names("scheme", name, [*SCHEMES, "w8a8"])
    chosen, why = _best(str(device)) if name == "w8a8" else (name, "")
    scheme = SCHEMES[chosen]
    line = f"scheme {name}" + (f" = {chosen}" if name != chosen else "") + f" on {kind}{why}: {scheme.summary}"
    if scheme.layer != "float":
        from quant.kernels import describe

        line += f"; {describe(str(device), scheme.layer)}"
    return scheme, line


def _best(device: str) -> tuple[str, str]:
    """The scheme that `w8a8` means on `device` and why, in brackets."""
    from quant.kernels import runs
    from quant.measure import race

    running = [name for name in W8A8 if (layer := SCHEMES[name].layer) != "float" and runs(layer, device)]
    if len(running) < 2:
        others = ", ".join(name for name in W8A8 if name not in running)
        return (running or list(W8A8))[0], f" ({others} does not run here)" if running else " (simulated)"
    times = race([SCHEMES[name] for name in running], device)
    shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    return running[0], f" (the finer one; measured: {shown})"
