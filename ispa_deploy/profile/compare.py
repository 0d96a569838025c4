"""Configurations side by side: steady-state chunks on pre-filled caches, in rotating order, into one report.

Headline times are taken with nothing installed; the breakdown comes from the chunks between them, so the price of
recording is the ratio of neighbours. `SCHEMA_VERSION` grows when a field of the report changes its meaning, not when
one is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError, known_names
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.breakdown import Breakdown, closing, typical
from ispa_deploy.profile.environment import environment, peak_rss
from ispa_deploy.profile.paper import Parts, amdahl, attention_shortfall, keys_ratio, shortfall, verdict
from ispa_deploy.profile.recorder import CLOCKS, Clock, measure, stopwatch
from ispa_deploy.profile.steady import SteadyStream

SCHEMA_VERSION = 1

# What makes a report warn about itself: too few chunks, an unsteady machine, a gain that the method does not explain.
FEW, UNSTEADY, SUSPECT = 3, 0.1, 1.1

Audit = Callable[[nn.Module], list[dict[str, Any]]]
"""What every linear layer of a model really ran, one row each."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run of the report. Configurations may share a model: only one streams at a time.

    `scheme` is the name of what was done to the model's linears, `audit` reports what ran.
    """

    name: str
    model: CausalWanDiT
    options: StreamOptions
    scheme: str = "none"
    audit: Audit | None = None


@dataclass
class _Lane:
    """A configuration with its stream and what was measured so far; times in ms."""

    configuration: Configuration
    steady: SteadyStream
    plain: list[float] = field(default_factory=list)
    recorded: list[Breakdown] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak: int = 0

    @property
    def run(self) -> Breakdown:
        return typical(self.recorded)


def compare(
    configurations: Sequence[Configuration],
    *,
    chunks: int = 1,
    rounds: int = 5,
    baseline: str = "full",
    pixel_frames: int = 4,
    decoder: Callable[[Tensor], Tensor] | None = None,
    clock: str = "wall",
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The report of `configurations` as plain JSON types.

    In each of `rounds` rounds every configuration generates `chunks` chunks plain and `chunks` recorded.
    `pixel_frames`: pixel frames per latent frame, for FPS; `decoder`: latents (B, F, C, H, W) -> pixels, timed apart.
    `clock`: `wall`, or `cpu` for one thread on a shared machine.
    """
    _check_clock(clock, configurations)
    names = [configuration.name for configuration in configurations]
    if baseline not in names or len(set(names)) != len(names):
        raise InputError(f"configurations {names}: expected different names and the baseline '{baseline}' among them")
    say = progress or (lambda _: None)
    lanes = []
    for configuration in configurations:
        say(f"preparing {configuration.name}")
        lanes.append(_open(configuration, 2 * chunks * rounds + 1))
    for number in range(rounds):
        for offset in range(len(lanes)):
            lane = lanes[(number + offset) % len(lanes)]
            say(f"round {number + 1}/{rounds}: {lane.configuration.name}")
            _turn(lane, chunks, recorded_first=number % 2 == 1, decoder=decoder, clock=CLOCKS[clock])
    base = lanes[names.index(baseline)]
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "env": {**environment(base.configuration.model.device), "clock": clock},
        "model": _model_row(base.configuration.model),
        "baseline": baseline,
        "runs": [_run_row(lane, base, pixel_frames) for lane in lanes],
        **_paper_rows({lane.configuration.name: lane for lane in lanes}, base),
    }
    report["warnings"] = warnings(report)
    rounded: dict[str, Any] = _rounded(report)
    return rounded


def _check_clock(clock: str, configurations: Sequence[Configuration]) -> None:
    if clock not in CLOCKS:
        raise known_names("clock", clock, CLOCKS)
    if clock == "cpu" and (
        torch.get_num_threads() != 1 or any(each.model.device.type != "cpu" for each in configurations)
    ):
        raise InputError("clock 'cpu' counts the time of one thread: expected one thread on a CPU; use --threads 1")


