"""The paper's three speed-ups beside ours: verdict, the component that is short, and what Amdahl's law allows.

Fig. 7(b): self-attention 1.89x, the whole chunk 1.35x with ISPA and 1.86x with W8A8 on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ispa_deploy.profile.breakdown import SELF_ATTENTION, Breakdown

PAPER = {"attention": 1.89, "overall": 1.35, "overall_w8a8": 1.86}
FIGURE_RUNS = {"attention": "ispa", "overall": "ispa", "overall_w8a8": "ispa+w8a8"}
"""The run that stands against the baseline in each of the paper's figures."""
PUBLISHED = "published"
"""Name of the run that is not ours: the published loop in plain PyTorch."""
LAST_PASS = "+last-pass"
"""What a run's name ends in whose one denoising pass is a chunk's last one; in the others it is one of those before."""
PAPER_MODEL, PAPER_RATIO = "longlive-1.3b", 0.5
PAPER_GEOMETRY = ("dim", "ffn_dim", "heads", "latent_height", "latent_width", "chunk_frames")
"""The setting of Fig. 7(b): LongLive 1.3B at 480x832 with its window of 12 frames, half of the layers local."""
REPRODUCED = 0.95
"""Share of the paper's figure from which on it counts as reproduced."""


@dataclass(frozen=True)
class Parts:
    """One chunk in ms by what can be made faster; `attention` is self-attention with merge and cache, `overhead` holds
    everything else, `unattributed` included. They sum to the whole."""

    attention: float
    cross: float
    linear: float
    overhead: float

    @staticmethod
    def of(chunk: Breakdown) -> Parts:
        attention, cross = chunk.self_attention, chunk.components["attention.cross"]
        linear = chunk.families["linear"]
        rows = sum(chunk.components.values()) + chunk.unattributed
        return Parts(attention, cross, linear, rows - attention - cross - linear)

    @property
    def total(self) -> float:
        return self.attention + self.cross + self.linear + self.overhead

    def without(self, part: str) -> float:
        return self.total - float(getattr(self, part))


def verdict(figure: str, ours: float | None, short: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`{paper, ours, verdict, short}`; `short` names what is at fault when `ours` is below the bar."""
    paper = PAPER[figure]
    if ours is None:
        return {"paper": paper, "ours": None, "verdict": "not measured", "short": None}
    if ours >= REPRODUCED * paper:
        return {"paper": paper, "ours": ours, "verdict": "reproduced", "short": None}
    assert short is not None
    text = f"not reproduced: {short['component']} short by {short['factor']:.2f}x"
    return {"paper": paper, "ours": ours, "verdict": text, "short": dict(short)}


def doubted(entry: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """A verdict in the light of what speaks against the numbers behind it: `reproduced` does not survive a reason."""
    if reason is None or entry["verdict"] != "reproduced":
        return entry
    return {**entry, "verdict": f"inconclusive: {reason}"}


def shortfall(base: Parts, run: Parts, lever: str, target: float) -> dict[str, Any]:
    """Which component keeps `run` from being `target` times faster than `base`, and by which factor.

    It is the lever (the part this configuration set out to shrink) as long as a faster lever alone would do. Where the
    other parts take longer than the whole may, it is the largest of them.
    """
    allowed = base.total / target
    room = allowed - run.without(lever)
    if room > 0:
        return {"component": lever, "factor": max(float(getattr(run, lever)) / room, 1.0)}
    others = {part: float(getattr(run, part)) for part in ("attention", "cross", "linear", "overhead") if part != lever}
    return {"component": max(others, key=others.__getitem__), "factor": run.without(lever) / allowed}


def attention_shortfall(run: Breakdown, ours: float) -> dict[str, Any]:
    """The largest row of self-attention, and how much faster self-attention as a whole would have to be."""
    component = max(SELF_ATTENTION, key=run.components.__getitem__)
    return {"component": component, "factor": PAPER["attention"] / ours}


def keys_ratio(ratio: float, window: float, local: float) -> float:
    """Most that self-attention can gain: keys seen before over keys seen after, `ratio` of the layers being local."""
    return 1 / (1 - ratio * (1 - local / window))


def amdahl(base: Parts, ispa: Parts | None, keys: float) -> dict[str, Any]:
    """Share of self-attention in the baseline, the speed-up if it gained all of `keys`, and what the linear layers of
    the ISPA run must gain for the paper's last figure: None where not even free ones would do."""
    share = base.attention / base.total
    needed = None
    if ispa is not None:
        room = base.total / PAPER["overall_w8a8"] - ispa.without("linear")
        needed = base.linear / room if room > 0 else None
    return {
        "attention_share": share,
        "attention_ceiling": keys,
        "ceiling": 1 / (1 - share + share / keys),
        "linear_share": base.linear / base.total,
        "linear_speedup_needed": needed,
    }
