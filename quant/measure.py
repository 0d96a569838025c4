"""Measures linears on this device, scheme against scheme, and makes the plan: the fastest inside an error budget.

Times are medians over rounds in which the candidates take turns, so that a change of the machine's pace meets all of
them. With one CPU thread they are CPU time, which other processes do not count towards.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from ispa_deploy.specs import ModelSpec
from quant.convert import kept, make_layer
from quant.kernels import runs
from quant.plan import FLOAT, Plan, PlannedLayer, Timing, load_plan
from quant.schemes import Scheme

# Relative L2 error of one layer: int8 has about 0.01, e4m3 about 0.037.
BUDGET = 0.05
ROUNDS = 7
# Rows whose error is taken against float64.
ERROR_ROWS = 64
# A sample shorter than this is repeated: clocks and launches are too coarse for it.
_SAMPLE_SECONDS = 2e-3
_RACE_SHAPE, _RACE_ROWS = (1536, 1536), 1560


@dataclass(frozen=True, slots=True)
class Subject:
    """One linear to be planned; `x` (R, K) are activations it is judged by."""

    name: str
    linear: nn.Linear
    rows: int
    x: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.linear.out_features, self.linear.in_features


def call_rows(spec: ModelSpec, name: str) -> int:
    """Rows of one call of the linear called `name`: the text for cross-attention's keys and values, else a chunk."""
    text = re.search(r"cross_attn\.(k|v)$", name)
    return spec.text_len if text else spec.chunk_frames * spec.frame_tokens


