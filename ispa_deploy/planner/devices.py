"""Devices as their data sheets describe them, and the share of those figures that real kernels were seen to reach."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ispa_deploy.errors import known_names


@dataclass(frozen=True)
class Device:
    """`flops`: dense bfloat16 products per second; `ops8`: dense 8-bit ones; `bytes`: memory traffic per second;
    `memory`: bytes. Figures of the vendor's data sheet, without sparsity."""

    name: str
    flops: float
    ops8: float
    bytes: float
    memory: float


_TABLE = (
    Device("H200", 989e12, 1979e12, 4.8e12, 141e9),
    Device("H100", 989e12, 1979e12, 3.35e12, 80e9),
    Device("A100", 312e12, 624e12, 2.04e12, 80e9),
    Device("L40S", 362e12, 733e12, 0.864e12, 48e9),
    Device("RTX 4090", 165e12, 661e12, 1.008e12, 24e9),
)
DEVICES = {device.name: device for device in _TABLE}

REACHED = {"attention": 0.60, "gemm": 0.70, "gemm8": 0.50, "memory": 0.60}
"""Shares of the data sheet to plan with where nothing was measured: cuDNN and flash-attention 3 report 0.60 to 0.65 of
the peak at head width 128, cuBLAS 0.78 at large shapes and less at ours, fused int8 and fp8 products 0.50 to 0.68."""


BLOCK_SECONDS = 2e-4
"""Least time of one pass through a block, which is some forty launches from Python: what keeps small models slow."""


def device_of(report: Mapping[str, Any]) -> Device | None:
    """The device that a report was measured on; None for a CPU and for GPUs without a data sheet here."""
    gpu = report["env"]["gpu"] or ""
    return next((each for name, each in DEVICES.items() if re.search(rf"\b{name}\b", gpu, re.IGNORECASE)), None)


def device_named(name: str) -> Device:
    """The device called `name`, in any case; an unknown name lists the known ones."""
    found = next((device for known, device in DEVICES.items() if known.lower() == name.lower()), None)
    if found is None:
        raise known_names("GPU", name, [*DEVICES, "measured"])
    return found
