"""How close each row comes to what the device can do: its work against peaks measured in the same process.

The peaks are those of one large matrix product in the model's dtype and of one large copy. They are what this device
reaches with these libraries today, not a data sheet's figures; a row may come out a little above one of them. Rows that
compute in 8 bits are held against the same floating-point peak, so that runs compare, and may go beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.profile.recorder import Clock, stopwatch
from ispa_deploy.profile.work import Work

REPEATS = 3
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY = {"cpu": 128 << 20, "cuda": 2 << 30}  # far beyond any cache


def measure_peaks(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, Any]:
    """`{flops, bytes, dtype, side, copied}`: operations and bytes per second, the best of a few; a copy moves its bytes
    twice, in and out."""
    side = _SIDE[device.type]
    a, b, c = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    source = torch.ones(_COPY[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def product() -> Tensor:
        return torch.mm(a, b, out=c)

    def copy() -> Tensor:
        return target.copy_(source)

    with torch.inference_mode():
        product(), copy()
        gemm, move = (min(stopwatch(work, device, clock) for _ in range(REPEATS)) for work in (product, copy))
    return {
        "flops": 2 * side**3 / gemm * 1e3,
        "bytes": 2 * source.nbytes / move * 1e3,
        "dtype": str(dtype).removeprefix("torch."),
        "side": side,
        "copied": source.nbytes,
    }


def roofline(rows: Mapping[str, Work], ms: Mapping[str, float], peak: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every row that took time: operations, bytes, what share of each peak it reached, and its bound.

    `least_ms` is the time at which the row would touch the nearer of both peaks; `share` is that over what it took.
    """
    found = []
    for row, work in rows.items():
        if not ms[row]:
            continue
        seconds = ms[row] / 1e3
        shares = {"flops": work.flops / peak["flops"] / seconds, "bytes": work.bytes / peak["bytes"] / seconds}
        bound = max(shares, key=shares.__getitem__)
        found.append(
            {
                "row": row,
                "flops": work.flops,
                "bytes": work.bytes,
                "flops_share": shares["flops"],
                "bytes_share": shares["bytes"],
                "bound": "arithmetic" if bound == "flops" else "memory",
                "share": shares[bound],
                "least_ms": shares[bound] * ms[row],
            }
        )
    return found
