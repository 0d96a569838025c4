"""Which linears' 8 bits a model's output feels most, one linear at a time in the last denoising pass of real streams.

The error of that pass goes into the frame as it is, anew in every chunk: a still background shows it as flicker.
Rounding errors of different linears hardly correlate, so their energies add up, and a few linears have most of the sum.
Text keys and values do not run in that pass: they are the same in all frames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.onestep import Distance
from ispa_deploy.evaluate.passes import Pass, ToldStream
from ispa_deploy.model import CausalWanDiT, Conditioning
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.precision import last_pass_layers
from quant.convert import make_layer
from quant.ranges import Observer
from quant.schemes import Scheme

# As many give a ranking that another choice of prompts hardly changes.
PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`errors`: by linear the energy of the velocity's error, as a share of the velocity's own, when it alone runs in 8
    bits. `chosen`: the linears that are better kept in floating point, at most `share` of the weights."""

    share: float
    errors: Mapping[str, float]
    chosen: tuple[str, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The linears that are kept, as regular expressions that match nothing else."""
        return tuple(f"^{re.escape(name)}$" for name in self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: relative L2 error by linear, worst first."""
        ranked = sorted(self.errors.items(), key=lambda row: -row[1])
        errors = {name: float(f"{energy**0.5:.4g}") for name, energy in ranked}
        return {"share": self.share, "relative_l2": errors, "kept": list(self.chosen)}

    def summary(self) -> str:
        """One line: how many are kept and what they had of the error."""
        whole = max(sum(self.errors.values()), torch.finfo(torch.float64).tiny)
        part = sum(self.errors[name] for name in self.chosen)
        return (
            f"kept in floating point: {len(self.chosen)} of {len(self.errors)} linears, at most {self.share:.0%} of "
            f"the weights, with {part / whole:.0%} of what 8 bits add to the output in a last denoising pass"
        )


def check_share(keep: float) -> None:
    """InputError unless it is a share."""
    if not 0 <= keep < 1:
        raise InputError(f"--keep-sensitive {keep}: expected a share of the weights, 0 (none) to below 1, such as 0.1")


def most_sensitive(errors: Mapping[str, float], sizes: Mapping[str, int], share: float) -> tuple[str, ...]:
    """Linears with the most error energy per weight, as many as fit into `share` of all weights; `sizes` names all."""
    room = share * sum(sizes.values())
    chosen = []
    for name in sorted(errors, key=lambda name: -errors[name] / sizes[name]):
        if errors[name] > 0 and sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    return tuple(chosen)


def sensitivity(
    model: CausalWanDiT,
    scheme: Scheme,
    ranges: Mapping[str, float],
    texts: Sequence[Tensor],
    *,
    share: float,
    frames: int,
    seed: int = 0,
) -> Sensitivity:
    """Try every linear in `ranges` (largest magnitude of its input, by name) in `scheme`, on `texts` (1, L, text_dim).

    A pass of the whole model for each linear and prompt, in the last denoising pass of a stream of `frames`. The
    streams are the model's own, bit for bit, and it is left as it was. Linears of the last layers have activations of
    16 bits there, as a stream runs them.
    """
    trials = _Trials(model, scheme, ranges)
    for index, rows in enumerate(texts):
        trials.run(rows.to(model.device), StreamOptions(frames=frames, seed=seed + index, policy="full"))
    errors = {name: distance.relative_l2**2 for name, distance in trials.distances.items()}
    sizes = {name: linear.weight.numel() for name, linear in trials.linears.items()}
    return Sensitivity(share, errors, most_sensitive(errors, sizes, share))


class _Trials:
    """One linear after another in 8 bits, on the noisy latents and the cache of a stream."""

    def __init__(self, model: CausalWanDiT, scheme: Scheme, ranges: Mapping[str, float]) -> None:
        self._model, self._scheme, self._ranges = model, scheme, ranges
        self._fine = tuple(f"blocks.{index}." for index in last_pass_layers(len(model.layers())))
        self.linears: dict[str, nn.Linear] = {}
        for name in ranges:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.linears[name] = linear
        self.distances: dict[str, Distance] = {}

    def run(self, rows: Tensor, options: StreamOptions) -> None:
        """One prompt (1, L, text_dim)."""
        stream = open_stream(self._model, rows, options)
        chunk = len(stream.chunks) - 1
        last = stream.sampler.passes(chunk) - 1

        def before(one: Pass, x: Tensor) -> None:
            if (one.chunk, one.step) == (chunk, last):
                self._try_all(lambda: self._model(x, condition(one.timestep), told.text, told.cache))

        def condition(timestep: float) -> Conditioning:
            return self._model.condition(torch.full((1, 1), timestep, device=rows.device))

        told = ToldStream.of(stream, before)
        for _ in told:
            pass

    def _try_all(self, velocity: Callable[[], Tensor]) -> None:
        with Observer(self._model, self.linears) as observer:
            reference = velocity()
        for name in observer.seen():
            with self._in_eight_bits(name):
                self.distances.setdefault(name, Distance()).add(reference, velocity())

    @contextmanager
    def _in_eight_bits(self, name: str) -> Iterator[None]:
        linear = self.linears[name]
        layer = make_layer(linear, self._scheme, f"{name}.weight", self._ranges[name])
        layer.allow_fallback = True
        layer.set_wide(name.startswith(self._fine))
        parent, _, leaf = name.rpartition(".")
        owner = self._model.get_submodule(parent)
        setattr(owner, leaf, layer)
        try:
            yield
        finally:
            setattr(owner, leaf, linear)
