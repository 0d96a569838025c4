"""The report of a comparison: rows of every run, the paper's figures beside ours, and what speaks against the numbers.

`SCHEMA_VERSION` grows when a field changes its meaning, not when one is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.profile.breakdown import RULES, closing
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.grids import recording_price
from ispa_deploy.profile.interval import median_interval, ratio_interval
from ispa_deploy.profile.lane import Lane
from ispa_deploy.profile.paper import (
    FIGURE_RUNS,
    PAPER,
    PAPER_GEOMETRY,
    PAPER_MODEL,
    PAPER_RATIO,
    PUBLISHED,
    Parts,
    amdahl,
    attention_shortfall,
    doubted,
    shortfall,
    verdict,
)
from ispa_deploy.profile.roofline import roofline
from ispa_deploy.profile.windows import chunk_gain, window_needed
from ispa_deploy.profile.work import Setting, Work, chunk_work, keys_of
from ispa_deploy.specs import spec_for

SCHEMA_VERSION = 1

# What makes a report warn about itself: too few chunks, an unsteady machine, a gain that the method does not explain.
FEW, UNSTEADY, SUSPECT = 3, 0.1, 1.1


@dataclass(frozen=True)
class Bench:
    """What was measured beside the runs: the device's peaks, and self-attention by itself, the model's window first."""

    peak: dict[str, Any]
    windows: list[dict[str, Any]]


def report_of(
    lanes: Sequence[Lane], baseline: str, bench: Bench, *, pixel_frames: int, command: str, clock: str,
    load_ms: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What was measured, as plain JSON types; `compare` says what the arguments are."""
    by_name = {lane.configuration.name: lane for lane in lanes}
    base = by_name[baseline]
    model = base.configuration.model
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "env": {**environment(model.device), "clock": clock},
        "model": _model_row(model),
        "baseline": baseline,
        "peak": bench.peak,
        "load_ms": load_ms,
        "runs": [_run_row(lane, base, by_name.get(PUBLISHED), bench.peak, pixel_frames) for lane in lanes],
        **_paper_rows(by_name, base),
        "windows": _window_rows(by_name, base, bench.windows),
        "setting": _setting(base, by_name.get(FIGURE_RUNS["attention"])),
    }
    report["paper"] = {figure: doubted(entry, doubt(report, figure)) for figure, entry in report["paper"].items()}
    report["warnings"] = warnings(report)
    rounded: dict[str, Any] = _rounded(report)
    return rounded


def warnings(report: dict[str, Any]) -> list[str]:
    """Why the numbers of this report must not be taken at their face value; empty when nothing speaks against it."""
    found = []
    for run in report["runs"]:
        times, rules = run["chunk_ms"], run["closing"]
        if rules["broken"]:
            texts = [
                f"{RULES[rule]} {100 * rules[rule]:.1f} %, {100 * rules['limits'][rule]:g} % allowed"
                for rule in rules["broken"]
            ]
            found.append(f"the account of '{run['name']}' does not close: {'; '.join(texts)}")
        if rules["undecided"]:
            found.append(f"whether the account of '{run['name']}' closes is undecided: {recording_price(run)}")
        found += [f"'{run['name']}': {text}" for text in run["complaints"]]
        if times["n"] < FEW:
            found.append(f"'{run['name']}' was timed over {times['n']} chunks only")
    found += _unsteady(report["runs"])
    if gain := _unexplained(report):
        found.append(f"{gain}: the machine was busy")
    return found


def _unsteady(runs: list[dict[str, Any]]) -> list[str]:
    """One line for all runs whose chunks differ too much."""
    shares = {run["name"]: run["chunk_ms"]["spread"] / run["chunk_ms"]["median"] for run in runs}
    found = {name: f"{100 * share:.0f} %" for name, share in shares.items() if share > UNSTEADY}
    if not found:
        return []
    text = ", ".join(f"of '{name}' by {share}" for name, share in found.items())
    return [f"chunks differ between quartiles, {text}: the machine was busy"]


def doubt(report: dict[str, Any], figure: str) -> str | None:
    """Why this figure of the paper cannot count as reproduced by this report, whatever it came to; None if it can."""
    if not report["setting"]["same"]["ratio"]:
        return f"the paper's figure is for {100 * PAPER_RATIO:.0f} % of the layers local"
    runs = [run for run in report["runs"] if run["name"] in (report["baseline"], FIGURE_RUNS[figure])]
    for run in runs:
        if not run["closing"]["closed"]:
            state = "does not close" if run["closing"]["broken"] else "is undecided"
            return f"the account of '{run['name']}' {state}"
    times = {run["name"]: run["chunk_ms"] for run in runs}
    unsteady = [name for name, ms in times.items() if ms["spread"] > UNSTEADY * ms["median"]]
    if unsteady:
        return f"the chunks of '{unsteady[0]}' differ too much"
    return _unexplained(report)


