"""A per-layer plan as a value: which scheme every linear gets, the times and errors behind it, and its JSON.

A plan belongs to the device it was measured on (`quant.measure`); it can be read from its own file, from the JSON
document of `quantize`, or from a bundle's manifest.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ispa_deploy.errors import InputError
from quant.schemes import SCHEMES

VERSION = 1
FLOAT = "none"
# Far above any real plan; keeps a hostile file from filling the memory.
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Median milliseconds of one call by scheme, for a weight (N, K) and that many rows."""

    shape: tuple[int, int]
    rows: int
    ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One linear: its scheme and why. `error`: relative L2 error of its output by scheme, against float64."""

    name: str
    shape: tuple[int, int]
    rows: int
    scheme: str
    error: Mapping[str, float]
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`budget`: the largest relative error a layer may have in eight bits; `dtype`: what `none` was measured in."""

    device: str
    threads: int
    dtype: str
    budget: float
    timings: tuple[Timing, ...]
    layers: tuple[PlannedLayer, ...]

    def find(self, name: str) -> PlannedLayer | None:
        """The row of a linear; None for one that the plan leaves out."""
        return next((row for row in self.layers if row.name == name), None)

    def layer(self, name: str, shape: tuple[int, int]) -> PlannedLayer:
        """The row of a linear. Raises `InputError` when the plan is of another model."""
        found = self.find(name)
        if found is None or found.shape != shape:
            has = "no such layer" if found is None else f"{found.shape[0]} x {found.shape[1]} there"
            raise InputError(
                f"plan for '{name}' of {shape[0]} x {shape[1]}: {has}; expected a plan of this model, measure one with "
                "--plan auto"
            )
        return found

    def summary(self) -> str:
        """One line: how many layers got which scheme, where and in which budget if that was measured."""
        counts = Counter(row.scheme for row in self.layers)
        got = ", ".join(f"{count} {_shown(name, self.dtype)}" for name, count in sorted(counts.items()))
        if not self.timings:
            return f"plan: {got or 'no layers'}"
        return f"plan on {self.device}, {self.threads} threads, error at most {self.budget:g}: {got or 'no layers'}"

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and one row per distinct shape and number of rows."""
        measured = {name for timing in self.timings for name in timing.ms}
        schemes = sorted(measured, key=lambda name: (name != FLOAT, name))
        header = (
            "N x K", "rows", "layers", *(f"{_shown(name, self.dtype)} ms" for name in schemes),
            *(f"{name} worst error" for name in schemes if name != FLOAT), "chosen",
        )  # fmt: skip
        return header, [self._line(timing, schemes) for timing in self.timings]

    def _line(self, timing: Timing, schemes: list[str]) -> tuple[str, ...]:
        layers = [row for row in self.layers if (row.shape, row.rows) == (timing.shape, timing.rows)]
        counts = Counter(_shown(row.scheme, self.dtype) for row in layers)
        return (
            f"{timing.shape[0]} x {timing.shape[1]}", str(timing.rows), str(len(layers)),
            *(f"{timing.ms[name]:.3f}" if name in timing.ms else "" for name in schemes),
            *(f"{max(row.error[name] for row in layers):.1e}" for name in schemes if name != FLOAT),
            ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in counts.items()),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = asdict(self)
        for row in (*fields["timings"], *fields["layers"]):
            row["shape"] = list(row["shape"])
        fields.update(version=VERSION, timings=list(fields["timings"]), layers=list(fields["layers"]))
        return fields

    @staticmethod
    def from_dict(fields: Any, where: str = "plan") -> Plan:
        """Inverse of `to_dict`. Raises `InputError` naming `where` for anything else."""
        version = fields.get("version") if isinstance(fields, dict) else None
        if version != VERSION:
            raise InputError(f"'{where}' has plan version {version!r}: this version reads {VERSION}; measure it again")
        try:
            plan = Plan(
                device=str(fields["device"]), threads=int(fields["threads"]), dtype=str(fields["dtype"]),
                budget=_number(fields["budget"]),
                timings=tuple(Timing(_pair(row["shape"]), int(row["rows"]), _numbers(row["ms"]))
                              for row in fields["timings"]),
                layers=tuple(
                    PlannedLayer(str(row["name"]), _pair(row["shape"]), int(row["rows"]), str(row["scheme"]),
                                 _numbers(row["error"]), str(row["why"])) for row in fields["layers"]
                ),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"'{where}' is no plan ({type(error).__name__}: {error}): measure it again") from error
        unknown = sorted({row.scheme for row in plan.layers} - set(SCHEMES))
        if unknown:
            raise InputError(f"'{where}' asks for scheme '{unknown[0]}': expected one of {', '.join(sorted(SCHEMES))}")
        return plan


def load_plan(path: str | Path) -> Plan:
    """A plan from its own JSON file, from `quantize --stats`, or from a bundle's `ispa.json`.

    Raises `InputError` naming the file when there is no plan in it.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise InputError(f"plan '{path}': expected auto, none or a JSON file of at most {_MAX_BYTES >> 20} MiB")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"plan '{path}' is not JSON ({str(error).splitlines()[0]}): measure it again") from None
    holder = fields.get("recipe", fields) if isinstance(fields, dict) else fields
    return Plan.from_dict(holder.get("plan", holder) if isinstance(holder, dict) else holder, str(path))


def _shown(scheme: str, dtype: str) -> str:
    return dtype if scheme == FLOAT else scheme


def _pair(value: Any) -> tuple[int, int]:
    outputs, features = value
    return int(outputs), int(features)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r:.40} is no time, error or budget")
    return number


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): _number(value) for name, value in values.items()}