def warnings(report: dict[str, Any]) -> list[str]:
    """Why the numbers of this report must not be taken at their face value; empty when nothing speaks against it."""
    found = []
    for run in report["runs"]:
        times, broken = run["chunk_ms"], run["closing"]["broken"]
        if broken:
            found.append(f"the account of '{run['name']}' does not close: {', '.join(broken)} beyond the limit")
        if times["n"] < FEW:
            found.append(f"'{run['name']}' was timed over {times['n']} chunks only")
        elif times["spread"] > UNSTEADY * times["median"]:
            share = 100 * times["spread"] / times["median"]
            found.append(f"the chunks of '{run['name']}' differ by {share:.0f} % between quartiles: a busy machine?")
    gain, keys = report["paper"]["attention"]["ours"], report["amdahl"]["attention_ceiling"]
    if gain is not None and gain > SUSPECT * keys:
        found.append(f"self-attention gained {gain:.2f}x where the dropped keys explain {keys:.2f}x: a busy machine?")
    return found


def _open(configuration: Configuration, chunks: int) -> _Lane:
    """A lane whose first chunk, with everything that is done once, is behind it."""
    steady = SteadyStream.open(configuration.model, configuration.options, chunks)
    lane = _Lane(configuration, steady)
    with steady.turn():
        steady.step()
    return lane


def _turn(
    lane: _Lane, chunks: int, *, recorded_first: bool, decoder: Callable[[Tensor], Tensor] | None, clock: Clock
) -> None:
    """`chunks` pairs of a plain and a recorded chunk; who goes first alternates: neither always has the warm caches."""
    steady, model = lane.steady, lane.configuration.model
    with steady.turn():
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
        for number in range(chunks):
            if recorded_first == (number % 2 == 0):
                lane.recorded.append(measure(steady.step, model, model.device, clock))
                lane.plain.append(stopwatch(steady.step, model.device, clock))
            else:
                lane.plain.append(stopwatch(steady.step, model.device, clock))
                lane.recorded.append(measure(steady.step, model, model.device, clock))
        lane.peak = max(lane.peak, _transient(model.device, before))
        lane.facts = _facts(lane)
    if decoder is not None:
        latents = torch.randn(1, model.spec.chunk_frames, *model.spec.latent_shape, device=model.device)
        lane.decoding.append(stopwatch(lambda: decoder(latents), model.device, clock))


def _transient(device: torch.device, before: int) -> int:
    """Bytes that the work of a turn took on top of what lay there before it; 0 on a CPU, which keeps no count."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def _facts(lane: _Lane) -> dict[str, Any]:
    """What can only be read while the deltas are on the model."""
    configuration, stream = lane.configuration, lane.steady.stream
    cache, absorber = stream.cache, stream.absorber
    memory = {
        "weights": weight_bytes(configuration.model),
        "kv_persistent": cache.persistent_bytes(),
        "kv_scratch": cache.scratch_bytes(),
        "deltas": absorber.delta_bytes(),
        "statistics": lane.steady.statistics_bytes(),
    }
    held = sum(memory[name] for name in ("weights", "kv_persistent", "kv_scratch", "deltas"))
    cuda = configuration.model.device.type == "cuda"
    return {
        "local": len(absorber.local_layers()),
        "delta": lane.steady.delta_mode(),
        # On a CPU: of the whole process with all configurations in it.
        "memory": {**memory, "peak": held + lane.peak if cuda else peak_rss()},
        "kv_percent": 100 * cache.persistent_bytes() / cache.full_bytes(),
        "audit": configuration.audit(configuration.model) if configuration.audit else [],
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; a layer that keeps them packed outside of its state says so by `nbytes`."""
    total = 0
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        packed = getattr(module, "nbytes", None)
        total += packed if isinstance(packed, int) else sum(tensor.nbytes for tensor in own)
    return total


