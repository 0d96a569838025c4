"""Absorption with a correction of its own for each denoising step.

The rings of a layer hold other keys at every step, so what history adds differs too. Pooled statistics give one
correction for all of them; here each step is summed, solved and corrected alone, at as many times the memory. A layer
is ranked by the errors of its steps together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.absorb.records import LayerRecord
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.delta import Delta


class StepSums:
    """The statistics of one layer, step by step: rows go to those of the pass that is running."""

    def __init__(self, parts: list[Statistics], cache: AvatarCache):
        self.parts, self._cache = parts, cache

    def update_pair(self, local: Tensor, full: Tensor, *, weight: float = 1.0) -> None:
        self.parts[self._cache.step].update_pair(local, full, weight=weight)

    def scale(self, factor: float) -> None:
        for part in self.parts:
            part.scale(factor)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)


@dataclass
class PerStepAbsorber(Absorber):
    """An `Absorber` whose layers carry `steps[layer]`, one delta for each step; the stream says which by `use`."""

    storable: ClassVar[bool] = False
    steps: dict[int, list[Delta]] = field(default_factory=dict)
    _prepared: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    _bytes: int = 0

    def use(self, step: int) -> None:
        """The next pass is of this step. What a layer needs for it was prepared: nothing is computed."""
        for layer, states in self._prepared.items():
            for name, value in states[step].items():
                setattr(self.targets[layer], name, value)

    def recalibrate(self, frame: int) -> None:
        self.steps, self._prepared, self._bytes = {}, {}, 0
        super().recalibrate(frame)

    def _start_warmup(self, frame: int) -> None:
        assert isinstance(self.cache, AvatarCache)
        count, sums = len(self.cache.spec.steps), []
        for _ in range(count):
            super()._start_warmup(frame)
            sums.append((self._early, self._late))
        early, late = ([StepSums(list(parts), self.cache) for parts in zip(*lists, strict=True)]
                       for lists in zip(*sums, strict=True))  # fmt: skip
        self._early, self._late = early, late  # type: ignore[assignment]
        self._stride = max(1.0, self._stride / count)  # each step needs its own rows

    def _solve(self, layer: int) -> LayerRecord:
        early, late = self._early, self._late
        records = []
        for step in range(len(self.cache.spec.steps)):
            self._early, self._late = _of_step(early, step), _of_step(late, step)
            records.append(super()._solve(layer))
        self._early, self._late = early, late
        solutions = [record.solution for record in records if record.solution is not None]
        failed = [solution for solution in solutions if solution.failed]
        if failed:
            return LayerRecord(failed[0], None)
        if self.policy.absorbs:
            self.steps[layer] = [self._delta(record) for record in records]
        together = replace(
            solutions[0],
            residual=sum(solution.residual for solution in solutions),
            gap=sum(solution.gap for solution in solutions),
            status=next((solution.status for solution in solutions if solution.status != "ok"), "ok"),
        )
        scores = [record.score for record in records if record.score is not None]
        score = sum(scores) if len(scores) == len(records) else None
        return LayerRecord(together, score, truncation=records[0].truncation)

    def _transition(self) -> None:
        super()._transition()
        self.steps = {layer: deltas for layer, deltas in self.steps.items() if layer in self.deltas}

    def _localise(self, layer: int, delta: Delta | None) -> None:
        super()._localise(layer, delta)
        if delta is None or not self._open:
            return
        target, states = self.targets[layer], []
        for own in self.steps[layer]:
            target.set_delta(own, self.mode)
            states.append({name: getattr(target, name) for name in target.DELTA_STATE})
            self._bytes += target.delta_nbytes()
        self._prepared[layer] = states

    def corrections(self) -> Iterable[Delta]:
        return (delta for deltas in self.steps.values() for delta in deltas)

    def statistics_bytes(self) -> int:
        """Those of all steps; the first step's deltas are counted already."""
        waiting = [deltas[1:] for layer, deltas in self.steps.items() if self.records[layer].delta is not None]
        return super().statistics_bytes() + sum(delta.nbytes for deltas in waiting for delta in deltas)

    def delta_bytes(self) -> int:
        return self._bytes


def _of_step(sums: Iterable[object], step: int) -> list[Statistics]:
    return [each.parts[step] for each in sums if isinstance(each, StepSums)]
