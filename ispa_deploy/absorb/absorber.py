"""From warm-up to transition: one stream's absorption, stage by stage, every stage observable.

    full ──begin──► warm-up ──T_warm frames, then `ahead` passes──► [solving ──spread chunks──►] absorbed
                       ▲                                                                            │
                       └────────────────────────────────recalibrate─────────────────────────────────┘

During the warm-up every F-layer's local and full attention outputs are summed up. At the transition each layer is
solved, the layers are ranked by their error, and the K best become L-layers: history freed, correction on. With
`spread` the layers are solved one by one between the passes of the next chunks, and the switch comes after those.
Layers are never written to for good: leaving the session, also by an exception, restores the original weights bit for
bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ispa_deploy.absorb.lowrank import Rank, Truncation, truncate
from ispa_deploy.absorb.presets import Settings
from ispa_deploy.absorb.records import Choice, LayerRecord
from ispa_deploy.absorb.rows import stride_of, thinned
from ispa_deploy.absorb.solve import solve
from ispa_deploy.absorb.stats import Statistics, Weight
from ispa_deploy.allocator import give_back
from ispa_deploy.cache import KVCache
from ispa_deploy.delta import Delta, DeltaTarget, resting
from ispa_deploy.errors import InputError
from ispa_deploy.policies import Policy
from ispa_deploy.regions import region


@dataclass
class Absorber:
    """The absorption of one stream. `targets` are the layers' output projections, first layer first.

    `spread`: chunks over whose passes the transition's solves are spread; 0: all at once, as published.
    """

    targets: Sequence[DeltaTarget]
    cache: KVCache
    policy: Policy
    settings: Settings = field(default_factory=Settings)
    choice: Choice = field(default_factory=Choice)
    mode: str = "auto"
    dtype: torch.dtype = torch.float32
    stats_device: str | None = None
    spread: int = 0
    rank: Rank | None = None
    storable: ClassVar[bool] = True
    """Whether `deltas` is all there is of its corrections."""

    def __post_init__(self) -> None:
        spec = self.cache.spec
        self.state = "full"
        self.records = [LayerRecord() for _ in self.targets]
        self.deltas: dict[int, Delta] = {}
        self._early: list[Statistics] = []
        self._late: list[Statistics] = []
        self._active: list[Statistics] | None = None
        self._since = 0
        self._stride, self._phase = 1.0, 0
        self._taken: Tensor | None = None
        self._passes, self._delay = 0, 0
        self._ahead = self.settings.passes_ahead(spec)
        self._watching, self._amid = 0, False
        self._open = False
        if self.spread < 0:
            raise InputError(f"solve spread over {self.spread} chunks: expected 0 (at once) or more")
        if not self.policy.localises:
            return
        self.settings.check(spec.chunk_frames, spec.first_chunk_frames or spec.chunk_frames)
        if not 0 <= self._ahead <= len(spec.steps):
            raise InputError(f"{self._ahead} passes ahead: expected 0 to {len(spec.steps)}, a chunk's denoising passes")
        if self.rank is not None:
            self.rank.check(spec.dim)
        bad = [layer for layer in self.choice.layers or () if not 0 <= layer < len(self.targets)]
        if bad:
            raise InputError(f"layers {bad}: this model has layers 0 to {len(self.targets) - 1}")
        if self.choice.layers is not None and len(set(self.choice.layers)) < len(self.choice.layers):
            raise InputError(f"layers {self.choice.layers}: expected each layer once")

    # -- driven by the stream

    @contextmanager
    def session(self) -> Iterator[Absorber]:
        """A stream's life: on the way out, whatever happened, every layer carries its original weight again."""
        self._open = True
        try:
            for layer, delta in self.deltas.items():
                self.targets[layer].set_delta(delta, self.mode)
            if self.policy.localises and self.state == "full":
                self._start_warmup(0)
            yield self
            if self.state == "warm-up" and self._warmed_up(self.cache.start + self.cache.count):
                self._end_warmup()  # no chunk came to look ahead in
        finally:
            self._open = False
            self.cache.observer = None
            for target in self.targets:
                target.set_delta(None)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No corrections and no statistics for a pass in which every layer sees all there is: Krea's context pass."""
        with resting([self.targets[layer] for layer in self.deltas]):
            yield

    def before_chunk(self, start: int, count: int) -> None:
        """Called when the cache has begun the chunk: decides where this chunk's rows go."""
        self._amid = True
        if self.state != "warm-up":
            return
        self._watching = self._ahead if self._warmed_up(start) else 0
        if not self._early:
            return
        if self.settings.half_life is not None:
            for stats in (*self._early, *self._late):
                stats.scale(0.5 ** (count / self.settings.half_life))
        last = self._warmed_up(start + count)
        self._active = self._late if last and self._late else self._early
        has_history = start > 0
        self.cache.observer = self._observe if has_history or self.settings.all_rows else None

    def after_chunk(self, end: int) -> None:
        """Called when the chunk is committed; without passes ahead the warm-up ends with it."""
        self.cache.observer, self._amid, self._watching = None, False, 0
        if self.state == "warm-up" and self._warmed_up(end) and not self._ahead:
            self._end_warmup()
        elif self.state == "solving" and end - self._since >= self.settings.warmup + self._delay:
            self._transition()

    def after_pass(self) -> None:
        """Called when a pass has ended: the last one ahead ends the warm-up; while solving, its share is solved."""
        self._phase, self._taken = self._phase + 1, None
        if self._watching and not self.cache.committing:
            self._watching -= 1
            if not self._watching:
                self._end_warmup()
            return
        if self.state != "solving":
            return
        self._passes += 1
        passes = self.spread * self.cache.spec.passes - self._ahead
        with region("overhead.solve"):
            self._solve_up_to(-(-len(self.targets) * self._passes // passes))

    def recalibrate(self, frame: int) -> None:
        """Back to full attention with what is cached, corrections off, and a new warm-up from `frame` on."""
        if not self.policy.localises:
            return
        for layer, target in enumerate(self.targets):
            target.set_delta(None)
            if self.cache.is_local(layer):
                self.cache.globalise(layer)
        self.records = [LayerRecord() for _ in self.targets]
        self.deltas = {}
        self._early, self._late, self._active, self._watching = [], [], None, 0
        self._start_warmup(frame)

    def adopt(self, deltas: Mapping[int, Delta | None]) -> None:
        """Start absorbed, without a warm-up: stored corrections hold from the session's first chunk on; None: the layer
        is local without one."""
        self.state = "absorbed"
        for layer, delta in deltas.items():
            self._localise(layer, delta)

    # -- stages

    def _start_warmup(self, frame: int) -> None:
        self.state, self._since = "warm-up", frame
        if not self.needs_statistics():
            return
        kind = torch.float64 if self.settings.double else torch.float32
        weights = [_weight_of(target) for target in self.targets]
        self._early, self._late = (
            [Statistics(weight, dtype=kind, device=self.stats_device) for weight in weights[:count]]
            for count in (None, None if self.settings.ranking == "heldout" else 0)
        )
        spec, width = self.cache.spec, len(self._early[0].cross)
        frames = (self.settings.warmup - spec.chunk_frames) * spec.passes + self._ahead * spec.chunk_frames
        self._stride = stride_of(frames * self.cache.frame_tokens, self.settings.rows_per_width, width)

    def needs_statistics(self) -> bool:
        """Whether the warm-up sums anything up: to solve for corrections, or to rank layers."""
        ranked = self.choice.layers is None and self.settings.ranking != "random"
        return (self.policy.absorbs or ranked) and self.choice.count(len(self.targets)) > 0

    def _observe(self, layer: int, local: Tensor, full: Tensor) -> None:
        if full is local and not self.settings.all_rows:  # this layer has no history yet, or again
            return
        with region("overhead.statistics"):
            assert self._active is not None
            assert local.shape[0] == 1, "absorption is per video: open_stream lets no batch through to it"
            a, f = local[0].flatten(1), full[0].flatten(1)
            count = len(a)
            if self._stride > 1:
                if self._taken is None:
                    self._taken = thinned(count, self._stride, self._phase).to(a.device)
                a, f = (rows.index_select(0, self._taken) for rows in (a, f))  # a sixth of what indexing takes
            if self.settings.quantisation_aware:
                a = self.targets[layer].multiplied(a)
            self._active[layer].update_pair(a, f, weight=count / len(a))

    def _warmed_up(self, end: int) -> bool:
        """Whether the warm-up's frames lie before frame `end`."""
        return end - self._since >= self.settings.warmup

    def _end_warmup(self) -> None:
        """All rows are there: the transition, or, spread, the beginning of its solves."""
        self.cache.observer = None
        self.state, self._passes = "solving", 0
        self._delay = self.spread * self.cache.spec.chunk_frames if self._early else 0
        if not self._delay:
            self._transition()

    def _transition(self) -> None:
        with region("overhead.solve"):
            self._make_local()

    def _make_local(self) -> None:
        """Solve what is left to be solved, rank, and make the best layers local."""
        count = self.choice.count(len(self.targets))
        self._solve_up_to(len(self.targets))
        for layer in self._ranked():
            if sum(record.local for record in self.records) == count:
                break
            record = self.records[layer]
            if not self.policy.absorbs or record.delta is not None:
                self._localise(layer, record.delta)
        for record in self.records:
            record.delta = None
        self._early, self._late, self._active = [], [], None
        give_back()
        self.state = "absorbed"

    def _solve_up_to(self, layers: int) -> None:
        """Solve layers in order until `layers` are solved; a solved layer's sums are freed."""
        for layer in range(len(self.targets) - len(self._early), min(layers, len(self.targets))):
            if not self._early:
                return
            self.records[layer] = self._keep(self._solve(layer))
            del self._early[0], self._late[:1]

    def _keep(self, record: LayerRecord) -> LayerRecord:
        """Of a solved layer the delta stays, in the dtype it is stored in, and the figures of its solution."""
        solution = record.solution
        assert solution is not None
        if self.policy.absorbs and not solution.failed:
            record.delta = self._delta(record)
        record.solution = replace(solution, weight=None, bias=None)
        if record.truncation is not None:
            record.truncation = replace(record.truncation, weight=None, down=None, bias=None)
        return record

    def _solve(self, layer: int) -> LayerRecord:
        """Fit on all rows; the score is the error in sample, or that of a fit to the early rows on the late ones."""
        settings, device = self.settings, self.cache.device
        index = layer - len(self.targets) + len(self._early)
        early, late = self._early[index], self._late[index] if self._late else None
        held_out, projected = (None, None) if late is None else self._held_out(early, late)
        every = (early if late is None else early + late).to(device)  # on the device one at a time
        every.projected = projected
        solution = solve(every, settings.ridge, intercept=settings.intercept)
        cut = None
        if self.rank is not None and self.policy.absorbs and not solution.failed:
            cut = truncate(every, solution, self.rank)
        del every
        score = solution.residual if late is None else held_out
        if solution.failed:
            score = None
        if solution.weight is not None:  # sums on the host: its fit waits there, the device has room for one at a time
            solution = replace(solution, weight=solution.weight.to(early.gram.device))
        return LayerRecord(solution, score, truncation=cut)

    def _held_out(self, early: Statistics, late: Statistics) -> tuple[float | None, Tensor]:
        """The error on the late rows of a fit to the early ones, None if it failed; and H W of both."""
        settings, device = self.settings, self.cache.device
        near = early.to(device)
        trial = solve(near, settings.ridge, intercept=settings.intercept, certified=False)
        projected, near.projected = near.projected_cross(), None
        del near  # both at once have no room on the device
        far = late.to(device)
        score = None if trial.weight is None else far.residual(trial.weight, trial.bias)
        del trial
        return score, projected.add_(far.projected_cross())

    def _ranked(self) -> list[int]:
        """Layers in the order in which they become local."""
        layers = list(range(len(self.targets)))
        if self.choice.layers is not None:
            return list(self.choice.layers)
        if self.settings.ranking == "random":
            random.Random(self.choice.seed).shuffle(layers)
            return layers
        scored = [layer for layer in layers if self.records[layer].score is not None]
        return sorted(scored, key=lambda layer: self.records[layer].score or 0.0)

    def _delta(self, record: LayerRecord) -> Delta:
        """Rounded here, before its first use, to what would be stored: a stored delta is the delta that ran."""
        device, share, found = self.cache.device, self.settings.share, record.truncation or record.solution
        assert found is not None
        assert found.weight is not None
        bias = (share * found.bias).float().to(device) if found.bias is not None else None
        down = found.down if isinstance(found, Truncation) else None
        return Delta(
            (share * found.weight).to(self.dtype).to(device),
            bias,
            None if down is None else down.to(self.dtype).to(device),
            on_codes=self.settings.quantisation_aware,
        )

    def _localise(self, layer: int, delta: Delta | None) -> None:
        self.cache.localise(layer, self.policy.sink, self.cache.recent, amid=self._amid)
        self.records[layer].local = True
        if delta is not None:
            self.deltas[layer] = delta
            if self._open:
                self.targets[layer].set_delta(delta, self.mode)

    # -- observed by reports

    def describe(self) -> str:
        """The state in words, for a progress bar: `warm-up`, `absorbed (15/30)`, `full`."""
        if self.state != "absorbed":
            return self.state
        word = "absorbed" if self.policy.absorbs else "local"
        return f"{word} ({len(self.local_layers())}/{len(self.targets)})"

    def notes(self) -> list[str]:
        """What a user should know and did not ask: one line each."""
        notes = []
        if self.state == "warm-up":
            frames = self.settings.warmup
            notes.append(f"the stream ended within its warm-up of {frames} frames: every layer ran on the full cache")
        if self.state == "solving":
            notes.append("the stream ended before its transition was solved: every layer ran on the full cache")
        troubled = {layer: r.solution.status for layer, r in enumerate(self.records) if r.solution}
        notes += [f"layer {layer}: {status}" for layer, status in troubled.items() if status != "ok"]
        return notes

    def local_layers(self) -> list[int]:
        return [layer for layer, record in enumerate(self.records) if record.local]

    def statistics_bytes(self) -> int:
        """Bytes of the sums, and of what solved layers hold until the layers that become local are chosen."""
        solved = sum(record.delta.nbytes for record in self.records if record.delta is not None)
        return sum(s.nbytes() for s in (*self._early, *self._late)) + solved

    def corrections(self) -> Iterable[Delta]:
        """Every delta that a local layer carries at one time or another."""
        return self.deltas.values()

    def delta_bytes(self) -> int:
        return sum(target.delta_nbytes() for target in self.targets)

    def report(self) -> dict[str, Any]:
        """State, chosen layers and every layer's record, as plain JSON types."""
        return {
            "policy": self.policy.name,
            "state": self.state,
            "local_layers": self.local_layers(),
            "layers": [record.to_dict() for record in self.records],
            "notes": self.notes(),
        }


def _weight_of(target: DeltaTarget) -> Weight:
    """The layer's own tensor where it has one in floating point, else made for each use: no copy of it stays."""
    return target.weight.detach() if isinstance(target, nn.Linear) else target.reference_weight
