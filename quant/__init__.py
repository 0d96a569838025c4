"""Eight-bit linear layers: schemes, conversion, kernels and the audit of what really ran.

    scheme, line = quant.resolve("w8a8", "cpu")
    report = quant.quantise_(model, scheme)
    ...
    quant.assert_ran(model)

Names are imported on first use, so that reading the scheme table does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.audit import assert_ran
    from quant.convert import Report, empty_quantised_, prepare_, quantise_
    from quant.kernels import QuantisedRows
    from quant.layers import Fp8Linear, StaticInt8Linear
    from quant.linear import Int8Linear, QuantisedLinear
    from quant.measure import call_rows, make_plan, plan_for
    from quant.memory import tune_allocator
    from quant.plan import Plan, load_plan
    from quant.schemes import SCHEMES, Scheme, resolve

__all__ = [
    "SCHEMES",
    "Fp8Linear",
    "Int8Linear",
    "Plan",
    "QuantisedLinear",
    "QuantisedRows",
    "Report",
    "Scheme",
    "StaticInt8Linear",
    "assert_ran",
    "call_rows",
    "empty_quantised_",
    "load_plan",
    "make_plan",
    "plan_for",
    "prepare_",
    "quantise_",
    "resolve",
    "tune_allocator",
]

_HOME = {
    **dict.fromkeys(("SCHEMES", "Scheme", "resolve"), "schemes"),
    **dict.fromkeys(("Report", "empty_quantised_", "prepare_", "quantise_"), "convert"),
    "assert_ran": "audit",
    **dict.fromkeys(("Int8Linear", "QuantisedLinear"), "linear"),
    **dict.fromkeys(("Fp8Linear", "StaticInt8Linear"), "layers"),
    **dict.fromkeys(("call_rows", "make_plan", "plan_for"), "measure"),
    **dict.fromkeys(("Plan", "load_plan"), "plan"),
    "QuantisedRows": "kernels",
    "tune_allocator": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quant' has no attribute '{name}'")
    return getattr(import_module(f"quant.{_HOME[name]}"), name)
