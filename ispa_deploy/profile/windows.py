"""Self-attention alone at the model's window and at long ones: where the paper's 1.89x can be had, and what it takes.

With a share `ratio` of the layers local, attention cannot gain more than `keys_ratio`; at a window of 12 frames and
half of the layers that is 1.50x. The paper's 1.89x is first possible at about 72 frames, so that window is measured as
well: one call over the whole window, one over the local frames, at this model's sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from statistics import median
from typing import Any

import torch

from ispa_deploy.attention import attend
from ispa_deploy.profile.paper import PAPER, PAPER_RATIO, REPRODUCED, Parts, keys_ratio
from ispa_deploy.profile.recorder import Clock, stopwatch
from ispa_deploy.specs import ModelSpec

LONG = 72
"""Frames at which the keys that half of the layers drop explain 1.89x, with a sink of one and a chunk of three."""


def window_needed(ratio: float, local: float, target: float = PAPER["attention"], most: int = 4096) -> int | None:
    """Fewest frames of window at which dropping keys explains `target`; None where no window does."""
    return next((frames for frames in range(ceil(local), most) if keys_ratio(ratio, frames, local) >= target), None)


def measure_windows(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, clock: Clock, *,
    ratio: float, local: float, windows: tuple[float, ...], rounds: int = 3, backend: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per window: ms of one full and of one local call, what a share `ratio` of local layers gains by them, the
    most that the dropped keys explain, and how that stands to the paper's figure."""
    return [_row(spec, dtype, device, clock, window, ratio, local, rounds, backend) for window in windows]


def _row(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, clock: Clock, window: float, ratio: float, local: float,
    rounds: int, backend: str,
) -> dict[str, Any]:  # fmt: skip
    tokens = spec.frame_tokens
    shape = (spec.heads, spec.head_dim)
    q = torch.randn(1, spec.chunk_frames * tokens, *shape, device=device).to(dtype)
    k, v = (torch.randn(1, round(window * tokens), *shape, device=device).to(dtype) for _ in range(2))

    def call(frames: float) -> Callable[[], object]:
        keys = round(frames * tokens)
        return lambda: attend(q, k[:, :keys], v[:, :keys], backend=backend)

    times: dict[float, list[float]] = {window: [], local: []}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for frames, found in times.items():
                ms = stopwatch(call(frames), device, clock)
                if number:  # the first round warms up
                    found.append(ms)
    full, near = median(times[window]), median(times[local])
    gain = 1 / (1 - ratio + ratio * near / full)
    ceiling = keys_ratio(ratio, window, local)
    return {
        "window": round(window, 1),
        "ratio": ratio,
        "full_ms": full,
        "local_ms": near,
        "attention_speedup": gain,
        "ceiling": ceiling,
        "verdict": _verdict(gain, ceiling, ratio),
    }


def _verdict(gain: float, ceiling: float, ratio: float) -> str:
    target = PAPER["attention"]
    if gain >= REPRODUCED * target and ratio != PAPER_RATIO:
        return f"inconclusive: the paper's figure is for {100 * PAPER_RATIO:.0f} % of the layers local"
    if gain >= REPRODUCED * target:
        return "reproduced"
    if ceiling < REPRODUCED * target:
        return f"not reproduced: dropped keys allow {ceiling:.2f}x at most"
    return f"not reproduced: attention.kernel short by {target / gain:.2f}x"


def chunk_gain(base: Parts, run: Parts, own: dict[str, Any], row: dict[str, Any]) -> float:
    """Speed-up of the whole chunk at `row`'s window, all that is not self-attention taken as measured at `own`'s.

    The baseline's self-attention grows as its kernel does from `own` to `row`; the run's is that over the row's gain.
    """
    attention = base.attention * row["full_ms"] / own["full_ms"]
    after = attention / row["attention_speedup"]
    return (base.without("attention") + attention) / (run.without("attention") + after)
