"""Which kernel every linear layer really ran, and how often: a scheme that silently did nothing is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ispa_deploy.errors import RunError
from quant.kernels import describe, slowness
from quant.linear import QuantisedLinear

_DTYPES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}


def audit(model: nn.Module, reasons: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One row per linear, in the model's order.

    `name`, `kernel`, `dtype` of the weight, `delta_mode`; `calls` of the 8-bit kernel itself, `wide_calls` of them with
    activations of 16 bits, and `float_calls` of a delta folded into floating point, None for a layer in floating point,
    which keeps no count; `why` it is that, from `reasons` by name (a bundle's manifest has them), None for a quantised
    one.
    """
    rows: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        row: dict[str, Any] = {"name": name}
        if isinstance(module, QuantisedLinear):
            row.update(kernel=module.kernel_name, calls=module.calls, wide_calls=module.wide_calls)
            row.update(float_calls=module.float_calls, why=None, dtype=_DTYPES[module.code_dtype])
        elif isinstance(module, nn.Linear):
            row["dtype"] = str(module.weight.dtype).removeprefix("torch.")
            row.update(kernel=f"float {row['dtype']}", calls=None, wide_calls=None, float_calls=None)
            row["why"] = (reasons or {}).get(name)
        else:
            continue
        rows.append({**row, "delta_mode": getattr(module, "delta_mode", None)})
    return rows


def complaints(model: nn.Module, quantised: tuple[str, ...] = ()) -> list[str]:
    """What is not as it was asked for, one line each; empty when every 8-bit layer ran in eight bits.

    `quantised`: the layers that should be in eight bits, beside those that are. A layer that only ran with a delta
    folded into floating point, which is a mode of its own that somebody chose, is no complaint: the audit counts it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    total = f"of {len(layers)} quantised linears"
    found = (
        ("8-bit layers are in floating point", [name for name in quantised if name not in layers], ""),
        (
            "8-bit kernel never ran",
            [name for name, layer in layers.items() if layer.calls == 0 and layer.float_calls == 0],
            f" {total}",
        ),
        (
            "8-bit arithmetic was simulated",
            [name for name, layer in layers.items() if layer.calls and not layer.exact],
            ": no kernel of the scheme runs on this device",
        ),
    )
    return [f"{what} in {_some(names)}{tail}" for what, names, tail in found if names]


def assert_ran(model: nn.Module, quantised: tuple[str, ...] = (), *, allow_fallback: bool = False) -> list[str]:
    """Raise `RunError` when a requested 8-bit layer was a no-op, or floating point stood in for its kernel.

    `allow_fallback` returns the complaints instead, as warnings. A model without 8-bit layers passes.
    """
    found = complaints(model, quantised)
    if found and not allow_fallback:
        raise RunError(f"{'; '.join(found)}; allow the fallback or use the scheme none")
    return found


def slow_kernels(model: nn.Module) -> list[str]:
    """One line for each kind of prepared 8-bit layers whose kernel is far slower than floating point on its device."""
    lines: dict[str, None] = {}
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear) and layer.kernel is not None and layer.exact:
            device = str(layer.weight_scale.device)
            if slowness(layer.kernel, device) is not None:
                lines[f"{layer.family} linears: {describe(device, layer.family)}"] = None
    return list(lines)


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