def _model_row(model: CausalWanDiT) -> dict[str, Any]:
    spec = model.spec
    rows = ("dim", "ffn_dim", "heads", "layers", "frame_tokens", "text_len")
    geometry = {name: getattr(spec, name) for name in rows} | {"latent": list(spec.latent_shape)}
    return {
        "name": spec.name,
        "geometry": geometry,
        "window": spec.window_frames,
        "chunk_frames": spec.chunk_frames,
        "passes": len(spec.steps) + 1,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _run_row(lane: _Lane, base: _Lane, pixel_frames: int) -> dict[str, Any]:
    options, spec = lane.configuration.options, lane.configuration.model.spec
    run, reference, facts = lane.run, base.run, lane.facts
    overhead = median(a.wall / b for a, b in zip(lane.recorded, lane.plain, strict=True))
    localises = lane.steady.stream.absorber.policy.localises
    return {
        "name": lane.configuration.name,
        "policy": options.policy,
        "ratio": facts["local"] / spec.layers,
        "recent": options.recent_frames if localises else 0,
        "scheme": lane.configuration.scheme,
        "delta": facts["delta"],
        "chunk_ms": _distribution(lane.plain),
        "wall_ms": run.wall,
        "families": run.families,
        "components": dict(run.components),
        "unattributed_ms": run.unattributed,
        "instrumented_over_plain": overhead,
        "closing": closing(run, overhead),
        "speedup": median(base.plain) / median(lane.plain),
        "attention_speedup": _ratio(reference.self_attention, run.self_attention),
        "linear_speedup": _ratio(reference.families["linear"], run.families["linear"]),
        "memory": facts["memory"],
        "kv_percent": facts["kv_percent"],
        "fps": _fps(lane, spec.chunk_frames * pixel_frames),
        "audit": facts["audit"],
    }


def _distribution(values: list[float]) -> dict[str, float | int]:
    """Median and percentiles by linear interpolation, and the distance of the quartiles."""
    low, middle, high, p90, p99 = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75, 0.9, 0.99])).tolist()
    return {"median": middle, "p90": p90, "p99": p99, "min": min(values), "spread": high - low, "n": len(values)}


def _fps(lane: _Lane, frames: int) -> dict[str, float | None]:
    """Pixel frames per second: the transformer alone, with decoding, and over everything that was timed."""
    chunk = median(lane.plain)
    if not lane.decoding:
        return {"dit": 1e3 * frames / chunk, "with_vae": None, "wall": 1e3 * frames * len(lane.plain) / sum(lane.plain)}
    decoding = median(lane.decoding)
    mean = sum(lane.plain) / len(lane.plain) + sum(lane.decoding) / len(lane.decoding)
    return {"dit": 1e3 * frames / chunk, "with_vae": 1e3 * frames / (chunk + decoding), "wall": 1e3 * frames / mean}


def _paper_rows(lanes: dict[str, _Lane], base: _Lane) -> dict[str, Any]:
    ispa, both = lanes.get("ispa"), lanes.get("ispa+w8a8")
    whole = Parts.of(base.run)
    figures = {figure: verdict(figure, None) for figure in ("attention", "overall", "overall_w8a8")}
    keys = 1.0
    if ispa is not None:
        gain = base.run.self_attention / ispa.run.self_attention
        figures["attention"] = verdict("attention", gain, attention_shortfall(ispa.run, gain))
        figures["overall"] = _overall("overall", ispa, base, "attention")
        keys = _keys(ispa)
    if both is not None:
        figures["overall_w8a8"] = _overall("overall_w8a8", both, base, "linear")
    return {"paper": figures, "amdahl": amdahl(whole, Parts.of(ispa.run) if ispa else None, keys)}


def _overall(figure: str, lane: _Lane, base: _Lane, lever: str) -> dict[str, Any]:
    target = verdict(figure, None)["paper"]
    short = shortfall(Parts.of(base.run), Parts.of(lane.run), lever, target)
    return verdict(figure, median(base.plain) / median(lane.plain), short)


def _keys(lane: _Lane) -> float:
    cache, policy = lane.steady.stream.cache, lane.steady.stream.absorber.policy
    local = policy.sink + cache.recent + cache.spec.chunk_frames
    return keys_ratio(lane.facts["local"] / cache.spec.layers, cache.spec.window_frames, local)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _rounded(value: Any) -> Any:
    """Six digits are more than any clock here gives, and files under version control stay readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
