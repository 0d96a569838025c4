"""How far one forward pass of a converted model is from its original, on the original's own path (teacher-forced).

Trajectories of an autoregressive model part chaotically, so errors are taken pass by pass: the original streams a
prompt, and before each of its denoising passes the other model runs the same noisy latents on the same cache. What that
wrote into the current chunk's slots the original overwrites a moment later, so the stream is the original's, bit for
bit. Beside the whole model every replaced linear is run on the original's input of that linear. In the last denoising
pass of a chunk the other model's linears have the activations that a stream gives them there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.evaluate.passes import TEXT, Pass, ToldStream
from ispa_deploy.model import CausalWanDiT, TextKV
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.precision import Widening, last_pass_linears, widened

SCHEMA_VERSION = 1


@dataclass(slots=True)
class Distance:
    """Sums over pairs of tensors, in float64: |a|², |b|², a·b and |a - b|², a being the reference."""

    reference: float = 0.0
    other: float = 0.0
    product: float = 0.0
    error: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Two tensors of one shape."""
        a, b = reference.detach().double().flatten(), other.detach().double().flatten()
        self.merge(Distance(float(a @ a), float(b @ b), float(a @ b), float((a - b).square().sum())))

    def merge(self, more: Distance) -> None:
        """The same over more pairs."""
        self.reference, self.other = self.reference + more.reference, self.other + more.other
        self.product, self.error = self.product + more.product, self.error + more.error

    @property
    def cosine(self) -> float:
        """Of the angle between all of a and all of b; 1 for two zeros."""
        size = math.sqrt(self.reference * self.other)
        return self.product / size if size else float(self.reference == self.other)

    @property
    def relative_l2(self) -> float:
        """|a - b| / |a|; 0 for two zeros."""
        if self.reference == 0:
            return 0.0 if self.error == 0 else math.inf
        return math.sqrt(self.error / self.reference)

    @property
    def sqnr_db(self) -> float:
        """The same in decibels, at most 200 so that JSON stays numbers."""
        return min(200.0, -20 * math.log10(max(self.relative_l2, 1e-10)))

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types, six digits."""
        shown = {"cosine": self.cosine, "relative_l2": self.relative_l2, "sqnr_db": self.sqnr_db}
        return {name: float(f"{value:.6g}") for name, value in shown.items()}


@dataclass
class _Table:
    """Distances by pass."""

    cells: dict[Pass, Distance] = field(default_factory=dict)

    def add(self, one: Pass, reference: Tensor, other: Tensor) -> None:
        self.cells.setdefault(one, Distance()).add(reference, other)

    def pooled(self, chunks: Iterable[int] | None = None) -> Distance:
        """Over all passes, or those of some chunks."""
        wanted, whole = None if chunks is None else set(chunks), Distance()
        for one, cell in self.cells.items():
            if wanted is None or one.chunk in wanted:
                whole.merge(cell)
        return whole

    def columns(self, passes: Sequence[Pass]) -> dict[str, list[float | None]]:
        """`cosine` and `relative_l2` at each of `passes`, None where this did not run."""
        cells = [self.cells[one].to_dict() if one in self.cells else {} for one in passes]
        return {name: [cell.get(name) for cell in cells] for name in ("cosine", "relative_l2")}

    def by_chunk(self) -> list[dict[str, Any]]:
        return [{"chunk": n, **self.pooled([n]).to_dict()} for n in sorted({one.chunk for one in self.cells})]


@dataclass
class _Comparison:
    """Two models side by side on one prompt after another."""

    original: CausalWanDiT
    other: CausalWanDiT
    whole: _Table = field(default_factory=_Table)

    def __post_init__(self) -> None:
        theirs = dict(self.other.named_modules())
        self._pairs = {
            name: theirs[name]
            for name, module in self.original.named_modules()
            if isinstance(module, nn.Linear) and type(module) is not type(theirs[name])
        }
        self.layers = {name: _Table() for name in self._pairs}
        self._pass = TEXT
        self._expected: Tensor | None = None
        self._conditions: dict[float, Any] = {}
        self._fine = last_pass_linears(self.other)
        self._now: Sequence[Widening] = ()

    def run(self, rows: Tensor, frames: int, seed: int) -> None:
        """One prompt's stream of the original."""
        self._pass = TEXT
        hooks = [self.original.get_submodule(name).register_forward_hook(self._layer(name)) for name in self._pairs]
        hooks.append(self.original.register_forward_hook(self._flow))
        try:
            options = StreamOptions(frames=frames, seed=seed, policy="full")
            told = ToldStream.of(open_stream(self.original, rows, options), self._before)
            self._passes = told.sampler.passes
            with torch.inference_mode():
                self._text: TextKV = self.other.encode_text(rows)
            self._cache = told.cache
            for _ in told:
                pass
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, one: Pass, x: Tensor) -> None:
        self._pass, self._expected, self._now = one, None, ()
        if one.clean:  # its output is never used, only the keys that it leaves
            return
        if one.timestep not in self._conditions:
            t = torch.full((1, 1), one.timestep, dtype=torch.float32, device=x.device)
            self._conditions[one.timestep] = self.other.condition(t)
        if one.step + 1 == self._passes(one.chunk):
            self._now = self._fine
        with widened(self._now):
            self._expected = self.other(x, self._conditions[one.timestep], self._text, self._cache)

    def _flow(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._expected is not None:
            self.whole.add(self._pass, output, self._expected)

    def _layer(self, name: str) -> Any:
        layer, table = self._pairs[name], self.layers[name]
        fine: list[Any] = [one for one in self._fine if one is layer]

        def compare(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            with widened(fine if self._now else ()):
                table.add(self._pass, output, layer(args[0]))

        return compare


def one_step_errors(
    original: CausalWanDiT, other: CausalWanDiT, rows: Sequence[Tensor], *, frames: int, seed: int = 0
) -> dict[str, Any]:
    """Errors of `other` against `original` on prompts (1, L, text_dim), `frames` each, as a JSON document.

    `passes`: chunk, step, timestep of each, chunk -1 being the text. `model`: of the velocity, `pooled`, by `chunks`
    and, in lists as long as `passes`, by pass (None where there is none: the text and the clean pass). `layers`: of the
    output of every linear that is of another kind in `other`, on the original's input, worst first, likewise.
    """
    assert original.spec == other.spec
    assert original.dtype == other.dtype, "the cache is in one dtype"
    comparison = _Comparison(original, other)
    for index, text in enumerate(rows):
        comparison.run(text.to(original.device), frames, seed + index)
    whole = comparison.whole
    tables = comparison.layers
    passes = sorted({one for table in (whole, *tables.values()) for one in table.cells})
    layers = [
        {"name": name, "pooled": table.pooled().to_dict(), **table.columns(passes)} for name, table in tables.items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "one-step",
        "model_name": original.spec.name,
        "dtype": str(original.dtype).removeprefix("torch."),
        "prompts": len(rows),
        "frames": frames,
        "seed": seed,
        "passes": [one.to_dict() for one in passes],
        "model": {"pooled": whole.pooled().to_dict(), "chunks": whole.by_chunk(), **whole.columns(passes)},
        "layers": sorted(layers, key=lambda row: (row["pooled"]["sqnr_db"], row["name"])),
    }