def _unexplained(report: dict[str, Any]) -> str | None:
    gain, keys = report["paper"]["attention"]["ours"], report["amdahl"]["attention_ceiling"]
    if gain is None or gain <= SUSPECT * keys:
        return None
    return f"self-attention gained {gain:.2f}x, the dropped keys explain {keys:.2f}x"


def _model_row(model: CausalWanDiT) -> dict[str, Any]:
    spec = model.spec
    rows = ("dim", "ffn_dim", "heads", "layers", "frame_tokens", "text_len")
    geometry = {name: getattr(spec, name) for name in rows} | {"latent": list(spec.latent_shape)}
    return {
        "name": spec.name,
        "geometry": geometry,
        "window": spec.window_frames,
        "chunk_frames": spec.chunk_frames,
        "passes": len(spec.steps) + (0 if spec.audio_blocks else 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _run_row(lane: Lane, base: Lane, published: Lane | None, peak: dict[str, Any], pixel_frames: int) -> dict[str, Any]:
    options, spec = lane.configuration.options, lane.configuration.model.spec
    run, reference, facts = lane.run, base.run, lane.facts
    price = lane.price
    return {
        "name": lane.configuration.name,
        "policy": options.policy if lane is not published else PUBLISHED,
        "ratio": len(facts["local"]) / spec.layers,
        "recent": options.recent_frames if facts["localises"] else 0,
        "wide_layers": facts["wide_layers"],
        "stores": facts["stores"],
        "scheme": lane.configuration.scheme,
        "kv_dtype": options.kv_dtype,
        "attention_dtype": options.attention_dtype,
        "coded_attention": facts["coded_attention"],
        "delta": facts["delta"],
        "chunk_ms": _distribution(lane.plain),
        "wall_ms": run.wall,
        "families": run.families,
        "components": dict(run.components),
        "unattributed_ms": run.unattributed,
        "instrumented_over_plain": price.ratio,
        "recording": price.to_dict(),
        "closing": closing(run, price.ratio, price.holds()),
        "speedup": median(base.plain) / median(lane.plain),
        "speedup_interval": ratio_interval(base.plain, lane.plain),
        "speedup_published": median(published.plain) / median(lane.plain) if published else None,
        "attention_speedup": _ratio(reference.self_attention, run.self_attention),
        "linear_speedup": _ratio(reference.families["linear"], run.families["linear"]),
        "memory": facts["memory"],
        "kv_percent": _kv_percent(facts, base.facts),
        "fps": _fps(lane, spec.chunk_frames * pixel_frames),
        "start": lane.start.to_dict() if lane.start else None,
        "roofline": roofline(_work(lane), run.components, peak),
        "layers": [{**row, "ms": ms} for row, ms in zip(facts["layers"], lane.layer_ms, strict=True)],
        "launch": facts.get("launch"),
        "complaints": _complaints(lane),
        "audit": facts["audit"],
    }


def _kv_percent(facts: dict[str, Any], base: dict[str, Any]) -> float:
    """Bytes kept, of the baseline's full cache: a run with a window of its own holds less than that."""
    share = facts["memory"]["kv_persistent"] / base["memory"]["kv_persistent"]
    return float(base["kv_percent"] * share)


def _complaints(lane: Lane) -> list[str]:
    """What did not run as it was asked for: 8-bit layers and attention, a compiler, CUDA graphs."""
    told, failure = lane.configuration.complaints, lane.facts.get("failure")
    layers = told(lane.configuration.model) if told else []
    return [*layers, *lane.facts["complaints"], *([lane.facts["launch"]] if failure else [])]


def _work(lane: Lane) -> dict[str, Work]:
    """Operations and bytes of a steady chunk of this run."""
    model, facts = lane.configuration.model, lane.facts
    spec = replace(model.spec, window_frames=facts["window"])
    width = model.dtype.itemsize
    eight = lane.configuration.scheme != "none"
    keys = keys_of(spec, facts["local"], facts["near"])
    setting = Setting(keys=keys, width=width, weight_width=1 if eight else width, stores=facts["stores"],
                      wide=facts["wide_layers"])  # fmt: skip
    return chunk_work(spec, setting)


def _distribution(values: list[float]) -> dict[str, Any]:
    """Median and percentiles by linear interpolation, the distance of the quartiles, the interval of the median."""
    low, middle, high, p90, p99 = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75, 0.9, 0.99])).tolist()
    return {
        "median": middle, "p90": p90, "p99": p99, "min": min(values), "spread": high - low, "n": len(values),
        "interval": median_interval(values),
    }  # fmt: skip