def plan_for(
    request: str,
    model: nn.Module,
    spec: ModelSpec,
    schemes: Sequence[Scheme],
    *,
    skip: Sequence[str] = (),
    activations: Mapping[str, Tensor] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> Plan | None:
    """What `--plan` asks for: `none`, `auto` (measured here, on the model's own device or the CPU), or a file.

    `activations`, `read`: see `make_plan`.
    """
    if request == "none":
        return None
    if request != "auto":
        return load_plan(request)
    return make_plan(model, lambda name: call_rows(spec, name), schemes, skip=skip, activations=activations, read=read)


def make_plan(
    model: nn.Module,
    rows: Callable[[str], int],
    schemes: Sequence[Scheme],
    *,
    skip: Sequence[str] = (),
    budget: float = BUDGET,
    activations: Mapping[str, Tensor] | None = None,
    read: Callable[[str], Tensor] | None = None,
    rounds: int = ROUNDS,
) -> Plan:
    """Measure every distinct shape and number of rows on the model's device and choose each layer's scheme.

    `rows`: rows of one call by the linear's name. `schemes`: what may be chosen beside floating point; those without a
    kernel here are left out. `activations`: (R, K) by name, for the errors; Gaussian with channels 1 to 4 times as loud
    where there are none. Layers that the first scheme or `skip` keeps are not planned. A model on the meta device is
    measured on the CPU: with the parameters that `read` finds by name for layers with activations, else random ones.
    """
    if not schemes or not budget > 0:
        raise InputError(f"plan with {len(schemes)} schemes and error budget {budget}: expected at least one, above 0")
    first = next(model.parameters())
    device = torch.device("cpu") if first.is_meta else first.device
    running = [scheme for scheme in schemes if scheme.layer != "float" and runs(scheme.layer, str(device))]
    timings: dict[tuple[tuple[int, int], int], Timing] = {}
    layers: list[PlannedLayer] = []
    errors: dict[tuple[int, int], dict[str, float]] = {}  # of random weights: one for all layers of a shape
    for name, reason in kept(model, schemes[0], skip).items():
        if reason is not None:
            continue
        linear, x = model.get_submodule(name), (activations or {}).get(name)
        assert isinstance(linear, nn.Linear)
        if read is not None and x is not None:
            linear = _filled(linear, name, read)
        subject = _subject(name, linear, rows(name), x, device)
        key = (subject.shape, subject.rows)
        if key not in timings:
            ms = _times(_contenders(subject, running), subject.rows, subject.shape[1], device, rounds)
            timings[key] = Timing(*key, ms)
        found = (errors.get(subject.shape) if linear.weight.is_meta else None) or relative_errors(subject, running)
        if linear.weight.is_meta:
            errors[subject.shape] = found
        layers.append(_choose(subject, found, timings[key], running, budget))
    dtype = _run_dtype(first.dtype, device)
    return Plan(
        device=str(device), threads=torch.get_num_threads(), dtype=str(dtype).removeprefix("torch."), budget=budget,
        timings=tuple(timings.values()), layers=tuple(layers),
    )  # fmt: skip


def race(schemes: Sequence[Scheme], device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each scheme for one linear of 1536 x 1536 and 1560 rows in bfloat16."""
    linear = nn.Linear(_RACE_SHAPE[1], _RACE_SHAPE[0], dtype=torch.bfloat16, device=device)
    subject = _subject("race", linear, _RACE_ROWS, None, torch.device(device))
    times = _times(_contenders(subject, schemes), _RACE_ROWS, _RACE_SHAPE[1], torch.device(device), rounds)
    return {scheme.name: times[scheme.name] for scheme in schemes}


@torch.no_grad()
def relative_errors(subject: Subject, schemes: Sequence[Scheme]) -> dict[str, float]:
    """Relative L2 error of the layer's output by scheme, against its own weight in float64."""
    linear, x = subject.linear, subject.x
    want = x.double() @ linear.weight.detach().double().t()
    if linear.bias is not None:
        want += linear.bias.detach().double()
    scale = max(float(want.norm()), torch.finfo(torch.float64).tiny)
    return {
        name: float((layer(x).double() - want).norm()) / scale for name, layer in _contenders(subject, schemes).items()
    }


def _choose(
    subject: Subject, errors: Mapping[str, float], timing: Timing, schemes: Sequence[Scheme], budget: float
) -> PlannedLayer:
    # NaN and Inf are over any budget.
    allowed = [name for name in timing.ms if name == FLOAT or errors[name] <= budget]
    best = min(allowed, key=lambda name: timing.ms[name])
    ms, others = timing.ms, [scheme.name for scheme in schemes]
    if best != FLOAT:
        why = f"{ms[best] / ms[FLOAT]:.2f} of the time in floating point, error {errors[best]:.1e}"
    elif not others:
        why = "no 8-bit kernel runs on this device"
    else:
        why = "; ".join(
            f"{name} takes {ms[name] / ms[FLOAT]:.2f} of its time" if name in allowed
            else f"{name} has error {errors[name]:.1e}, budget {budget:g}" for name in others
        )  # fmt: skip
    return PlannedLayer(subject.name, subject.shape, subject.rows, best, errors, why)


def _contenders(subject: Subject, schemes: Sequence[Scheme]) -> dict[str, nn.Module]:
    linear = subject.linear
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dtype = _run_dtype(linear.weight.dtype, linear.weight.device)
    plain.load_state_dict({name: value.detach().to(dtype) for name, value in linear.state_dict().items()}, assign=True)
    amax = float(subject.x.abs().amax())
    return {
        FLOAT: plain.requires_grad_(False),
        **{scheme.name: make_layer(linear, scheme, subject.name, amax) for scheme in schemes},
    }


def _run_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What floating point runs in: CPUs are slow in float16, and a bundle opened there is widened."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def _filled(linear: nn.Linear, name: str, read: Callable[[str], Tensor]) -> nn.Linear:
    """The linear called `name` with the parameters that `read` finds."""
    filled = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    filled.load_state_dict({leaf: read(f"{name}.{leaf}") for leaf in filled.state_dict()}, assign=True)
    return filled.requires_grad_(False)


def _subject(name: str, linear: nn.Linear, rows: int, x: Tensor | None, device: torch.device) -> Subject:
    if linear.weight.is_meta:
        shape, biased, dtype = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.dtype
        linear = nn.Linear(*shape, biased, dtype=dtype, device=device)
    x = _loud(linear.in_features) if x is None else x[:ERROR_ROWS]
    return Subject(name, linear, rows, x.to(device, _run_dtype(linear.weight.dtype, device)))


@functools.cache
def _loud(features: int) -> Tensor:
    """(R, K) float32, Gaussian with channels 1 to 4 times as loud."""
    draw = torch.Generator().manual_seed(0)
    loud = 1 + 3 * torch.rand(features, generator=draw)
    return torch.randn(ERROR_ROWS, features, generator=draw) * loud


def _times(
    layers: Mapping[str, nn.Module], rows: int, features: int, device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of one call on random rows, by name; two calls each go unmeasured."""
    dtype = next(layers[FLOAT].parameters()).dtype
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode():
        for layer in layers.values():
            layer(x), layer(x)
        repeats = {name: max(1, round(_SAMPLE_SECONDS / max(_seconds(layer, x, 1), 1e-6)))
                   for name, layer in layers.items()}  # fmt: skip
        samples: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(rounds):
            for name, layer in layers.items():
                samples[name].append(_seconds(layer, x, repeats[name]))
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


def _seconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    """Of one call, over `repeats` of them."""
    cuda = x.device.type == "cuda"
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    if cuda:
        torch.cuda.synchronize(x.device)
    start = clock()
    for _ in range(repeats):
        layer(x)
    if cuda:
        torch.cuda.synchronize(x.device)
    return (clock() - start) / repeats
