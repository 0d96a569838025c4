"""What an absorption knows of each layer, and which layers it was told to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ispa_deploy.absorb.lowrank import Truncation
from ispa_deploy.absorb.solve import Solution
from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError


@dataclass
class LayerRecord:
    """What is known of one layer: its solution, the score it was ranked by (None: unscored), whether it is local, and
    what of the solution is left at a low rank.

    `delta` is what a solved layer would carry, until the layers that become local are chosen.
    """

    solution: Solution | None = None
    score: float | None = None
    local: bool = False
    delta: Delta | None = None
    truncation: Truncation | None = None

    def to_dict(self) -> dict[str, Any]:
        solution = self.solution
        fields = ("ridge", "condition", "effective_rank", "residual", "gap", "status")
        details = {name: getattr(solution, name) for name in fields} if solution else {}
        if self.truncation is not None:
            details |= {f"delta_{name}": getattr(self.truncation, name) for name in ("rank", "kept", "increase")}
        return {"kind": "L" if self.local else "F", "score": self.score, **details}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which layers become local: `ratio` of them by rank, or exactly `layers`."""

    ratio: float = 0.5
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise InputError(f"ratio {self.ratio}: expected a share of the layers between 0 and 1")

    def count(self, layers: int) -> int:
        return int(self.ratio * layers + 0.5) if self.layers is None else len(self.layers)