def _fps(lane: Lane, frames: int) -> dict[str, float | None]:
    """Pixel frames per second: the transformer alone, with decoding, and over everything that was timed."""
    chunk = median(lane.plain)
    if not lane.decoding:
        return {"dit": 1e3 * frames / chunk, "with_vae": None, "wall": 1e3 * frames * len(lane.plain) / sum(lane.plain)}
    decoding = median(lane.decoding)
    mean = sum(lane.plain) / len(lane.plain) + sum(lane.decoding) / len(lane.decoding)
    return {"dit": 1e3 * frames / chunk, "with_vae": 1e3 * frames / (chunk + decoding), "wall": 1e3 * frames / mean}


def _paper_rows(lanes: dict[str, Lane], base: Lane) -> dict[str, Any]:
    ispa, both = lanes.get(FIGURE_RUNS["overall"]), lanes.get(FIGURE_RUNS["overall_w8a8"])
    whole = Parts.of(base.run)
    figures = {figure: verdict(figure, None) for figure in PAPER}
    keys = 1.0
    if ispa is not None:
        gain = base.run.self_attention / ispa.run.self_attention
        figures["attention"] = verdict("attention", gain, attention_shortfall(ispa.run, gain))
        figures["overall"] = _overall("overall", ispa, base, "attention")
        keys = _keys(base, ispa)
    if both is not None:
        figures["overall_w8a8"] = _overall("overall_w8a8", both, base, "linear")
    law = amdahl(whole, Parts.of(ispa.run) if ispa else None, keys)
    linear = _ratio(whole.linear, Parts.of(both.run).linear) if both else None
    achieved = {"attention": figures["attention"]["ours"], "chunk": figures["overall"]["ours"], "linear": linear}
    return {"paper": figures, "amdahl": {**law, "achieved": achieved}}


def _overall(figure: str, lane: Lane, base: Lane, lever: str) -> dict[str, Any]:
    short = shortfall(Parts.of(base.run), Parts.of(lane.run), lever, PAPER[figure])
    return verdict(figure, median(base.plain) / median(lane.plain), short)


def _keys(base: Lane, ispa: Lane) -> float:
    """Most that self-attention can gain: its operations before over those after. A clean pass that stops in its last
    layer attends less often there, so this is not quite the ratio of keys in a model of few layers."""
    before, after = (_work(lane)["attention.kernel"].flops for lane in (base, ispa))
    return before / after


def _window_rows(lanes: dict[str, Lane], base: Lane, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with what the whole chunk would gain at each window: ISPA, and ISPA with 8-bit linears."""
    found = []
    for row in rows:
        gains = {"chunk_speedup": lanes.get(FIGURE_RUNS["overall"]),
                 "chunk_speedup_w8a8": lanes.get(FIGURE_RUNS["overall_w8a8"])}  # fmt: skip
        composed = {
            name: chunk_gain(Parts.of(base.run), Parts.of(lane.run), rows[0], row) if lane else None
            for name, lane in gains.items()
        }
        found.append({**row, **composed})
    return found


def _setting(base: Lane, ispa: Lane | None) -> dict[str, Any]:
    """Where this report stands to the paper's setting, and from which window on its attention figure is possible."""
    spec, reference = base.configuration.model.spec, spec_for(PAPER_MODEL)
    here = {
        "geometry": all(getattr(spec, name) == getattr(reference, name) for name in PAPER_GEOMETRY),
        "window": base.facts["window"] == reference.window_frames,
        "ratio": ispa is not None and len(ispa.facts["local"]) / spec.layers == PAPER_RATIO,
    }
    near = ispa.facts["near"] if ispa else spec.chunk_frames
    return {
        "paper": {"model": PAPER_MODEL, "window": reference.window_frames, "ratio": PAPER_RATIO, "height": 480,
                  "width": 832},
        "same": here,
        "window_needed": window_needed(PAPER_RATIO, near),
    }  # fmt: skip


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _rounded(value: Any) -> Any:
    """Six digits are more than any clock here gives, and files under version control stay readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
