"""What `profile` compares: the same weights in floating point and in 8 bits, with the full cache and with ISPA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from export.bundle import Bundle
from ispa_deploy.linear import Linear
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.compare import Configuration, compare
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from quant import SCHEMES, QuantisedLinear, quantise_, resolve
from quant.audit import audit

Say = Callable[[str], None]


def configurations(
    floating: CausalWanDiT, eight: CausalWanDiT | None, scheme: str, *, ratio: float = 0.5, recent: int = 0
) -> list[Configuration]:
    """full | ispa on the floating-point model, and both again on the 8-bit one."""
    options = {
        "full": StreamOptions(policy="full"),
        "ispa": StreamOptions(policy="absorb", ratio=ratio, recent_frames=recent),
    }
    kinds = [("", floating, "none")] + ([("+w8a8", eight, scheme)] if eight is not None else [])
    return [
        Configuration(name=name + tail, model=model, options=value, scheme=label, audit=audit)
        for tail, model, label in kinds
        for name, value in options.items()
    ]


def profile_bundle(
    bundle: Bundle, *, rounds: int, ratio: float, recent: int, command: str = "", say: Say | None = None
) -> dict[str, Any]:
    """The report of a bundle's own model; a bundle without 8-bit layers is compared with its quantised copy."""
    scheme = bundle.manifest.scheme
    if SCHEMES[scheme].layer == "float":
        chosen, line = resolve("w8a8", bundle.model.device)
        floating, eight, scheme = bundle.model, copy.deepcopy(bundle.model), chosen.name
        quantise_(eight, chosen)
        if say:
            say(line)
    else:
        floating, eight = dequantised(bundle.model), bundle.model
    return compare(
        configurations(floating, eight, scheme, ratio=ratio, recent=recent),
        rounds=rounds,
        pixel_frames=bundle.spec.temporal_stride,
        decoder=bundle.decoder(),
        command=command,
        progress=say,
    )


def profile_geometry(
    name: str,
    device: torch.device,
    *,
    rounds: int,
    layers: int | None = None,
    ratio: float = 0.5,
    recent: int = 0,
    command: str = "",
    say: Say | None = None,
) -> dict[str, Any]:
    """The report of a geometry with random bf16 weights, of all its layers or only as many as asked for."""
    spec = GEOMETRIES[name]
    model = random_model(replace(spec, layers=layers or spec.layers), torch.bfloat16, device)
    chosen, _ = resolve("w8a8", device)
    eight = copy.deepcopy(model)
    quantise_(eight, chosen)
    return compare(
        configurations(model, eight, chosen.name, ratio=ratio, recent=recent),
        rounds=rounds,
        pixel_frames=spec.temporal_stride,
        command=command,
        progress=say,
    )


def dequantised(model: CausalWanDiT) -> CausalWanDiT:
    """The floating-point model that the 8-bit weights stand for: the baseline multiplies the same numbers."""
    twin = copy.deepcopy(model)
    for parent in twin.modules():
        for name, child in parent.named_children():
            if isinstance(child, QuantisedLinear):
                setattr(parent, name, _floating(child, model.dtype))
    return twin


def _floating(layer: QuantisedLinear, dtype: torch.dtype) -> Linear:
    weight = layer.reference_weight().to(dtype)
    linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear.eval()
