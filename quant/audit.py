"""Which kernel every linear layer really ran, and how often: a scheme that silently did nothing is an error."""

from __future__ import annotations

from typing import Any

from torch import nn

from ispa_deploy.errors import RunError
from quant.linear import Int8Linear


def audit(model: nn.Module) -> list[dict[str, Any]]:
    """One row per linear, in the model's order: `name`, `kernel`, `calls`, `dtype`, `delta_mode`.

    `calls` counts runs of the 8-bit kernel itself; None for a layer in floating point, which keeps no count.
    """
    rows: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            kernel, calls, dtype = module.kernel_name, module.calls, "int8"
        elif isinstance(module, nn.Linear):
            dtype = str(module.weight.dtype).removeprefix("torch.")
            kernel, calls = f"float {dtype}", None
        else:
            continue
        mode = getattr(module, "delta_mode", None)
        rows.append({"name": name, "kernel": kernel, "calls": calls, "dtype": dtype, "delta_mode": mode})
    return rows


def assert_ran(model: nn.Module, *, allow_fallback: bool = False) -> None:
    """Raise `RunError` when an 8-bit layer never ran its kernel or ran a stand-in in floating point.

    `allow_fallback` accepts the stand-in (`simulated`), not silence. A model without 8-bit layers passes.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    silent = [name for name, layer in layers.items() if layer.calls == 0]
    if silent:
        raise RunError(f"8-bit kernel never ran in {_some(silent)} of {len(layers)} quantised linears")
    stand_in = [name for name, layer in layers.items() if not layer.exact]
    if stand_in and not allow_fallback:
        raise RunError(
            f"8-bit arithmetic was simulated in {_some(stand_in)}: no exact int8 kernel on this machine; "
            "allow the fallback or use the scheme none"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
